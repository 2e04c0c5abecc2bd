"""Read weights and sequences from files without running code in them, and write results atomically."""

from __future__ import annotations

import csv
import json
import os
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import safetensors
import safetensors.torch
import torch
from torch import Tensor


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a ``.safetensors`` file or a ``.pt``/``.pth`` checkpoint, by dotted key.

    Checkpoints are loaded with ``weights_only=True``, so no code in them is run. Keys of nested dictionaries
    are joined: ``{"model": {"lstm.weight_ih_l0": ...}}`` gives ``model.lstm.weight_ih_l0``.

    Raises:
        OSError: If the file can't be read.
        ValueError: If the file has another format, is damaged, or contains code.
    """
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", ".pt", ".pth"):
        raise ValueError(
            f"{path}: expected a .safetensors, .pt or .pth file, got {path.suffix or path.name!r}"
        )
    with path.open("rb") as file:  # report a missing or unreadable file before any problem with its format
        is_pickle = file.read(4).startswith((b"\x80", b"PK\x03\x04"))  # plain or in a zip archive
    if suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file, or damaged ({error})") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.load warns about files that it then rejects
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise ValueError(
                f"{path}: refused, because loading it would run code ({code[1]}); save model.state_dict() "
                "instead of the model"
            ) from None
        if is_pickle and "Unsupported operand" in str(error):
            # torch.load can't tell what a pickle of a newer protocol would run
            raise ValueError(
                f"{path}: refused, because loading this pickle may run code; save model.state_dict() with "
                "torch.save and its default pickle protocol"
            ) from None
        raise ValueError(f"{path}: not a torch.save checkpoint, or damaged") from None
    except Exception as error:  # a damaged file can fail in any way
        if "TorchScript" in str(error):
            raise ValueError(
                f"{path}: refused, because it is a TorchScript program; save module.state_dict() instead"
            ) from None
        first_line = (str(error).strip().splitlines() or ["empty file"])[0]
        raise ValueError(f"{path}: not a torch.save checkpoint, or damaged ({first_line})") from None
    return dict(_flatten_tensors(content))


def read_input(path: Path) -> Tensor:
    """Read a sequence of shape ``(time, features)`` from a ``.csv`` or ``.npy`` file, one row per time step.

    A first CSV line without any number is treated as a header. Columns may also be separated by whitespace,
    as ``numpy.savetxt`` writes them.

    Raises:
        OSError: If the file can't be read.
        ValueError: If the file has another format or holds no such sequence.
    """
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return torch.tensor(_read_csv(path), dtype=torch.float64)
    if suffix != ".npy":
        raise ValueError(f"{path}: expected a .csv or .npy file, got {path.suffix or path.name!r}")
    with path.open("rb") as file:
        try:
            array = numpy.load(file, allow_pickle=False)
        except Exception as error:  # a damaged header can fail in any way
            raise ValueError(f"{path}: not an array of numbers, or damaged ({error})") from None
    if not isinstance(array, numpy.ndarray) or array.dtype.kind not in "fiub":
        raise ValueError(
            f"{path}: expected one array of real numbers, got {getattr(array, 'dtype', 'an archive')}"
        )
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or 0 in array.shape:
        advice = "; save one sequence of the batch, such as array[0]" if array.ndim == 3 else ""
        raise ValueError(f"{path}: expected an array of shape (time, features), got {array.shape}{advice}")
    return torch.from_numpy(array.astype(numpy.float64))


def read_labels(path: Path) -> list[str]:
    """Read the labels of time steps from a text file, one per line.

    Raises:
        OSError: If the file can't be read.
        ValueError: If the file isn't UTF-8 text.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            return [line.removesuffix("\n") for line in file]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text with one label per line ({error})") from None


def write_json(document: Any, path: Path) -> None:
    """Write a JSON document atomically: a concurrent reader sees the old file or the new one.

    Raises:
        OSError: If the file can't be written.
        ValueError: If the document contains NaN or infinity, which JSON doesn't have.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_csv(path: Path) -> list[list[float]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [(number, row) for number, row in enumerate(csv.reader(file), 1) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file of numbers ({error})") from None
    if all(len(row) == 1 and not _is_number(row[0]) for _, row in lines):
        lines = [(number, row[0].split()) for number, row in lines]
    if lines and not any(_is_number(part) for field in lines[0][1] for part in field.split(";")):
        lines = lines[1:]
    if not lines:
        raise ValueError(f"{path}: expected one row of numbers per time step, found none")
    width = len(lines[0][1])
    for number, row in lines:
        if len(row) != width:
            raise ValueError(
                f"{path}, line {number}: expected {width} fields as in the rows above, got {len(row)}"
            )
        for column, field in enumerate(row, 1):
            if not _is_number(field):
                position = f"{path}, line {number}, column {column}"
                advice = "; separate numbers by commas" if re.search(r"\d[;\s]+[-+.\d]", field) else ""
                raise ValueError(f"{position}: expected a number, got {field!r}{advice}")
    return [[float(field) for field in row] for _, row in lines]


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return "_" not in field  # float accepts 1_000, which isn't a number in a CSV file


def _flatten_tensors(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield prefix, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            if isinstance(key, str):
                yield from _flatten_tensors(value, f"{prefix}.{key}" if prefix else key)
