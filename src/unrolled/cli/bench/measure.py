"""One row measured: every runtime checked against torch, then those that agree timed in turn."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from unrolled.cli.bench.grid import Row
from unrolled.cli.bench.limits import Limits
from unrolled.cli.bench.peers import FROZEN, OURS, TORCH, Peer, quietly
from unrolled.cli.bench.timing import interleave
from unrolled.cli.bench.work import TOLERANCE, Call, Work, difference

_SLACK = 2  # times torch's own error, where roundings grow


def measure(row: Row, peers: Mapping[str, Peer], seconds: float, limits: Limits) -> dict[str, Any]:
    """The entry of a row in the results.

    Args:
        row: what to compute.
        peers: on what, by name; torch is among them.
        seconds: of timing for each runtime.
        limits: of the machine.

    Returns:
        The row's sizes; ``runtimes``: for each its median ``seconds``, ``quartiles``, ``calls`` and
        ``difference`` from torch, or its ``trouble`` in words; ``ratio_to_torch``, ``best_other`` and
        ``ratio_to_best_other``: how many times as long as ours they take, None where one was not
        timed; ``limit_seconds``, ``limit`` and ``share_of_limit``. In inference the other runtimes and
        the limit are set beside our layer with its weights frozen: they have been given theirs before.
    """
    found: dict[str, dict[str, Any]] = {}
    calls = _checked(row, peers, found)
    for name, timing in quietly(lambda: interleave(calls, seconds)).items():
        found[name] |= asdict(timing)
    took = {name: entry["seconds"] for name, entry in found.items() if "seconds" in entry}
    others = {name: value for name, value in took.items() if name not in (OURS, FROZEN, TORCH)}
    best = min(others, key=others.__getitem__, default=None)
    floor, why = limits.of(row)
    ours = took.get(OURS)
    # in inference the others have been given their weights before, too; a stream of ours has them as well
    alike = took.get(FROZEN, ours) if row.mode == "inference" else ours
    return {
        **asdict(row),
        "input": row.input,
        "runtimes": found,
        "ratio_to_torch": took[TORCH] / ours if ours and TORCH in took else None,
        "best_other": best,
        "ratio_to_best_other": others[best] / alike if alike and best else None,
        "limit_seconds": floor,
        "limit": why,
        "share_of_limit": floor / alike if alike else None,
    }


def _checked(row: Row, peers: Mapping[str, Peer], found: dict[str, dict[str, Any]]) -> dict[str, Call]:
    """The calls of the runtimes that agree with torch; the others' trouble goes into ``found``."""
    work = Work(row)
    calls: dict[str, Call] = {}
    expected = quietly(lambda: peers[TORCH].prepare(work)())
    for name, peer in peers.items():
        why = peer.refuses(row)
        if why is not None:
            found[name] = {"trouble": why, "refused": True}
            continue
        try:
            call: Call = quietly(functools.partial(peer.prepare, work))
            made = quietly(call)
            apart = difference(made, expected)
            agrees = apart <= TOLERANCE[row.mode] or _is_as_exact(made, expected, work)
        except Exception as error:  # another library may raise anything
            found[name] = {"trouble": f"failed: {_first_line(error)}", "refused": False}
            continue
        if agrees:
            found[name], calls[name] = {"difference": apart}, call
        else:
            shown = "NaN" if math.isnan(apart) else f"{apart:.0e} of the largest magnitude"
            found[name] = {"trouble": f"disagrees with torch: {shown}", "refused": False}
    return calls


def _is_as_exact(made: Any, expected: Any, work: Work) -> bool:
    """Whether a result is as near to float64 as torch's own: some cells make roundings grow over time."""
    exact = quietly(work.exact)
    return difference(made, exact) <= _SLACK * difference(expected, exact)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"
