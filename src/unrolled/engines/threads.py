"""The number of threads that compiled loops use."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

_GROUPS = Path("/proc/self/cgroup")  # the control groups of this process
_MOUNT = Path("/sys/fs/cgroup")


def thread_count() -> int:
    """Return torch's number of threads, or the number of cores that this process may use if that is lower.

    Torch doesn't know of a container's CPU quota. Threads above the quota would spend their time waiting for
    threads that the system has suspended.
    """
    threads, limit = torch.get_num_threads(), core_limit()
    return threads if limit is None or threads < limit else limit


@functools.cache
def core_limit() -> int | None:
    """Return how many cores this process may use, or None if it may use all cores of the machine.

    Its affinity mask, a cpuset and the CPU quotas of Linux control groups (versions 1 and 2) can limit it.
    """
    cores = os.cpu_count() or 1
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    limits = [len(affinity(0))] if affinity else []
    limits += [max(1, -(-quota // period)) for quota, period in _quotas()]
    lowest = min(limits, default=cores)
    return lowest if lowest < cores else None


def _quotas() -> list[tuple[int, int]]:
    """Return the CPU quotas of this process's control groups and their parents: microseconds per period."""
    quotas = []
    for folder in _group_folders():
        try:
            v2 = folder / "cpu.max"
            if v2.exists():
                quota, period = v2.read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if quota != "max" and int(quota) > 0 and int(period) > 0:  # -1: no limit
                quotas.append((int(quota), int(period)))
        except (OSError, ValueError):  # a group without a CPU controller
            continue
    return quotas


def _group_folders() -> list[Path]:
    """Return the folders with the settings of this process's control groups and their parents."""
    try:
        lines = _GROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return []
    folders: dict[Path, None] = {}
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            roots = [_MOUNT, _MOUNT / "unified"]
        elif "cpu" in controllers.split(","):
            roots = [_MOUNT / controllers, _MOUNT / "cpu"]
        else:
            continue
        for root in roots:
            path = root / group.lstrip("/")
            # Inside of a container, the path may name a folder of the host; then the root holds the settings.
            folders |= dict.fromkeys(f for f in (path, *path.parents) if f == root or root in f.parents)
    return list(folders)
