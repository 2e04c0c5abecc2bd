"""``UNROLLED_LOG``: the output of each stage, from programs in new processes."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from helpers import processes
from helpers.layer_pairs import NEEDS_COMPILER
from unrolled.engines import log

pytestmark = NEEDS_COMPILER
CODE = """
import torch, unrolled as ur
class Branching(ur.Cell):
    def step(self, x, h):
        return h + x if h.sum() > -1 else x
for layer in (ur.GRU(7, 5), ur.Recurrent(Branching, 5, 5)):
    layer(torch.randn(2, 3, layer.input_size))[0].sum().backward()
with ur.engine("reference"):
    ur.GRU(7, 5)(torch.randn(2, 3, 7))
"""

TRAINING = """
import sys, torch, unrolled as ur
class Mixed(ur.Cell):
    state = {"h": 5, "unread": 3, "read": 2}
    weight, scale = ur.Param("hidden", "hidden"), ur.Param("hidden")
    def step(self, x, h, unread, read):
        n = torch.tanh(h @ self.weight.softmax(-1)) * torch.sigmoid(self.scale)
        return n + x * (h > 0), 0.5 * unread, torch.sigmoid(read)
layer, x = ur.Recurrent(Mixed, 5, 5), torch.randn(4, 3, 5)
given = {tensor.data_ptr() for tensor in (x, *layer.parameters())}
packed = []
with torch.autograd.graph.saved_tensors_hooks(lambda tensor: packed.append(tensor) or tensor, lambda t: t):
    layer(x)
print("all:", sum(t.nbytes for t in packed if t.data_ptr() not in given), file=sys.stderr)
"""


def test_the_documentation_lists_the_stages() -> None:
    text = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")
    table = text.partition("### Log stages")[2].partition("\n#")[0]
    assert dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", table, re.MULTILINE)) == log.STAGES


def run_with_log(stages: str, cache: Path, code: str = CODE) -> tuple[str, dict[str, str]]:
    """Run a program with some stages logged, and return all of stderr, and the part of each stage."""
    environment = {**os.environ, "UNROLLED_CACHE": str(cache), "UNROLLED_LOG": stages}
    done = processes.run("-W", "ignore:Branching", "-c", code.replace(".backward()", ""), env=environment)
    assert done.returncode == 0, done.stderr
    parts = re.split(r"^unrolled\.(\w+): ", done.stderr, flags=re.MULTILINE)
    output: dict[str, str] = {}
    for stage, text in zip(parts[1::2], parts[2::2], strict=True):
        output[stage] = output.get(stage, "") + text
    return done.stderr, output


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "kernels"


@pytest.mark.slow
def test_all_stages_are_logged(cache: Path) -> None:
    _, output = run_with_log("graph, saved,kernel,emit,build,engine", cache)
    assert set(output) == {"graph", "saved", "kernel", "emit", "build", "engine"}

    graph = output["graph"]
    assert graph.startswith("GRU, torch.float32\nforward, before the loop, once for all time steps:\n")
    before, rest = graph.split("forward, in the loop:\n")
    inside, backward = rest.split("backward, in the loop:\n")
    loop, after = backward.split("backward, after the loop, once for all time steps:\n")
    assert re.search(r"mm = mm\(x, permute\) +\(B, 15\)\n", before)  # the input times its weight matrix
    assert re.search(r"mm\(h, permute_\w+\) +\(B, 15\)\n", inside)  # the hidden state times its weight matrix
    assert "carries h <- " in inside
    assert "tanh" in inside
    assert re.search(r"mm\(cat\w*, permute_\w+\) +\(B, 5\)\n", loop)
    assert re.search(
        r"mm\(slice\w*, h\) +\(10, 5\)\n", after
    )  # the gradient of weight_hh, for all time steps
    assert "1000003" not in graph

    assert output["kernel"].count("level 0") == 3  # for inference, and forward and backward for training
    assert output["emit"].count('#include "loop.h"') == 2  # forward and backward
    assert "EXPORT bool run(" in output["emit"]

    build = output["build"]
    names = re.findall(r"^miss: (\S+)\n", build, re.MULTILINE)
    assert sorted(names) == sorted(str(file) for file in cache.glob("*.so"))
    for name in names:
        assert re.search(rf"^compiled: {re.escape(name)} \(\d+\.\d\d s\)$", build, re.MULTILINE)
    assert len(re.findall(r"-O3 .* -shared -o ", build)) == len(names)

    engine = output["engine"].splitlines()
    assert engine[0] == "GRU: native engine (selected: auto)"
    assert engine[1].startswith("Branching: reference engine (its step can't be captured")
    assert engine[2] == "GRU: reference engine (selected)"


@pytest.mark.slow
def test_saved_values_are_those_that_autograd_stores(cache: Path) -> None:
    _, output = run_with_log("saved", cache, TRAINING)
    text = output["saved"]
    assert text.startswith("Mixed, torch.float32\n")
    assert re.search(r"^  h +\(B, 5\)$", text, re.MULTILINE)
    assert re.search(r"^  read +\(B, 2\)$", text, re.MULTILINE)
    assert re.search(r"^  tanh = tanh\(mm\) +\(B, 5\)$", text, re.MULTILINE)
    assert not re.search(r"^  unread ", text, re.MULTILINE)
    line = r"^  (\d+) bytes for each row of each time step, and (\d+) bytes once\nall: (\d+)$"
    [(per_row, once, stored)] = re.findall(line, text, re.MULTILINE)
    assert int(per_row) * 4 * 3 + int(once) == int(stored)


@pytest.mark.slow
def test_one_stage_with_cache_hits(cache: Path) -> None:
    run_with_log("", cache)  # fill the cache, even if this test runs alone
    _, output = run_with_log("build", cache)
    assert set(output) == {"build"}
    hits = re.findall(r"^hit: (\S+) \(\d+\.\d ms\)$", output["build"], re.MULTILINE)
    assert len(hits) == len(output["build"].splitlines()) >= 4
    assert set(hits) <= {str(file) for file in cache.glob("*.so")}


@pytest.mark.slow
def test_nothing_is_logged_by_default(cache: Path) -> None:
    assert run_with_log("", cache)[0] == ""


@pytest.mark.slow
def test_all_logs_each_line_once(cache: Path) -> None:
    code = f"import logging; logging.basicConfig(level=0)\n{CODE}"
    text, output = run_with_log("all", cache, code)
    assert set(output) == {"graph", "saved", "kernel", "emit", "build", "engine"}
    assert text.count("GRU: reference engine (selected)") == 1


@pytest.mark.slow
@pytest.mark.parametrize("code", ["import unrolled", CODE])
def test_unknown_stages_give_one_warning(cache: Path, code: str) -> None:
    text, _ = run_with_log("graphs,engine,emitt", cache, code)
    stages = "graph, saved, kernel, emit, build, engine or all"
    line = f"UserWarning: UNROLLED_LOG should name {stages}, got 'emitt', 'graphs'"
    assert text.count("UserWarning") == 1
    assert line in text
