"""Weights and sequences from users' files, read without running code in them; results written whole."""

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
    """Every tensor of a ``.safetensors`` file or a ``.pt``/``.pth`` checkpoint, by its dotted key.

    Checkpoints are read with ``weights_only=True``: nothing in them is run. Nested dictionaries are
    joined: ``{"model": {"lstm.weight_ih_l0": ...}}`` gives ``model.lstm.weight_ih_l0``.

    Raises:
        OSError: the file can't be read.
        ValueError: another kind of file, a damaged one, or one that holds code.
    """
    kind = path.suffix.lower()
    if kind not in (".safetensors", ".pt", ".pth"):
        raise ValueError(
            f"{path}: expected weights as .safetensors, .pt or .pth, got {path.suffix or path.name!r}"
        )
    with path.open("rb") as file:  # a missing or forbidden file is told before any format is
        pickled = file.read(4).startswith((b"\x80", b"PK\x03\x04"))  # as it is, or in a zip archive
    if kind == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: damaged, cut short or no safetensors file ({error})") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.load's, of files that it then refuses
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise ValueError(
                f"{path}: refused, since reading it would run code ({code[1]}): save model.state_dict() "
                "in place of the model"
            ) from None
        if pickled and "Unsupported operand" in str(error):
            # of a newer protocol than torch.save's, in which what would be run can't be told
            raise ValueError(
                f"{path}: refused, a pickle in which reading may run code: save model.state_dict() with "
                "torch.save and its own pickle protocol"
            ) from None
        raise ValueError(f"{path}: damaged, or no checkpoint of torch.save") from None
    except Exception as error:  # a damaged file can fail in any way
        if "TorchScript" in str(error):
            raise ValueError(
                f"{path}: refused, a TorchScript program and not weights: save module.state_dict()"
            ) from None
        first = str(error).strip().splitlines() or ["nothing in it"]
        raise ValueError(f"{path}: damaged, cut short or no checkpoint of torch.save ({first[0]})") from None
    return dict(_tensors(content))


def read_input(path: Path) -> Tensor:
    """A sequence ``(time, features)`` from a ``.csv`` or ``.npy`` file, rows as time steps.

    A first line of a CSV in which nothing is a number is taken as the names of the columns. In place of
    commas there may be white space between the numbers, as ``numpy.savetxt`` writes them.

    Raises:
        OSError: the file can't be read.
        ValueError: another kind of file, or one that holds no such sequence, with line and column.
    """
    kind = path.suffix.lower()
    if kind == ".csv":
        return torch.tensor(_read_csv(path), dtype=torch.float64)
    if kind != ".npy":
        raise ValueError(f"{path}: expected the input as .csv or .npy, got {path.suffix or path.name!r}")
    with path.open("rb") as file:
        try:
            array = numpy.load(file, allow_pickle=False)
        except Exception as error:  # a damaged header can fail in any way
            raise ValueError(f"{path}: damaged, cut short or no array of numbers ({error})") from None
    if not isinstance(array, numpy.ndarray) or array.dtype.kind not in "fiub":
        raise ValueError(
            f"{path}: expected one array of real numbers, got {getattr(array, 'dtype', 'an archive')}"
        )
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or 0 in array.shape:
        one = ": save one sequence of a batch, such as array[0]" if array.ndim == 3 else ""
        raise ValueError(f"{path}: expected an array (time, features), got the shape {array.shape}{one}")
    return torch.from_numpy(array.astype(numpy.float64))


def read_labels(path: Path) -> list[str]:
    """The lines of a text file, which name the time steps of a sequence.

    Raises:
        OSError: the file can't be read.
        ValueError: it is no text in UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            return [line.removesuffix("\n") for line in file]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a text in UTF-8, a label on each line ({error})") from None


def write_json(document: Any, path: Path) -> None:
    """Write a JSON document in one step: who reads meanwhile finds the one before.

    Raises:
        OSError: the file can't be written.
        ValueError: the document holds NaN or infinity, which JSON has not.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _read_csv(path: Path) -> list[list[float]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [(number, row) for number, row in enumerate(csv.reader(file), 1) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV of numbers ({error})") from None
    if all(len(row) == 1 and not _is_number(row[0]) for _, row in lines):
        lines = [(number, row[0].split()) for number, row in lines]
    if lines and not any(_is_number(part) for field in lines[0][1] for part in field.split(";")):
        lines = lines[1:]
    if not lines:
        raise ValueError(f"{path}: expected a row of numbers for each time step, found none")
    width = len(lines[0][1])
    for number, row in lines:
        if len(row) != width:
            raise ValueError(
                f"{path}, line {number}: expected {width} fields as in the rows before, got {len(row)}"
            )
        for column, field in enumerate(row, 1):
            if not _is_number(field):
                where = f"{path}, line {number}, column {column}"
                how = ": separate numbers by commas" if re.search(r"\d[;\s]+[-+.\d]", field) else ""
                raise ValueError(f"{where}: expected a number, got {field!r}{how}")
    return [[float(field) for field in row] for _, row in lines]


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return "_" not in field  # which Python's numbers may hold, and no other program's


def _tensors(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield prefix, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            if isinstance(key, str):
                yield from _tensors(value, f"{prefix}.{key}" if prefix else key)
