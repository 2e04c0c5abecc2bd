"""Score a large folder of sequences on all cores, or on many machines, with Dask.

    python examples/digits.py
    python examples/score_folder.py runs/digits_lstm.pt FOLDER --out scores
    python examples/score_folder.py runs/digits_lstm.pt FOLDER --out scores --scheduler tcp://HOST:8786

FOLDER holds a sequence a file, ``.npy`` of shape (rows, 8): pictures of any height, which the layer of
digits.py names. Files are scored in parts, the sequences of a part padded to one batch with their lengths.
Each part becomes a table of its own, written whole or not at all: the same command goes on after a crash,
with the parts that are missing. On many machines, of a cluster that Dask runs on, all see the same folders.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dask import distributed
from rich.console import Console
from rich.progress import track
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import unrolled as ur

KINDS: dict[str, Any] = {"rnn": ur.RNN, "gru": ur.GRU, "lstm": ur.LSTM}


def score(part: tuple[Path, list[Path]], trained: dict[str, Any]) -> int:
    """Name the pictures of a part and write its table; how many there were."""
    torch.set_num_threads(1)  # Dask runs a worker on each core
    table, files = part
    kind, hidden = KINDS[trained["settings"]["cell"]], trained["settings"]["hidden"]
    layer, name_it = kind(8, hidden, batch_first=True), nn.Linear(hidden, 10)
    nn.ModuleDict({"layer": layer, "name_it": name_it}).load_state_dict(trained["model"])
    pictures = [torch.from_numpy(np.load(file)).float() for file in files]
    for file, picture in zip(files, pictures, strict=True):
        if picture.dim() != 2 or picture.shape[1] != 8 or not len(picture):
            raise ValueError(f"{file} should hold rows of 8 pixels, got an array of {tuple(picture.shape)}")
    lengths = torch.tensor([len(picture) for picture in pictures])
    with torch.no_grad():
        output, _ = layer(pad_sequence(pictures, batch_first=True), lengths=lengths)
        sure, digits = name_it(output[torch.arange(len(files)), lengths - 1]).softmax(-1).max(-1)
    beside = table.with_suffix(f".{os.getpid()}")
    rows = zip([file.name for file in files], digits.tolist(), sure.tolist(), strict=True)
    with beside.open("w", newline="") as text:
        csv.writer(text).writerows([("file", "digit", "sure"), *rows])
    beside.replace(table)
    return len(files)


def table_of(number: int, files: list[Path]) -> str:
    """The name of a part's table: another one where the part holds other files."""
    names = "\n".join(file.name for file in files)
    return f"part-{number:06}-{hashlib.sha256(names.encode()).hexdigest()[:8]}.csv"


def main() -> None:
    """Give out the parts that are missing, and tell how far it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="what digits.py wrote")
    parser.add_argument("folder", type=Path, help="with a sequence a file")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables")
    parser.add_argument("--part", type=int, default=1000, help="sequences of a part (1000)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes on this machine")
    parser.add_argument("--scheduler", help="address of a Dask cluster, in the place of this machine")
    given = parser.parse_args()
    trained = torch.load(given.checkpoint, weights_only=True)
    files = sorted(given.folder.absolute().glob("*.npy"))
    given.out.mkdir(parents=True, exist_ok=True)
    if not files:
        raise ValueError(f"{given.folder} holds no .npy file")
    groups = [files[k : k + given.part] for k in range(0, len(files), given.part)]
    parts = [(given.out.absolute() / table_of(k, group), group) for k, group in enumerate(groups)]
    missing = [part for part in parts if not part[0].exists()]
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{len(files)} sequences in {len(parts)} parts, {len(missing)} parts to be scored")
    scored = run(missing, trained, given.scheduler, given.workers) if missing else 0
    console.print(f"{scored} sequences scored; the tables are in {given.out}")


def run(
    parts: list[tuple[Path, list[Path]]], trained: dict[str, Any], scheduler: str | None, workers: int
) -> int:
    """Have the workers of a cluster, or processes here, score parts; how many sequences there were."""
    here = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None}
    scored, console = 0, Console(stderr=True)
    dask: Any = distributed  # without types
    with dask.Client(scheduler, **({} if scheduler else here)) as client:
        shared = client.scatter({"model": trained["model"], "settings": trained["settings"]}, broadcast=True)
        futures = client.map(score, parts, trained=shared, pure=False)
        for future in track(dask.as_completed(futures), "scoring", len(parts), console=console):
            scored += future.result()
    return scored


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
