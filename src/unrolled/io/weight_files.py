"""Read the tensors of weight files without running code in them. Their content tells the format."""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import safetensors
import safetensors.torch
import torch
from torch import Tensor

FORMATS = (
    "a checkpoint of torch.save, a safetensors file, an ONNX model, an .npz file of NumPy, or the weights or "
    "model of Keras"
)
_KERAS_WEIGHTS = "model.weights.h5"  # in a .keras file
_TORCH_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".th")


@dataclass
class WeightFile:
    """The content of a weight file.

    Attributes:
        tensors: All tensors, by dotted key.
        names: The names of groups of tensors, by the keys of the groups, as far as the file has them.
        config: The configuration of a Keras model as JSON. None if the file doesn't have it.
    """

    tensors: dict[str, Tensor]
    names: dict[str, str] = field(default_factory=dict)
    config: str | None = None


def detect_format(path: Path) -> str:
    """Return the format of a file: safetensors, torch, program, onnx, npz, keras, hdf5, or empty if unknown.

    Raises:
        OSError: If the file can't be read.
    """
    with path.open("rb") as file:
        head = file.read(512)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**40:  # the length of the header
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        return _zip_format(path, head)
    if head.startswith(b"\x80") or head[257:262] == b"ustar":
        return "torch"  # before torch 1.6, a pickle or a tar archive
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "hdf5"
    return "onnx" if head.startswith(b"\x08") else ""  # protobuf's key of the field ir_version


def _zip_format(path: Path, head: bytes) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # cut off at the end, where the list of names is, or damaged there
        names = [head[30 : 30 + int.from_bytes(head[26:28], "little")].decode(errors="replace")]
    if _KERAS_WEIGHTS in names or names == ["metadata.json"]:
        return "keras"
    if all(name.endswith(".npy") for name in names):
        return "npz"
    if any(name.endswith("archive_format") for name in names):
        return "program"  # of torch.export
    return "torch" if any(name.endswith("data.pkl") for name in names) else ""


def read_weights(path: Path) -> WeightFile:
    """Read all tensors of a file of torch.save, safetensors, NumPy or Keras, by dotted key.

    Checkpoints are loaded with ``weights_only=True``, so no code in them is run. Keys of nested dictionaries
    are joined: ``{"model": {"lstm.weight_ih_l0": ...}}`` gives ``model.lstm.weight_ih_l0``.

    Raises:
        OSError: If the file can't be read.
        ImportError: If it needs h5py, and h5py isn't installed.
        ValueError: If the file has another format, is damaged, or contains code.
    """
    file_format = detect_format(path)
    if file_format == "safetensors" or (not file_format and path.suffix.lower() == ".safetensors"):
        try:
            return WeightFile(safetensors.torch.load_file(path))
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file, or damaged ({error})") from None
    if file_format == "program":
        raise ValueError(
            f"{path}: refused, because it is a program of torch.export; save module.state_dict() instead"
        )
    if file_format == "npz":
        return WeightFile(_read_npz(path))
    if file_format in ("hdf5", "keras"):
        return _read_keras(path, file_format)
    if file_format == "torch" or (not file_format and path.suffix.lower() in _TORCH_SUFFIXES):
        return WeightFile(dict(_flatten_tensors(_load_checkpoint(path, file_format == "torch"))))
    raise ValueError(f"{path}: unknown format; expected {FORMATS}")


def _load_checkpoint(path: Path, is_pickle: bool) -> Any:
    """Load a checkpoint of torch.save; ``is_pickle`` says whether it looks like one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.load warns about files that it then rejects
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise ValueError(
                f"{path}: refused, because loading it would run code ({code[1]}); save model.state_dict() "
                "instead of the model"
            ) from None
        if is_pickle and "Unsupported operand" in str(error):
            # torch.load reads only old pickle protocols, so it can't check that this file is safe.
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


def _read_npz(path: Path) -> dict[str, Tensor]:
    """Read the arrays of an .npz file. Arrays of text and the like are left out."""
    tensors = {}
    try:
        with path.open("rb") as file, numpy.load(file, allow_pickle=False) as archive:
            for name in archive.files:
                tensor = _to_tensor(archive[name])
                if tensor is not None:
                    tensors[name.replace("/", ".")] = tensor
    except Exception as error:  # a damaged file can fail in any way
        if "allow_pickle" in str(error):
            raise ValueError(
                f"{path}: refused, because loading its Python objects may run code; save arrays of numbers"
            ) from None
        raise ValueError(f"{path}: not an .npz file, or damaged ({error})") from None
    return tensors


def _read_keras(path: Path, file_format: str) -> WeightFile:
    """Read a .keras file, or an HDF5 file of Keras or others."""
    try:
        import h5py
    except ModuleNotFoundError as error:
        if error.name != "h5py":
            raise
        raise ImportError(f"{path} is an HDF5 file, which needs h5py: pip install h5py") from error
    try:
        if file_format == "hdf5":
            with h5py.File(path) as file:
                return _read_hdf5(file)
        with zipfile.ZipFile(path) as archive:
            content = io.BytesIO(archive.read(_KERAS_WEIGHTS))
            config = archive.read("config.json").decode()
        with h5py.File(content) as file:
            weights = _read_hdf5(file)
        weights.config = config
        return weights
    except _OutsideDataError as error:
        raise ValueError(f"{path}: refused, because {error}") from None
    except Exception as error:  # a damaged file can fail in any way
        name = ".keras" if file_format == "keras" else "HDF5"
        raise ValueError(f"{path}: not a readable {name} file, or damaged ({error})") from None


class _OutsideDataError(ValueError):
    """A file takes its data from other files."""


def _read_hdf5(file: Any) -> WeightFile:
    tensors, names = {}, {}

    def read(path: str, item: Any) -> None:
        key = path.replace("/", ".")
        if not hasattr(item, "shape"):
            name = item.attrs.get("name")
            if isinstance(name, str):
                names[key] = name
            return
        if item.external or item.is_virtual:
            raise _OutsideDataError(f"{path} takes its numbers from another file")
        tensor = _to_tensor(numpy.asarray(item[()]))
        if tensor is not None:
            tensors[key.removesuffix(":0")] = tensor

    file.visititems(read)  # doesn't follow links to other files
    config = file.attrs.get("model_config")
    config = config.decode() if isinstance(config, bytes) else config
    return WeightFile(tensors, names, config if isinstance(config, str) else None)


def _to_tensor(array: numpy.ndarray[Any, Any]) -> Tensor | None:
    """Copy an array to a tensor; None if it doesn't hold numbers."""
    if array.dtype.kind not in "fiub":
        return None
    return torch.from_numpy(numpy.array(array, array.dtype.newbyteorder("=")))


def _flatten_tensors(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield prefix, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            if isinstance(key, str):
                yield from _flatten_tensors(value, f"{prefix}.{key}" if prefix else key)
