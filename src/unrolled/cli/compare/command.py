"""``unrolled compare``: what the user asks for, and the runs from the first to the table."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from unrolled.cli.arguments import (
    CELL_HELP,
    CELLS,
    NAMED,
    OPTION_HELP,
    UsageError,
    check_options,
    check_written,
    new_console,
    parse_cell,
    parse_options,
    positive,
    printable,
    whole_number,
    words,
)
from unrolled.cli.compare import picture, report
from unrolled.cli.compare.catalogue import TASKS
from unrolled.cli.compare.runs import Run
from unrolled.cli.compare.training import Budget, Contender, Model, train, units_for
from unrolled.io import files
from unrolled.io.state_dicts import takes

_ALL = "all"


def add(commands: Any) -> None:
    """Add the command to those of an argparse parser."""
    parser = commands.add_parser(
        "compare",
        help="cells trained on standard tasks with the same budget",
        description="Train cells on standard tasks: with as many parameters, as many steps, the same "
        "optimiser, data and seeds. A run that has ended is kept in a file and not trained again: after "
        "Ctrl-C the same command goes on.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--cells",
        type=words,
        default=list(CELLS),
        metavar="LIST",
        help=f"{CELL_HELP}, or all of unrolled.cells (default: {','.join(CELLS)})",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"{OPTION_HELP}, of each cell that has it",
    )
    parser.add_argument(
        "--tasks",
        type=words,
        metavar="LIST",
        help=f"{', '.join(TASKS)} (default: all whose data is installed)",
    )
    parser.add_argument(
        "--seeds", type=whole_number, default=3, metavar="N", help="runs of each (default: 3)"
    )
    parser.add_argument("--steps", type=whole_number, metavar="N", help=f"of training{_defaults('steps')}")
    parser.add_argument(
        "--batch", type=whole_number, default=32, metavar="N", help="sequences a step (default: 32)"
    )
    parser.add_argument("--rate", type=positive, default=0.01, help="learning rate of Adam (default: 0.01)")
    parser.add_argument(
        "--layers", type=whole_number, default=1, metavar="N", help="of each model (default: 1)"
    )
    parser.add_argument(
        "--length", type=whole_number, metavar="N", help=f"time steps{_defaults('length')}; copy: of the wait"
    )
    parser.add_argument(
        "--parameters",
        type=whole_number,
        metavar="N",
        help=f"of each model, as near as its number of units allows{_defaults('parameters')}",
    )
    parser.add_argument(
        "--threads",
        type=whole_number,
        default=1,
        metavar="N",
        help="of torch (default: 1: the models are small)",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs/compare"),
        metavar="FOLDER",
        help="where to keep each run (default: runs/compare)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all results")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="where to draw them: .png, .svg or .pdf")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        UsageError, TypeError, ValueError: what is asked for can't be done, in one sentence.
        OSError: a file can't be read or written.
    """
    check_written(options.json, options.plot)
    contenders = _contenders(options)
    runs = _planned(options, contenders)
    options.runs.mkdir(parents=True, exist_ok=True)
    data = report.document(_ended(runs, options.runs))
    console = new_console()
    report.say(console, data)
    if options.json:
        files.write_json(data, options.json)
    if options.plot:
        picture.draw(data, options.plot)
    written = ", ".join(str(path) for path in (options.json, options.plot) if path)
    console.print(f"Written: {written}" if written else "--json FILE and --plot FILE keep this.")


def _contenders(options: argparse.Namespace) -> list[Contender]:
    """Each cell with the options that it has."""
    given = parse_options(options.option)
    if options.cells == [_ALL]:
        cells = list(NAMED.values())
    else:
        cells = list(dict.fromkeys(parse_cell(text, "--cells") for text in options.cells))
    names = [cell.__name__ for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--cells: there are two that are called {name}: give one another name")
    check_options(given, cells)
    return [
        Contender(cell, {name: value for name, value in given.items() if takes(cell, name, value)})
        for cell in cells
    ]


def _planned(options: argparse.Namespace, contenders: list[Contender]) -> list[Run]:
    """The runs, task by task and seed by seed: the cells of one seed see the same data."""
    planned = []
    for name in _names(options.tasks):
        entry = TASKS[name]
        length = options.length or entry.length
        task = entry.make(length)
        parameters, steps = options.parameters or entry.parameters, options.steps or entry.steps
        budget = Budget(parameters, steps, options.batch, options.rate, options.layers, options.threads)
        planned += [
            Run(contender, name, length, task, budget, seed)
            for seed in range(options.seeds)
            for contender in contenders
        ]
    return planned


def _names(asked: list[str] | None) -> list[str]:
    """The tasks that are asked for, or all whose data is here; what is missing is said."""
    for name in asked or ():
        if name not in TASKS:
            raise UsageError(f"--tasks: there is no task {name!r}: there are {', '.join(TASKS)}")
        if TASKS[name].missing:
            raise UsageError(f"--tasks: {name} needs {TASKS[name].needs}: {TASKS[name].install}")
    if asked:
        return list(dict.fromkeys(asked))
    for name, entry in TASKS.items():
        if entry.missing:
            print(f"unrolled: left out: {name}, which needs {entry.needs}: {entry.install}", file=sys.stderr)
    return [name for name, entry in TASKS.items() if not entry.missing]


def _check(run: Run) -> None:
    """Raise, before anything is trained, where a cell has no such size or its step fails."""
    units = units_for(run.contender, run.task, run.budget)
    x, target = run.task.sample(2, torch.Generator().manual_seed(0))
    try:
        with torch.random.fork_rng([]):
            loss = run.task.loss(Model(run.contender, run.task, units, run.budget.layers)(x), target)
            torch.autograd.backward(loss)
    except Exception as error:  # the user's own code may raise anything
        raise UsageError(
            f"--cells: {run.cell} can't be trained on {run.name} ({type(error).__name__}: {error})"
        ) from error


def _ended(runs: list[Run], folder: Path) -> list[tuple[Run, dict[str, Any]]]:
    """Every run with its result: read where it is kept, else trained and kept."""
    try:
        _train([run for run in runs if run.load(folder) is None], folder)
    except KeyboardInterrupt:
        done = f"{sum(run.load(folder) is not None for run in runs)} of {len(runs)} runs are kept in {folder}"
        again = "the same command goes on from there"
        print(f"unrolled: stopped: {printable(done)}, {again}", file=sys.stderr)
        raise
    return [(run, kept) for run in runs if (kept := run.load(folder)) is not None]


def _train(waiting: list[Run], folder: Path) -> None:
    """Train runs, one after another, and keep their results."""
    for one in {(run.name, run.cell): run for run in waiting}.values():
        _check(one)
    shown, percent = Console(stderr=True), TextColumn("{task.percentage:.0f} %")
    columns = (TextColumn("{task.description}"), BarColumn(), percent, TimeRemainingColumn())
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as progress:
        bar = progress.add_task("", total=sum(run.budget.steps for run in waiting))
        for place, run in enumerate(waiting):
            progress.update(bar, description=f"{run.label} ({place + 1} of {len(waiting)})")
            result = train(run.contender, run.task, run.budget, run.seed, partial(progress.advance, bar))
            run.save(folder, result)
            progress.update(bar, completed=sum(run.budget.steps for run in waiting[: place + 1]))


def _defaults(of: str) -> str:
    return f" (default: {', '.join(f'{name} {getattr(entry, of)}' for name, entry in TASKS.items())})"
