"""Check the random cells of a range of seeds, and shorten those that fail.

Each result is saved at once, as a line of JSON. The same command continues where it stopped. It repeats cells
that failed if the code has changed since then.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))

from fuzz.check import Outcome, reason  # noqa: E402
from fuzz.program import random_program  # noqa: E402
from fuzz.shrink import failure_kind, shrink  # noqa: E402
from fuzz.worker import Worker  # noqa: E402
from helpers.sanitizers import MEMORY, archs, environment  # noqa: E402

BATCH = 24  # cells whose kernels are compiled together
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unrolled-fuzz"
Record = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Return 1 if a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0:100", metavar="FROM:TO", help="range of seeds (default 0:100)")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes (default 1)")
    parser.add_argument("--optimize", default="-O1", help="flag of the C++ compiler (default -O1)")
    parser.add_argument(
        "--sanitize", action="store_true", help="check memory accesses and undefined behavior"
    )
    parser.add_argument("--results", type=Path, help=f"file with the results (default in {CACHE})")
    parser.add_argument(
        "--shrink", type=int, default=10, help="number of failing cells to shorten (default 10)"
    )
    options = parser.parse_args(arguments)
    first, last = map(int, options.seeds.split(":"))
    commit = _commit()
    results: Path = options.results or CACHE / ("sanitized.jsonl" if options.sanitize else "results.jsonl")
    results.parent.mkdir(parents=True, exist_ok=True)
    done = {seed: record for seed, record in _read(results).items() if first <= seed < last}
    seeds = [
        seed
        for seed in range(first, last)
        if seed not in done or (_failed(done[seed]) and done[seed]["commit"] != commit)
    ]
    variables = environment(MEMORY, CACHE / "sanitized-kernels", archs()[-1]) if options.sanitize else {}
    batches = [seeds[k : k + BATCH] for k in range(0, len(seeds), BATCH)]
    workers = [Worker(options.optimize, variables) for _ in range(options.jobs)]

    def save(record: Record) -> None:
        done[record["seed"]] = record
        with results.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def run(number: int) -> None:
        for batch in batches[number :: options.jobs]:
            for seed, outcome in zip(
                batch, workers[number].check_all(list(map(random_program, batch))), strict=True
            ):
                save({"seed": seed, "commit": commit, **vars(outcome)})
            print(_summary(done.values()), flush=True)

    try:
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(run, range(options.jobs)))
        for record in _to_shrink(list(done.values()), options.shrink):
            outcome = Outcome(record["status"], record["message"])
            program, outcome = shrink(random_program(record["seed"]), outcome, workers[0].check_all)
            save({**record, **vars(outcome), "program": str(program)})
    finally:
        for worker in workers:
            worker.close()
    failed = [record for record in done.values() if _failed(record)]
    for record in failed:
        print(f"\nseed {record['seed']} {record['status']}: {record['message']}\n{record.get('program', '')}")
    print()
    for name, number in Counter(record["commit"] for record in done.values()).items():
        print(f"commit {name}: {number}")
    print(_summary(done.values()))
    for name, unit in {"capture_seconds": "s", "kernel_length": "characters"}.items():
        record = max(done.values(), key=lambda record: record.get(name) or 0, default={})
        if record.get(name):
            print(f"largest {name}: {record[name]} {unit} (seed {record['seed']})")
    refusals = Counter(reason(record["message"]) for record in done.values() if record["status"] == "refused")
    for text, count in refusals.most_common():
        print(f"{count:6} refused: {text}")
    return int(bool(failed))


def _failed(record: Record) -> bool:
    return Outcome(record["status"]).failed


def _to_shrink(records: Iterable[Record], count: int) -> list[Record]:
    """Return the records of failed cells to shorten, those with a new kind of failure first."""
    kinds = Counter[str]()
    ranked = []
    for record in filter(_failed, records):
        kind = failure_kind(Outcome(record["status"], record["message"]))
        kinds[kind] += 1
        ranked.append((kinds[kind], record["seed"], record))
    return [record for _, _, record in sorted(ranked)[:count] if "program" not in record]


def _read(results: Path) -> dict[int, Record]:
    """Return the last record of each seed. A line that was cut off is ignored."""
    records = {}
    for line in results.read_text().splitlines() if results.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        records[record["seed"]] = record
    return records


def _summary(records: Iterable[Record]) -> str:
    counts = Counter(record["status"] for record in records)
    return f"{counts.total()} tried: " + ", ".join(
        f"{count} {status}" for status, count in counts.most_common()
    )


def _commit() -> str:
    """Return the short hash of the commit, with a + if files of the library have changed."""
    git = ["git", "-C", str(TESTS)]
    commit = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "../src"]).returncode
    return f"{commit or 'unknown'}{'+' if changed else ''}"


if __name__ == "__main__":
    sys.exit(main())
