"""``unrolled compare``: parse its arguments, train all runs and print the results."""

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
    ALL_CELLS,
    CELL_HELP,
    OPTION_HELP,
    TORCH_CELLS,
    UsageError,
    check_options,
    check_output_files,
    comma_separated,
    new_console,
    parse_cell,
    parse_options,
    positive_float,
    positive_int,
    printable,
)
from unrolled.cli.compare import chart, report
from unrolled.cli.compare.runs import Run
from unrolled.cli.compare.tasks import TASKS
from unrolled.cli.compare.training import Budget, CellConfig, Model, train, units_for
from unrolled.io import files
from unrolled.io.state_dicts import accepts_option

_ALL = "all"


def add(commands: Any) -> None:
    """Add the command to the subparsers of an argument parser."""
    parser = commands.add_parser(
        "compare",
        help="train cells on standard tasks and compare their scores",
        description="Train cells on standard tasks and compare their scores. All cells get the same number "
        "of parameters and steps, and the same optimizer, data and seeds. Finished runs are saved in the "
        "--runs folder; after Ctrl-C, rerun the command to resume.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--cells",
        type=comma_separated,
        default=list(TORCH_CELLS),
        metavar="LIST",
        help=f"cells to train: {CELL_HELP}. Use all for every cell in unrolled.cells "
        f"(default: {','.join(TORCH_CELLS)})",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"{OPTION_HELP}; applies to all cells that have it",
    )
    parser.add_argument(
        "--tasks",
        type=comma_separated,
        metavar="LIST",
        help=f"tasks: one or more of {', '.join(TASKS)} (default: all tasks whose data is installed; the "
        "others are skipped with a note)",
    )
    parser.add_argument(
        "--seeds",
        type=positive_int,
        default=3,
        metavar="N",
        help="runs per cell and task, each with its own seed (default: 3)",
    )
    parser.add_argument(
        "--steps", type=positive_int, metavar="N", help=f"training steps{_format_defaults('steps')}"
    )
    parser.add_argument(
        "--batch", type=positive_int, default=32, metavar="N", help="batch size (default: 32)"
    )
    parser.add_argument(
        "--rate", type=positive_float, default=0.01, help="initial learning rate for Adam (default: 0.01)"
    )
    parser.add_argument(
        "--layers", type=positive_int, default=1, metavar="N", help="number of stacked layers (default: 1)"
    )
    parser.add_argument(
        "--length",
        type=positive_int,
        metavar="N",
        help=f"sequence length{_format_defaults('length')}; for copy, the number of steps "
        "between the symbols and their repetition",
    )
    parser.add_argument(
        "--parameters",
        type=positive_int,
        metavar="N",
        help="number of parameters of each model; the hidden size that comes closest is used"
        f"{_format_defaults('parameters')}",
    )
    parser.add_argument(
        "--threads",
        type=positive_int,
        default=1,
        metavar="N",
        help="number of torch threads (default: 1, because the models are small)",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs/compare"),
        metavar="FOLDER",
        help="folder for finished runs (default: runs/compare)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to a JSON file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="chart to write: .png, .svg or .pdf")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        UsageError, TypeError, ValueError: If the arguments can't be used.
        OSError: If a file can't be read or written.
    """
    check_output_files(options.json, options.plot)
    configs = _cell_configs(options)
    runs = _plan_runs(options, configs)
    options.runs.mkdir(parents=True, exist_ok=True)
    data = report.document(_finish_runs(runs, options.runs))
    console = new_console()
    report.print_report(console, data)
    if options.json:
        files.write_json(data, options.json)
    if options.plot:
        chart.draw(data, options.plot)
    written = ", ".join(str(path) for path in (options.json, options.plot) if path)
    console.print(f"Wrote {written}" if written else "To save the results, use --json FILE or --plot FILE.")


def _cell_configs(options: argparse.Namespace) -> list[CellConfig]:
    """Return each cell with those of the given options that it has."""
    cell_options = parse_options(options.option)
    if options.cells == [_ALL]:
        cells = list(ALL_CELLS.values())
    else:
        cells = list(dict.fromkeys(parse_cell(text, "--cells") for text in options.cells))
    names = [cell.__name__ for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--cells: two cells are named {name}; rename one of them")
    check_options(cell_options, cells)
    return [
        CellConfig(
            cell, {name: value for name, value in cell_options.items() if accepts_option(cell, name, value)}
        )
        for cell in cells
    ]


def _plan_runs(options: argparse.Namespace, configs: list[CellConfig]) -> list[Run]:
    """Return all runs, ordered by task and seed. All cells with the same seed see the same data."""
    runs = []
    for name in _select_tasks(options.tasks):
        entry = TASKS[name]
        length = options.length or entry.length
        task = entry.create(length)
        parameters, steps = options.parameters or entry.parameters, options.steps or entry.steps
        budget = Budget(parameters, steps, options.batch, options.rate, options.layers, options.threads)
        runs += [
            Run(config, name, length, task, budget, seed)
            for seed in range(options.seeds)
            for config in configs
        ]
    return runs


def _select_tasks(names: list[str] | None) -> list[str]:
    """Return the named tasks, or all whose data is installed; print a note on the others."""
    for name in names or ():
        if name not in TASKS:
            raise UsageError(f"--tasks: expected one or more of {', '.join(TASKS)}, got {name!r}")
        if TASKS[name].missing:
            raise UsageError(f"--tasks: {name} needs {TASKS[name].package}: {TASKS[name].install}")
    if names:
        return list(dict.fromkeys(names))
    for name, entry in TASKS.items():
        if entry.missing:
            print(f"unrolled: skipped {name}, which needs {entry.package}: {entry.install}", file=sys.stderr)
    return [name for name, entry in TASKS.items() if not entry.missing]


def _check_trainable(run: Run) -> None:
    """Raise an error, before any training, if no hidden size fits the budget or the step fails."""
    units = units_for(run.config, run.task, run.budget)
    x, target = run.task.sample(2, torch.Generator().manual_seed(0))
    try:
        with torch.random.fork_rng([]):
            loss = run.task.loss(Model(run.config, run.task, units, run.budget.layers)(x), target)
            torch.autograd.backward(loss)
    except Exception as error:  # user code can raise anything
        raise UsageError(
            f"--cells: can't train {run.cell_name} on {run.task_name} ({type(error).__name__}: {error})"
        ) from error


def _finish_runs(runs: list[Run], folder: Path) -> list[tuple[Run, dict[str, Any]]]:
    """Return every run with its stored result, after training those that have none."""
    try:
        _train_runs([run for run in runs if run.load(folder) is None], folder)
    except KeyboardInterrupt:
        saved = sum(run.load(folder) is not None for run in runs)
        status = f"stopped; {saved} of {len(runs)} runs are saved in {folder}"
        print(f"unrolled: {printable(status)}. Rerun the command to resume.", file=sys.stderr)
        raise
    return [(run, stored) for run in runs if (stored := run.load(folder)) is not None]


def _train_runs(runs: list[Run], folder: Path) -> None:
    """Train runs one after another and save their results."""
    for run in {(run.task_name, run.cell_name): run for run in runs}.values():
        _check_trainable(run)
    progress_console, percent = Console(stderr=True), TextColumn("{task.percentage:.0f} %")
    columns = (TextColumn("{task.description}"), BarColumn(), percent, TimeRemainingColumn())
    disable = not progress_console.is_terminal
    with Progress(*columns, console=progress_console, transient=True, disable=disable) as progress:
        bar = progress.add_task("", total=sum(run.budget.steps for run in runs))
        for index, run in enumerate(runs):
            progress.update(bar, description=f"{run.label} ({index + 1} of {len(runs)})")
            result = train(run.config, run.task, run.budget, run.seed, partial(progress.advance, bar))
            run.save(folder, result)
            progress.update(bar, completed=sum(run.budget.steps for run in runs[: index + 1]))


def _format_defaults(field: str) -> str:
    return f" (default: {', '.join(f'{name} {getattr(entry, field)}' for name, entry in TASKS.items())})"
