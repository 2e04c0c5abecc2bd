"""A worker process, see ``workers.py``: reads tasks, and prints a line of JSON for each."""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import torch

from unrolled.cli.bench.gpu import checks, contenders, parity
from unrolled.cli.bench.rows import Row


def run_task(task: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Run a task: a comparison, a check, or the first call of a row, which compiles its kernels.

    Raises:
        torch.AcceleratorError: If the device can't continue.
    """
    try:
        if "parity" in task:
            one = parity.ParityTask(**task["parity"])
            difference, tolerance = parity.compare(one, device), parity.TOLERANCES[one.kind]
            # JSON has no NaN. A comparison with NaN is False, so it doesn't agree.
            within = difference <= tolerance
            return {"difference": difference if difference == difference else None, "agrees": within}
        if "check" in task:
            problem = checks.run(task["check"], device)
            return {"problem": problem} if problem else {"agrees": True}
        contenders.warm_up(Row(**task["row"]), device)
    except Exception as error:
        if isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error):
            raise
        return {"problem": f"{type(error).__name__}: {str(error).strip()[:300]}"}
    return {"ready": True}


def main() -> None:
    """Run the tasks from standard input."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for task in json.load(sys.stdin):
        device = torch.device(task["device"])
        print(json.dumps(run_task(task, device)), flush=True)


if __name__ == "__main__":
    main()
