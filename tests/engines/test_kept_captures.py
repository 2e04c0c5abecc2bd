"""Captured steps that are stored in the kernel cache: what changes them, damage, and what isn't stored."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode

import unrolled as ur
from helpers import processes
from helpers.changing_cells import CHANGES
from helpers.layer_pairs import NEEDS_COMPILER, NEEDS_SYSTEM_COMPILER
from helpers.step_operations import (
    BINARY,
    CUSTOM_GRADIENTS,
    DISCONTINUOUS,
    PRODUCTS,
    UNARY,
    Get,
    cell_of,
    fit,
)
from helpers.toolchain import NO_COMPILER, counting_compiler, mount_namespace, run_python
from unrolled.cells.wrappers import wrap
from unrolled.engines import draws, registry
from unrolled.engines.compiler import compiled_cell, kept_captures
from unrolled.engines.compiler.capture import CapturedStep, capture
from unrolled.engines.compiler.compiled_cell import CompiledCell
from unrolled.engines.compiler.ir import UnsupportedError
from unrolled.engines.compiler.kept_captures import CaptureEntry
from unrolled.engines.compiler.partition import split
from unrolled.engines.compiler.step_values import step_values
from unrolled.engines.compiler.stored_graph import NotStorableError, from_data, to_data
from unrolled.engines.native.toolchain import cache, eviction, kept_files

pytestmark = NEEDS_COMPILER
CELLS = sorted(name for name in ur.cells.__all__ if isinstance(getattr(ur.cells, name), type))
FAST = ("GRU", "MinGRU", "SLSTM")

# A program that runs cells and prints digests of their outputs and gradients, and what it has imported.
RUN = """
import sys, hashlib, json, pathlib, torch
imported_with_torch = set(sys.modules)
import unrolled as ur
from unrolled.engines.compiler import compiled_cell
from unrolled.engines.native.toolchain import kept_files
kept_files._folder = lambda: pathlib.Path({folder!r})
captured, original = [], compiled_cell.capture
def capture(cell, *arguments):
    captured.append(type(cell).__name__)
    return original(cell, *arguments)
compiled_cell.capture = capture
for name in {names}:
    torch.manual_seed(3)
    layer = ur.Recurrent(getattr(ur.cells, name), 5, 7)
    x = torch.randn(4, 3, 5, requires_grad=True)
    output, state = layer(x)
    gradients = torch.autograd.grad((output * torch.randn_like(output)).sum(), [x, *layer.parameters()])
    tensors = [output, *gradients]
    content = b"".join(tensor.detach().contiguous().numpy().tobytes() for tensor in tensors)
    print(name, hashlib.sha256(content).hexdigest())
late = {{"torch._dynamo", "torch.fx.experimental.proxy_tensor", "sympy"}}
print(json.dumps([captured, sorted(late & set(sys.modules) - imported_with_torch)]))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for captured steps. Compiled kernels are in the usual cache."""
    monkeypatch.setenv(kept_files.VARIABLE, "1")
    monkeypatch.setattr(kept_files, "_folder", lambda: tmp_path / "captures")
    (tmp_path / "captures").mkdir()
    return tmp_path / "captures"


@pytest.fixture
def captures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the cells whose steps are captured during the test."""
    names: list[str] = []

    def counted(cell: ur.Cell, *arguments: Any, **options: Any) -> Any:
        names.append(type(cell.innermost).__name__)
        return capture(cell, *arguments, **options)

    monkeypatch.setattr(compiled_cell, "capture", counted)
    monkeypatch.setattr(registry, "_cells", {})
    return names


def fresh_layer(cell: type[ur.Cell]) -> ur.Recurrent:
    """Return a layer as a new process would create it."""
    new_process()
    torch.manual_seed(5)
    return ur.Recurrent(cell, 2, 3)


def new_process() -> None:
    """Forget all compiled cells."""
    registry._cells.clear()


def compile_cell(cell: ur.Cell) -> CompiledCell:
    """Compile a cell as a new process would."""
    new_process()
    vars(cell.innermost)["_engine_cache"].clear()
    return registry.compiled(cell, torch.float32)


def results(layer: ur.Recurrent, engine: str = "native") -> list[Tensor]:
    """Return the output and all gradients of a layer."""
    torch.manual_seed(7)
    x = torch.randn(4, 3, layer.input_size, requires_grad=True)
    with ur.engine(engine):
        output, _ = layer(x)
        gradients = torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])
    return [output.detach(), *gradients]


def assert_as_by_reference(layer: ur.Recurrent) -> None:
    for actual, expected in zip(results(layer), results(layer, "reference"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def stored(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.capture"))


def rewrite(file: Path, change: Callable[[Any], Any]) -> None:
    """Change the data of a file, with the right checksum."""
    data = json.loads(file.read_text().partition("\n")[2])
    text = json.dumps(change(data))
    file.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")


def entry_name(cell: ur.Cell, dtype: torch.dtype = torch.float32, training: bool = False) -> str | None:
    """Return the name of the file of a cell, None if it has none."""
    return kept_captures._name("capture", cell, training, dtype)


def sources(compiled: CompiledCell) -> list[str]:
    """Return the C++ of all loops of a cell."""
    loops: Any = [compiled._generated_for_inference, *compiled._generated_for_training]
    return [loop.spec.source for loop in loops]


class Plain(ur.Cell):
    """A small cell of the user."""

    w = ur.Param("hidden", "input")
    u = ur.Param("hidden", "hidden")
    gain: float = 1.0

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.gain * (x @ self.w.T + h @ self.u.T))


def define(
    body: str, *, before: str = "", module: str = "cells_of_a_test", members: str = ""
) -> type[ur.Cell]:
    """Define a cell by running code that has no source file, as a notebook does.

    Args:
        body: The new state, an expression of ``z``.
        before: Code before the class.
        module: The name of the module.
        members: Code in the class.
    """
    scope: dict[str, Any] = {"__name__": module}
    code = f"""
import torch, unrolled as ur
{textwrap.dedent(before)}
class Own(ur.Cell):
    w = ur.Param("hidden", "input")
    u = ur.Param("hidden", "hidden")
{textwrap.indent(textwrap.dedent(members), "    ")}
    def step(self, x, h):
        z = x @ self.w.T + h @ self.u.T
        return {body}
"""
    sys.modules[module] = types.ModuleType(module)
    exec(code, scope)
    cls: type[ur.Cell] = scope["Own"]
    return cls


@functools.cache
def captured_plain_step() -> CapturedStep:
    """Return the captured step of ``Plain(2, 3)``."""
    return capture(Plain(2, 3), torch.float32)


# --- warm starts ---


def run_cells(names: tuple[str, ...], folder: Path, warm: bool) -> tuple[list[str], list[list[str]]]:
    """Run cells in a new process, and return the lines that it prints about them, and about itself."""
    code = RUN.format(folder=str(folder), names=list(names))
    if warm:  # nothing is imported before
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True)
    else:
        done = processes.run("-c", code)
    assert done.returncode == 0, done.stderr
    *lines, about = done.stdout.splitlines()
    return lines, json.loads(about)


@pytest.mark.parametrize("names", [FAST[:1], pytest.param(tuple(CELLS), marks=pytest.mark.slow)], ids=len)
def test_a_warm_process_captures_nothing_and_gives_the_same_bits(
    names: tuple[str, ...], folder: Path
) -> None:
    cold, (captured, _) = run_cells(names, folder, warm=False)
    assert captured == list(names)
    assert len(stored(folder)) == 2 * len(names)  # the captured step, and the random numbers that it draws
    warm, about = run_cells(names, folder, warm=True)
    assert about == [[], []]
    assert warm == cold


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CELLS]
)
def test_a_stored_capture_gives_the_same_code(name: str, captures: list[str]) -> None:
    cell = getattr(ur.cells, name)(6, 8)
    new, old = compile_cell(cell), compile_cell(cell)
    assert captures == [name]
    assert sources(new) == sources(old)
    assert new.captured.paths == old.captured.paths
    assert [node.name for node in new.captured.graph.nodes] == [
        node.name for node in old.captured.graph.nodes
    ]


def test_a_cast_to_float32_can_be_stored() -> None:
    """The loop in float64 rounds with an operator of this package."""
    cell = define("(torch.tanh(z).float() * 2).to(z.dtype)")(2, 3)
    captured = capture(cell, torch.float64)
    data = json.loads(json.dumps(to_data(captured)))
    assert "unrolled.round_to_float32.default" in str(data["nodes"])
    assert to_data(from_data(data, cell)) == data


def test_an_operator_of_another_library_is_not_stored() -> None:
    library = torch.library.Library("kept_captures_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    captured = capture(Plain(2, 3), torch.float32)
    node = next(node for node in captured.graph.nodes if node.op == "call_function")
    node.target = torch.ops.kept_captures_test.twice.default
    with pytest.raises(NotStorableError, match="it calls kept_captures_test.twice.default"):
        to_data(captured)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(12))
def test_every_operation_can_be_stored(start: int) -> None:
    functions: list[Callable[..., Tensor]] = [
        *(lambda v, get, f=f: f(v) for f in (UNARY | DISCONTINUOUS | CUSTOM_GRADIENTS).values()),
        *(lambda v, get, f=f: f(v, v.roll(3, 1) * get(v.shape[1])) for f in BINARY.values()),
        *PRODUCTS.values(),
    ]

    def run(x: Tensor, states: tuple[Tensor, ...], get: Get) -> tuple[Tensor, ...]:
        v = torch.nn.functional.linear(x, get(8, 3)) + get(8) * states[0]
        return (torch.stack([fit(f(v, get), 8) for f in functions[start::12]]).sum(0),)

    cell = cell_of(run, 3, (8,))(3, 8)
    captured = capture(cell, torch.float32)
    data = json.loads(json.dumps(to_data(captured)))
    rebuilt = from_data(data, cell)
    assert to_data(rebuilt) == data
    for ours, theirs in zip(split(captured), split(rebuilt), strict=True):
        for part in ("prologue", "loop", "epilogue", "inputs", "saved", "old_states", "new_states"):
            assert list(map(str, getattr(ours, part))) == list(map(str, getattr(theirs, part)))


def test_a_step_that_is_the_same_in_both_modes_is_stored_once(captures: list[str], folder: Path) -> None:
    layer = ur.Recurrent(Plain, 2, 3)
    results(layer)
    new_process()
    layer = ur.Recurrent(Plain, 2, 3).eval()
    results(layer)
    assert captures == ["Plain"]

    class Noisy(Plain):
        def step(self, x: Tensor, h: Tensor) -> Tensor:
            return super().step(x, h) * (2 if self.training else 1)

    for training in (True, False, True, False):
        new_process()
        assert_as_by_reference(ur.Recurrent(Noisy, 2, 3).train(training))
    assert captures == ["Plain", "Noisy", "Noisy"]


def test_random_numbers_and_extra_inputs(captures: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    dropout = define("torch.nn.functional.dropout(torch.tanh(z), 0.5, self.training)")
    planned: list[ur.Cell] = []
    plan = draws._plan

    def counted(cell: ur.Cell, *arguments: Any) -> Any:
        planned.append(cell)
        return plan(cell, *arguments)

    monkeypatch.setattr(draws, "_plan", counted)
    for _ in range(2):
        new_process()
        layer = ur.Recurrent(dropout, 4, 5)
        assert_as_by_reference(layer)
    assert captures == ["Own"]
    assert len(planned) == 1


# --- changes ---


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("code of a function", "option") else pytest.param(name, marks=pytest.mark.slow)
        for name in CHANGES
    ],
)
def test_a_change_is_captured_anew(name: str, captures: list[str]) -> None:
    module = CHANGES[name].create_module()
    layer = ur.Recurrent(module.Tested, 3, 4)
    compile_cell(layer._first)
    is_stored = not step_values(layer._first).only_here
    compile_cell(layer._first)
    assert len(captures) == (1 if is_stored else 2)
    CHANGES[name].apply(module, layer)
    changed = compile_cell(layer._first)
    assert len(captures) == (2 if is_stored else 3)
    assert to_data(changed.captured) == to_data(capture(layer._first, torch.float32))
    assert_as_by_reference(layer)


def test_a_cell_without_source_is_known_by_its_code(captures: list[str]) -> None:
    """A notebook may define a class again, in the same way or in another one."""
    for count, body in (
        (1, "torch.tanh(z)"),
        (1, "torch.tanh(z)"),
        (2, "torch.sigmoid(z)"),
        (2, "torch.tanh(z)"),
    ):
        assert_as_by_reference(fresh_layer(define(body, module="__main_of_a_notebook__")))
        assert len(captures) == count


def test_code_outside_of_the_class() -> None:
    """Helper functions, base classes, default arguments, closures and what these read."""
    versions = []
    for factor in (1.0, 2.0):
        versions += [
            define("f(z)", before=f"def f(z): return torch.tanh({factor} * z)"),
            define("f(z)", before=f"def g(z): return {factor} * z\ndef f(z): return torch.tanh(g(z))"),
            define("f(z)", before=f"def f(z, a={factor}): return torch.tanh(a * z)"),
            define("f(z)", before=f"def make(a): return lambda z: torch.tanh(a * z)\nf = make({factor})"),
            define("f(z)", before=f"K = [{factor}]\ndef f(z): return torch.tanh(K[0] * z)"),
            define(
                "self.f(z)",
                before=f"class M:\n    def f(self, z): return torch.tanh({factor} * z)",
                members="f = M.f",
            ),
            define(
                "f(z)",
                before=f"import numpy\nA = numpy.array({factor})\ndef f(z): return torch.tanh(float(A) * z)",
            ),
        ]
    names = [entry_name(cls(2, 3)) for cls in versions]
    assert len(set(names) - {None}) == len(versions)
    assert names == [entry_name(cls(2, 3)) for cls in versions]


def test_sizes_options_dtypes_modes_and_wrappers() -> None:
    def names() -> list[str | None]:
        cells = [Plain(2, 3), Plain(2, 4), Plain(3, 3), Plain(2, 3, gain=2.0), Plain(2, 3, gain=2)]
        cells += [wrap(cells[0], (("Masked", ()),)), wrap(cells[0], (("Every", (1,)),))]
        cells += [wrap(cells[0], (("Zoned", ((rate,), drawn)),)) for rate in (0.25, 0.5) for drawn in (0, 1)]
        result = [entry_name(cell) for cell in cells]
        result += [entry_name(cells[0], torch.float64), entry_name(cells[0], training=True)]
        torch.set_default_dtype(torch.float64)
        try:
            return [*result, entry_name(cells[0])]
        finally:
            torch.set_default_dtype(torch.float32)

    assert names() == names()
    assert len(set(names()) - {None}) == 14


@pytest.mark.slow
def test_tensors_that_are_attributes(captures: list[str]) -> None:
    class Scaled(Plain):
        def __init__(self, *sizes: int, **options: Any) -> None:
            super().__init__(*sizes, **options)
            self.scale = torch.tensor([1.0, 2.0, 3.0])
            self.order = torch.tensor([2, 0, 1])

        def step(self, x: Tensor, h: Tensor) -> Tensor:
            return super().step(x, h)[:, self.order] * self.scale * torch.tensor([0.5, 1.0, 2.0])

    for order, scale, count in (
        ([2, 0, 1], 1.0, 1),
        ([2, 0, 1], 3.0, 1),
        ([0, 2, 1], 1.0, 2),
        ([0, 2, 1], 3.0, 2),
    ):
        layer = fresh_layer(Scaled)
        layer._first.order = torch.tensor(order)
        layer._first.scale = scale * torch.ones(3)
        with torch.inference_mode():
            layer(torch.randn(1, 1, 2))
        assert_as_by_reference(layer)
        assert len(captures) == count


def test_a_newer_version_of_this_package(captures: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    environment = kept_captures._environment()
    assert environment is not None
    compile_cell(Plain(2, 3))
    monkeypatch.setattr(kept_captures, "_environment", lambda: (*environment, "newer"))
    compile_cell(Plain(2, 3))
    assert len(captures) == 2


def test_sources_that_change_while_a_process_runs(
    captures: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process still runs the old version."""
    monkeypatch.setattr(kept_captures, "_IMPORTED_AT", 0)
    kept_captures._environment.cache_clear()
    try:
        compile_cell(Plain(2, 3))
    finally:
        kept_captures._environment.cache_clear()
    assert not stored(folder)


@pytest.mark.parametrize("kind", ["without sources", "with other files", "in an archive", "missing"])
def test_an_application_without_source_files(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package: Any = tmp_path / "unrolled"
    if kind != "missing":
        for part in ("cells", "engines"):
            (package / part).mkdir(parents=True)
            (package / part / "data.h").touch()
            if kind == "with other files":
                (package / part / "other.py").touch()
    if kind == "in an archive":
        package = zipfile.Path(shutil.make_archive(str(tmp_path / "app"), "zip", tmp_path), "unrolled/")
    monkeypatch.setattr(kept_captures, "files", lambda name: package)
    monkeypatch.setattr(kept_captures, "_IMPORTED_AT", time.time() + 10)
    assert kept_captures._environment.__wrapped__() is None


# --- what isn't stored ---

NOT_STORED = {
    "environment variable": ("z * float(os.environ.get('GAIN', '1'))", "import os"),
    "function that reads one": ("z * float(getenv('GAIN', '1'))", "from os import getenv"),
    "file": ("z * (1.0 if open('/dev/null').close() is None else 2.0)", ""),
    "time": ("z * (2.0 if now() < 0 else 1.0)", "from time import time as now"),
    "setting of torch": ("z * (2.0 if torch.get_num_threads() > 10**6 else 1.0)", ""),
    "backend of torch": ("z * (2.0 if torch.backends.mkldnn.is_available() else 1.0)", ""),
    "registered operator": ("torch.ops.aten.tanh(z)", ""),
    "installed package": ("einops.rearrange(z, 'b h -> b h')", "einops = pytest.importorskip('einops')"),
    "module of builtins": ("builtins.abs(z)", "import builtins"),
    "class of an extension": (
        "C.f(z)",
        "import importlib.machinery, types\n"
        "own_extension = sys.modules['own_extension'] = types.ModuleType('own_extension')\n"
        "own_extension.__file__ = 'own_extension' + importlib.machinery.EXTENSION_SUFFIXES[0]\n"
        "class C:\n    __module__ = 'own_extension'\n    f = torch.tanh",
    ),
    "object without values": ("z * (1.0 if marker else 2.0)", "marker = object()"),
    "tensor": ("z * gain", "gain = torch.ones(3)"),
    "module that isn't imported yet": ("later(z)", "def later(z):\n    import colorsys\n    return z"),
    "module that computes its attributes": (
        "z * values.gain",
        "import types\nvalues = types.ModuleType('values')\nvalues.__getattr__ = lambda name: 1.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_STORED)
def test_a_step_that_may_differ_in_other_processes_is_not_stored(
    name: str, captures: list[str], folder: Path
) -> None:
    body, before = NOT_STORED[name]
    sys.modules.pop("colorsys", None)
    cell = define(f"torch.tanh({body})", before=f"import pytest, sys\n{before}")(2, 3)
    assert step_values(cell).only_here
    CaptureEntry(cell, torch.float32, kept_files.KeptFiles()).save(captured_plain_step())
    assert not stored(folder)
    if name == "file":
        for count in (1, 2):
            compile_cell(cell)
            assert captures == ["Own"] * count
        assert not stored(folder)


def test_the_state_of_torch_may_change_a_capture(
    captures: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Count(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    with Count():
        compile_cell(Plain(2, 3))
    with torch.autocast("cpu"), pytest.raises(UnsupportedError, match="bfloat16"):
        compile_cell(Plain(2, 3))
    handle = register_module_forward_hook(lambda *_: None)
    try:
        compile_cell(Plain(2, 3))
    finally:
        handle.remove()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "tanh", lambda value: torch.sigmoid(value))
        compile_cell(Plain(2, 3))
    monkeypatch.setenv(kept_files.VARIABLE, "0")
    compile_cell(Plain(2, 3))
    assert len(captures) == 6  # with autocast, also without the backward
    assert not stored(folder)


def test_a_step_that_cannot_be_compiled_is_not_stored(captures: list[str], folder: Path) -> None:
    """Its error names the line, which may be another one in the next process."""
    refused = define(
        "torch.tanh(z) + torch.linalg.eigvals(z.unsqueeze(-1) * z.unsqueeze(1)).real.sum(-1, True)"
    )
    only_forward = define("torch.cholesky_inverse(torch.eye(3) + 0 * z.unsqueeze(1))[..., 0] + z")
    for cls in (refused, only_forward):
        with contextlib.suppress(UnsupportedError):
            compile_cell(cls(2, 3))
    assert not stored(folder)
    assert set(captures) == {"Own"}


# --- damage ---


def damaged(data: Any, kind: str) -> Any:
    """Return the data of a captured step with one change."""
    calls = [node for node in data["nodes"] if node[0] == "call_function"]
    match kind:
        case "operator that doesn't exist":
            calls[0][2] = "aten.no_such_operator.default"
        case "operator of another library":
            calls[0][2] = "os.system.default"
        case "operator that writes":
            calls[0][2] = "aten.add_.Tensor"
        case "operator that reads a file":
            calls[0][2:4] = ["aten.from_file.default", ["/dev/zero", True, 3]]
        case "node that comes later":
            calls[0][3] = [{"node": len(data["nodes"])}]
        case "negative node":
            data["x"] = -1
        case "shape":
            data["nodes"][0][5]["shape"] = [30, 2]
        case "dtype":
            data["nodes"][0][5]["dtype"] = "nn"
        case "role":
            del data["new_states"]
        case "number of parameters":
            data["params"].pop()
        case "missing parameter":
            data["params"][0] = None
        case "paths":
            data["paths"] = [["1"], 2, True]
        case "no dictionary":
            return [data]
        case "another operation":
            calls[0][0] = "call_module"
    return data


@pytest.mark.parametrize(
    "kind",
    [
        "operator that doesn't exist", "operator of another library", "operator that writes",
        "operator that reads a file", "node that comes later", "negative node", "shape", "dtype", "role",
        "number of parameters", "missing parameter", "paths", "no dictionary", "another operation",
    ],
)  # fmt: skip
def test_wrong_data_is_replaced(kind: str, captures: list[str], folder: Path) -> None:
    cell, captured = Plain(2, 3), captured_plain_step()
    CaptureEntry(cell, torch.float32, kept_files.KeptFiles()).save(captured)
    [file] = stored(folder)
    content = file.read_text()
    rewrite(file, lambda data: damaged(data, kind))
    assert CaptureEntry(cell, torch.float32, kept_files.KeptFiles()).load() is None
    if kind == "shape":
        assert to_data(compile_cell(cell).captured) == to_data(captured)
        assert captures == ["Plain"]
        assert file.read_text() == content


@pytest.mark.parametrize(
    "kind", ["empty", "cut", "no checksum", "changed", "no JSON", "nested", "no text", "folder"]
)
def test_a_damaged_file_is_replaced(kind: str, captures: list[str], folder: Path) -> None:
    cell = Plain(2, 3)
    CaptureEntry(cell, torch.float32, kept_files.KeptFiles()).save(captured_plain_step())
    [file] = stored(folder)
    content = file.read_bytes()
    if kind == "folder":
        file.unlink()
        (file / "inside").mkdir(parents=True)
    elif kind in ("no JSON", "nested", "no text"):
        new = {"no JSON": b"{", "nested": b"[" * 10**5, "no text": b"\xff\xfe"}[kind]
        file.write_bytes(hashlib.sha256(new).hexdigest().encode() + b"\n" + new)
    else:
        changed = {
            "empty": b"",
            "cut": content[:-9],
            "no checksum": content[65:],
            "changed": content.replace(b"mul", b"add", 1),
        }
        file.write_bytes(changed[kind])
    assert CaptureEntry(cell, torch.float32, kept_files.KeptFiles()).load() is None
    if kind in ("cut", "folder"):
        compile_cell(cell)
        assert captures == ["Plain"]
        assert file.is_dir() or file.read_bytes() == content


def test_wrong_random_numbers_are_planned_again(captures: list[str], folder: Path) -> None:
    results(fresh_layer(Plain))
    for wrong in ([["uniform", [1.5]]], [["other", [3]]], [3], "text", {"a": 1}, None):
        for file in stored(folder):
            rewrite(file, lambda _, wrong=wrong: wrong)
        assert_as_by_reference(fresh_layer(Plain))


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has no such permissions")
def test_a_file_that_others_can_write_is_not_read(folder: Path) -> None:
    entry = CaptureEntry(Plain(2, 3), torch.float32, kept_files.KeptFiles())
    entry.save(captured_plain_step())
    [file] = stored(folder)
    assert file.stat().st_mode & 0o777 == 0o600
    assert entry.load() is not None
    file.chmod(0o622)
    assert entry.load() is None


# --- the cache ---


@pytest.mark.slow
def test_processes_that_start_at_once(folder: Path) -> None:
    code = RUN.format(folder=str(folder), names=["MGU"])
    running = [processes.start("-c", code) for _ in range(2)]
    outputs = [process.communicate() for process in running]
    assert len({out.splitlines()[0] for out, _ in outputs}) == 1
    assert [err for _, err in outputs] == ["", ""]
    assert len([*folder.iterdir()]) == 2
    [line], [captured, _] = run_cells(("MGU",), folder, warm=False)
    assert line == outputs[0][0].splitlines()[0]
    assert captured == []


@pytest.mark.slow
@NEEDS_SYSTEM_COMPILER
def test_forward_and_backward_are_compiled_at_the_same_time(tmp_path: Path) -> None:
    """Each of the two compilations waits until the other one has begun."""
    gate, begun = tmp_path / "gate", tmp_path / "begun"
    wait = f"while [ $(wc -l < {begun}) -lt 2 ]; do sleep 0.05; done"
    compiler, count = counting_compiler(tmp_path, f"if [ -e {gate} ]; then echo >> {begun}; {wait}; fi")
    code = f"""
    import pathlib, torch, unrolled as ur
    layer, x = ur.GRU(3, 4), torch.randn(2, 1, 3)
    with torch.no_grad():
        layer(x)  # compiles the forward loop for inference, and what all loops share
    pathlib.Path({str(gate)!r}).touch()
    layer(x)
    """
    variables = {"CXX": compiler, "UNROLLED_CACHE": str(tmp_path / "kernels")}
    done = run_python(code, timeout=300, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert count() == 5


@pytest.mark.slow
@NEEDS_SYSTEM_COMPILER
@pytest.mark.parametrize("damage", [False, True])
def test_prebuilt_kernels_come_with_captures(tmp_path: Path, damage: bool) -> None:
    weights, kernels = tmp_path / "weights.safetensors", tmp_path / "kernels"
    safetensors.torch.save_file(torch.nn.GRU(5, 7).state_dict(), weights)
    environment = {**os.environ, kept_files.VARIABLE: "1", cache.VARIABLE: str(tmp_path / "cache")}
    done = processes.run("-m", "unrolled", "build", weights, "--out", kernels, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    files = stored(kernels)
    assert len(files) == 3  # the captured step, and its random numbers in both modes
    for file in files if damage else ():
        file.write_text("damaged")
    variables = {
        "UNROLLED_KERNELS": str(kernels),
        cache.VARIABLE: "/dev/null/nowhere",
        kept_files.VARIABLE: "1",
    }
    code = RUN.replace("kept_files._folder = ", "_ = ").format(folder="", names=["GRU"])
    for program in (code, code.replace("    x =", "    layer.eval()\n    x =")):
        done = run_python(program, **{**NO_COMPILER, **variables})
        assert json.loads(done.stdout.splitlines()[-1])[0] == ["GRU"] * damage, done.stderr


@pytest.mark.slow
def test_a_read_only_cache(folder: Path) -> None:
    read_only = mount_namespace(f"mount --bind {folder} {folder} && mount -o remount,ro,bind {folder}")
    code = RUN.format(folder=str(folder), names=["MGU"])
    lines = []
    for count in (1, 1, 0):
        done = run_python(code, prefix=() if len(lines) == 1 else read_only)
        line, about = done.stdout.splitlines()
        lines.append(line)
        assert (len(json.loads(about)[0]), done.stderr) == (count, "")
    assert len(set(lines)) == 1


def test_the_size_limit_includes_captures(
    folder: Path, captures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in (3, 4):
        compile_cell(Plain(2, size))
    total = sum(file.stat().st_size for file in stored(folder))
    compile_cell(Plain(2, 3))  # now the other one was unused for longer
    monkeypatch.setenv(eviction.VARIABLE, str(total + 100))
    compile_cell(Plain(2, 5))
    assert len(stored(folder)) == 2
    assert captures == ["Plain"] * 3
    compile_cell(Plain(2, 3))
    assert captures == ["Plain"] * 3
    compile_cell(Plain(2, 4))
    assert captures == ["Plain"] * 4
    assert cache.size(folder)[0] == 0
