"""``unrolled bench``: what the user asks for, and the run from the limits to the last line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import unrolled
from unrolled.cli.arguments import check_written, positive, whole_number, words
from unrolled.cli.bench import apart, picture, report, results
from unrolled.cli.bench.grid import CELLS, MODES, STANDARD, Row, rows
from unrolled.cli.bench.limits import Limits
from unrolled.cli.bench.measure import measure
from unrolled.cli.bench.peers import CHECKPOINT, OURS, OWN, PEERS, TORCH, chosen
from unrolled.io import files

Task = tuple[str, Callable[[], None]]

_SECONDS = {False: 0.15, True: 1.0}  # of timing for each row and runtime: quick, full
_LONG = 1000  # time steps of the rows whose memory is measured
_MEMORY = {False: (8, 256), True: (32, 256)}  # their batch and hidden units: quick, full
_FIRST = ("compile-step", "compile")  # beside ours at the first use, where they are timed too
_FIRST_SIZES = (1, 100, 128)  # batch, time, hidden


def add(commands: Any) -> None:
    """Add the command to those of an argparse parser."""
    parser = commands.add_parser(
        "bench",
        help="our layers beside other runtimes on this machine",
        description="Time our layers beside other runtimes, after checking that they agree, and beside "
        "the limits of this machine.",
        allow_abbrev=False,
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a few rows, in under a minute (the default)")
    size.add_argument("--full", action="store_true", help="the whole grid but its largest corners: hours")
    parser.add_argument("--cells", type=_names(list(CELLS)), metavar="LIST", help=", ".join(CELLS))
    for name, what in (("batch", "rows of the batch"), ("hidden", "hidden units"), ("time", "time steps")):
        parser.add_argument(f"--{name}", type=_numbers, metavar="LIST", help=f"{what}, such as 1,32")
    parser.add_argument("--mode", choices=MODES, help="only this one")
    parser.add_argument("--seconds", type=positive, metavar="S", help="of timing for each row and runtime")
    known = [name for name in PEERS if name not in OWN]
    parser.add_argument("--peers", type=words, metavar="LIST", help=f"{', '.join(known)}, or none")
    parser.add_argument("--threads", type=whole_number, metavar="N", help="for all (default: torch's number)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the results, row by row")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are in --json already")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="where to draw them: .png, .svg or .pdf")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        ValueError: what is asked for can't be done, in one sentence.
        OSError: a file can't be written.
    """
    names = [] if options.peers == ["none"] else options.peers
    peers, missing = chosen(names, options.full)
    if options.resume and options.json is None:
        raise ValueError("--resume needs --json FILE")
    check_written(options.json, options.plot)
    planned = rows(options.full, options.cells, options.batch, options.hidden, options.time, options.mode)
    if not planned:
        raise ValueError("every row is too large for the grid: give --batch, --hidden and --time to time it")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(options.threads or before)
        kept = results.resumed(options.json) if options.resume else []
        with unrolled.engine("native"):
            _run(options, planned, peers, missing, kept)
    finally:
        torch.set_num_threads(before)


def _run(
    options: argparse.Namespace,
    planned: list[Row],
    peers: dict[str, Any],
    missing: list[str],
    kept: list[dict[str, Any]],
) -> None:
    seconds = options.seconds or _SECONDS[options.full]
    console = Console(highlight=False, markup=False, emoji=False)
    limits = Limits.measured(min(seconds, 0.3))
    document = results.start(limits.as_data(), missing)
    document["rows"] = kept
    console.print(report.limits(document["limits"]))

    def keep() -> None:
        document["means"] = results.means(document["rows"])
        if options.json:
            files.write_json(document, options.json)

    def one(row: Row) -> None:
        document["rows"].append(measure(row, peers, seconds, limits))

    keep()
    tasks: list[Task] = []
    for row in planned:
        if not results.done(kept, row):
            label = f"{row.cell} {row.batch}×{row.time}×{row.hidden} {row.mode}"
            tasks.append((label, partial(one, row)))
    tasks += _memory(options, planned, document["memory"])
    tasks += _first_use(planned, peers, document["first_use"])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    shown = Console(stderr=True)
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as progress:
        bar = progress.add_task("", total=len(tasks))
        for label, task in tasks:
            progress.update(bar, description=label)
            progress.refresh()
            task()
            keep()
            progress.advance(bar)
    report.say(console, document)
    if options.plot:
        picture.draw(document, options.plot)
    written = [str(path) for path in (options.json, options.plot) if path]
    console.print(f"Written: {', '.join(written)}" if written else "--json FILE and --plot FILE keep this.")


def _memory(options: argparse.Namespace, planned: list[Row], into: list[dict[str, Any]]) -> list[Task]:
    """Tasks: peak memory in training, ours and torch's, for every cell that is trained."""
    batch, hidden = _MEMORY[options.full]
    batch, hidden = max(options.batch or [batch]), max(options.hidden or [hidden])

    def task(cell: str) -> None:
        row = Row(cell, batch, _LONG, hidden, "training")
        entry: dict[str, Any] = {"cell": cell, "batch": batch, "time": _LONG, "hidden": hidden}
        for name in (OURS, CHECKPOINT, TORCH):
            try:
                entry[f"{name}_bytes"] = apart.peak_memory(row, name)
            except RuntimeError as error:
                entry |= {f"{name}_bytes": None, f"{name}_trouble": str(error)}
        into.append(entry)

    cells = _trained(planned)
    if not options.full:
        cells = [cell for cell in cells if cell in STANDARD][-1:]
    return [(f"memory, {cell}", partial(task, cell)) for cell in cells]


def _first_use(planned: list[Row], peers: dict[str, Any], into: list[dict[str, Any]]) -> list[Task]:
    """Tasks: what compiling takes at the first use, ours and torch.compile's, for every custom cell."""

    def task(row: Row, name: str) -> None:
        entry: dict[str, Any] = {"cell": row.cell, "time": row.time, "hidden": row.hidden, "runtime": name}
        try:
            into.append({**entry, "seconds": apart.first_use(row, name)})
        except RuntimeError as error:
            into.append({**entry, "seconds": None, "trouble": str(error)})

    batch, time, hidden = _FIRST_SIZES
    return [
        (f"first use, {cell}, {name}", partial(task, Row(cell, batch, time, hidden, "training"), name))
        for cell in _trained(planned)
        if cell not in STANDARD
        for name in (OURS, *(name for name in _FIRST if name in peers))
    ]


def _trained(planned: list[Row]) -> list[str]:
    return list(dict.fromkeys(row.cell for row in planned if row.mode == "training"))


def _names(known: list[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        for name in (names := words(text)):
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return parse


def _numbers(text: str) -> list[int]:
    return [whole_number(part) for part in text.split(",")]
