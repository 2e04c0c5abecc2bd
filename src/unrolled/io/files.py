"""Read sequences and labels from files, and write results atomically."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor


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
