"""Classify a large folder of sequences on all cores, or on many machines, with Dask.

    python examples/digits.py
    python examples/score_folder.py runs/digits_lstm.pt FOLDER --out scores
    python examples/score_folder.py runs/digits_lstm.pt FOLDER --out scores --scheduler tcp://HOST:8786

FOLDER contains one sequence per file, a ``.npy`` array of shape (rows, 8): images of any height, which the
layer trained by digits.py classifies. The files are processed in parts. The sequences of a part are padded to
one batch, with their lengths. Each part gives one table, which is written atomically. After a crash, rerun
the command to process the missing parts. On several machines, all workers must see the same folders.
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

LAYER_CLASSES: dict[str, Any] = {"rnn": ur.RNN, "gru": ur.GRU, "lstm": ur.LSTM}


def score(part: tuple[Path, list[Path]], trained: dict[str, Any]) -> int:
    """Classify the images of a part, write its table and return the number of images."""
    torch.set_num_threads(1)  # Dask runs a worker on each core
    table, files = part
    layer_class, hidden = LAYER_CLASSES[trained["settings"]["cell"]], trained["settings"]["hidden"]
    layer, head = layer_class(8, hidden, batch_first=True), nn.Linear(hidden, 10)
    nn.ModuleDict({"layer": layer, "head": head}).load_state_dict(trained["model"])
    images = [torch.from_numpy(np.load(file)).float() for file in files]
    for file, image in zip(files, images, strict=True):
        if image.dim() != 2 or image.shape[1] != 8 or not len(image):
            raise ValueError(f"{file}: expected an array of shape (rows, 8), got {tuple(image.shape)}")
    lengths = torch.tensor([len(image) for image in images])
    with torch.no_grad():
        output, _ = layer(pad_sequence(images, batch_first=True), lengths=lengths)
        probabilities, digits = head(output[torch.arange(len(files)), lengths - 1]).softmax(-1).max(-1)
    temporary = table.with_suffix(f".{os.getpid()}")
    rows = zip([file.name for file in files], digits.tolist(), probabilities.tolist(), strict=True)
    with temporary.open("w", newline="") as text:
        csv.writer(text).writerows([("file", "digit", "sure"), *rows])
    temporary.replace(table)
    return len(files)


def table_name(number: int, files: list[Path]) -> str:
    """Return the name of a part's table. It contains a hash of the file names."""
    names = "\n".join(file.name for file in files)
    return f"part-{number:06}-{hashlib.sha256(names.encode()).hexdigest()[:8]}.csv"


def main() -> None:
    """Process the missing parts and print the progress."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint written by digits.py")
    parser.add_argument("folder", type=Path, help="folder with one sequence per file")
    parser.add_argument("--out", type=Path, required=True, help="output folder for the tables")
    parser.add_argument("--part", type=int, default=1000, help="sequences per part (default: 1000)")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count(),
        help="processes on this machine (default: one per core)",
    )
    parser.add_argument("--scheduler", help="address of a Dask cluster to use instead of this machine")
    args = parser.parse_args()
    trained = torch.load(args.checkpoint, weights_only=True)
    files = sorted(args.folder.absolute().glob("*.npy"))
    args.out.mkdir(parents=True, exist_ok=True)
    if not files:
        raise ValueError(f"{args.folder} has no .npy file")
    groups = [files[k : k + args.part] for k in range(0, len(files), args.part)]
    parts = [(args.out.absolute() / table_name(k, group), group) for k, group in enumerate(groups)]
    missing = [part for part in parts if not part[0].exists()]
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{len(files)} sequences in {len(parts)} parts, {len(missing)} parts left")
    scored = run(missing, trained, args.scheduler, args.workers) if missing else 0
    console.print(f"Classified {scored} sequences; the tables are in {args.out}.")


def run(
    parts: list[tuple[Path, list[Path]]], trained: dict[str, Any], scheduler: str | None, workers: int
) -> int:
    """Classify parts on a cluster or in local processes; return the number of sequences."""
    local = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None}
    scored, console = 0, Console(stderr=True)
    dask: Any = distributed  # untyped
    with dask.Client(scheduler, **({} if scheduler else local)) as client:
        shared = client.scatter({"model": trained["model"], "settings": trained["settings"]}, broadcast=True)
        futures = client.map(score, parts, trained=shared, pure=False)
        for future in track(dask.as_completed(futures), "classifying", len(parts), console=console):
            scored += future.result()
    return scored


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
