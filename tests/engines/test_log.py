"""``UNROLLED_LOG``: each stage of the compiler, read in a process of its own."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from helpers import processes
from helpers.layer_pairs import NEEDS_COMPILER

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


def logged(stages: str, cache: Path, code: str = CODE, **environment: str) -> tuple[str, dict[str, str]]:
    """All of stderr, and each stage's part of it."""
    given = {**os.environ, "UNROLLED_CACHE": str(cache), "UNROLLED_LOG": stages, **environment}
    done = processes.run("-W", "ignore:Branching", "-c", code.replace(".backward()", ""), env=given)
    assert done.returncode == 0, done.stderr
    parts = re.split(r"^unrolled\.(\w+): ", done.stderr, flags=re.MULTILINE)
    found: dict[str, str] = {}
    for stage, text in zip(parts[1::2], parts[2::2], strict=True):
        found[stage] = found.get(stage, "") + text
    return done.stderr, found


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "kernels"


def test_every_stage_prints_itself(cache: Path) -> None:
    _, told = logged("graph, emit,build,engine", cache)
    assert set(told) == {"graph", "emit", "build", "engine"}

    graph = told["graph"]
    assert graph.startswith("GRU, torch.float32\nforward, before the loop, once for all time steps:\n")
    before, rest = graph.split("forward, in the loop:\n")
    inside, backward = rest.split("backward, in the loop:\n")
    loop, after = backward.split("backward, after the loop, once for all time steps:\n")
    assert re.search(r"mm = mm\(x, permute\) +\(B, 15\)\n", before)  # the product with the input
    assert re.search(r"mm\(h, permute_\w+\) +\(B, 15\)\n", inside)  # that with the hidden state
    assert "carries h <- " in inside
    assert "tanh" in inside
    assert re.search(r"mm\(cat\w*, permute_\w+\) +\(B, 5\)\n", loop)
    assert re.search(r"mm\(slice\w*, h\) +\(10, 5\)\n", after)  # of weight_hh's gradient, all steps at once
    assert "1000003" not in graph

    assert told["emit"].count('#include "loop.h"') == 2  # forward and backward
    assert 'extern "C" bool run(' in told["emit"]

    build = told["build"]
    names = re.findall(r"^miss: (\S+)\n", build, re.MULTILINE)
    assert sorted(names) == sorted(str(file) for file in cache.glob("*.so"))
    for name in names:
        assert re.search(rf"^compiled: {re.escape(name)} \(\d+\.\d\d s\)$", build, re.MULTILINE)
    assert len(re.findall(r"-O3 .* -shared -o ", build)) == len(names)

    engine = told["engine"].splitlines()
    assert engine[0] == "GRU: native engine (auto is chosen, nothing is in its way)"
    assert engine[1].startswith("Branching: reference engine (its step can't be captured")
    assert engine[2] == "GRU: reference engine (it is chosen)"


def test_a_stage_alone_and_hits_of_the_cache(cache: Path) -> None:
    logged("", cache)  # whether or not the test before has run
    _, told = logged("build", cache)
    assert set(told) == {"build"}
    hits = re.findall(r"^hit: (\S+) \(\d+\.\d ms\)$", told["build"], re.MULTILINE)
    assert len(hits) == len(told["build"].splitlines()) >= 4
    assert set(hits) <= {str(file) for file in cache.glob("*.so")}


def test_nothing_is_printed_unasked(cache: Path) -> None:
    assert logged("", cache)[0] == ""


def test_all_stages_by_one_word_and_no_line_twice(cache: Path) -> None:
    code = f"import logging; logging.basicConfig(level=0)\n{CODE}"
    text, told = logged("all", cache, code)
    assert set(told) == {"graph", "emit", "build", "engine"}
    assert text.count("GRU: reference engine (it is chosen)") == 1


@pytest.mark.parametrize("code", ["import unrolled", CODE])
def test_an_unknown_name_gets_one_warning(cache: Path, code: str) -> None:
    text, _ = logged("graphs,engine,emitt", cache, code)
    line = "UserWarning: UNROLLED_LOG should name graph, emit, build, engine or all, got 'emitt', 'graphs'"
    assert text.count("UserWarning") == 1
    assert line in text
