"""``unrolled bench --threads 1,2,4``: the time of each row by number of threads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.layer_pairs import NEEDS_COMPILER
from unrolled.cli import main
from unrolled.cli.bench import disturbance


@pytest.mark.slow
@NEEDS_COMPILER
def test_several_numbers_of_threads(capsys: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(disturbance, "MAX_SLOWDOWN", float("inf"))  # the machine may be busy
    path, plot, before = tmp_path / "scaling.json", tmp_path / "scaling.svg", torch.get_num_threads()
    sizes = ["--batch", "2", "--hidden", "8", "--time", "3", "--seconds", "0.001", "--mode", "inference"]
    files = ["--json", str(path), "--plot", str(plot)]
    assert main.main(["bench", "--cells", "lstm,mgu", *sizes, "--threads", "1,2,1,64", *files]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert torch.get_num_threads() == before
    assert "more threads than that take turns" in out
    assert "<svg" in plot.read_text()
    document = json.loads(path.read_text())
    assert document["setup"]["threads"] == [1, 2, 64]
    assert [row["cell"] for row in document["rows"]] == ["lstm", "mgu"]
    for row in document["rows"]:
        for name in ("unrolled", "torch"):
            labels = [f"{name}, {count} thread{'s' * (count > 1)}" for count in (1, 2, 64)]
            times = [row["runtimes"][label]["seconds"] for label in labels]
            assert row["speedups"][name] == [times[0] / one for one in times]
            assert f"{times[0] / times[1]:.2f}" in out
