"""torch's private API: each name in ``_torch_private`` does what the library expects; no others are used."""

from __future__ import annotations

import ast
import ctypes
import operator
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import unrolled
from unrolled.engines import _torch_private as private

SOURCE = Path(unrolled.__file__).parent
# A name of torch with a leading underscore. Tensor._version and OpOverload._schema are attributes, not names.
PRIVATE = re.compile(r"\btorch(\.\w+)*\._[a-z]\w*|_dynamo_marked_constant|forward_ad\._")
ALLOWED = {
    # Cells may not import engines.
    "cells/wrappers.py": "torch.utils._pytree",
    "cells/quantized_products.py": (
        "torch._C._dispatch_has_kernel_for_dispatch_key",
        "torch._C._functorch",
        "torch._ops",
        "torch.utils._python_dispatch",
        "torch.utils._pytree",
    ),
    "cli/bench/runtimes.py": "torch._dynamo",  # an option of torch.compile that has no public name
}

JIT_WARNING = pytest.mark.filterwarnings("ignore:.torch.jit")


def code_of(path: Path) -> str:
    """Return the code of a file without docstrings and comments."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            node.body[0] = ast.Pass()
    return ast.unparse(tree)


def test_only_one_module_uses_private_names() -> None:
    used = {}
    for path in SOURCE.rglob("*.py"):
        name = path.relative_to(SOURCE).as_posix()
        found = {match[0] for match in PRIVATE.finditer(code_of(path))}
        if found and name != "engines/_torch_private.py":
            used[name] = found
    assert used.keys() == ALLOWED.keys()
    assert all(name.startswith(ALLOWED[path]) for path, names in used.items() for name in names)


def test_every_name_is_used() -> None:
    text = "\n".join(path.read_text() for path in SOURCE.rglob("*.py") if path.name != "_torch_private.py")
    assert {name for name in private.__all__ if not re.search(rf"\b{name}\b", text)} == set()


@JIT_WARNING
def test_which_transform_is_active() -> None:
    seen: list[tuple[bool, ...]] = []

    def states() -> tuple[bool, ...]:
        return (
            private.jit_tracing_state() is not None,
            private.functorch_interpreter() is not None,
            private.current_dispatch_mode() is not None,
            private.dispatch_mode(private.DispatchModeKey.PROXY) is not None,
            private.pre_dispatch_modes.get(0) is not None,
            private.forward_mode_active(),
            private.any_autocast_enabled(),
        )

    def function(x: Tensor) -> Tensor:
        seen.append(states())
        return x * 2

    x = torch.ones(2)
    function(x)
    torch.jit.trace(function, x, check_trace=False)  # type: ignore[no-untyped-call]
    torch.vmap(function)(x)
    private.make_fx(function)(x)
    private.make_fx(function, pre_dispatch=True)(x)
    with torch.autograd.forward_ad.dual_level():
        function(x)
    with torch.autocast("cpu"):
        function(x)
    none = (False,) * 7
    assert seen[0] == states() == none
    assert seen[1] == (True, *none[1:])
    assert seen[2] == (False, True, *none[2:])
    assert seen[3][2:4] == (True, True)
    assert seen[4][4]
    assert seen[5] == (*none[:5], True, False)
    assert seen[6] == (*none[:6], True)


def test_what_torch_counts_and_exports(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(private.in_onnx_export())
            return x * 2

    assert not private.counts_flops()
    assert not private.in_onnx_export()
    with FlopCounterMode(display=False):
        assert private.counts_flops()
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for dynamo in (False, True):
            seen.clear()
            torch.onnx.export(
                Model(), (torch.ones(2),), tmp_path / "model.onnx", dynamo=dynamo, verbose=False
            )
            assert seen
            assert all(seen)
    assert not private.in_onnx_export()


@JIT_WARNING
def test_levels_of_functorch() -> None:
    levels: list[Any] = []

    def function(x: Tensor) -> Tensor:
        levels.append([level.key() for level in private.functorch_interpreters() or ()])
        return x.sin()

    x = torch.ones(2)
    torch.func.jvp(torch.vmap(function), (x,), (x,))
    assert levels == [[private.TransformType.Jvp, private.TransformType.Vmap]]


def test_modes_can_be_suspended() -> None:
    operations: list[Any] = []

    class Recorder(private.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            operations.append(func)
            return func(*args, **(kwargs or {}))

    with Recorder():
        torch.ones(2).sin()
        with private.disable_current_modes():
            torch.ones(2).cos()
    assert torch.ops.aten.sin.default in operations
    assert torch.ops.aten.cos.default not in operations


def test_function_modes_are_listed() -> None:
    assert private.function_modes() == []
    with torch.device("cpu"):
        [mode] = private.function_modes()
    assert isinstance(mode, private.DeviceContext)


def test_hooks_of_all_modules() -> None:
    assert not private.any_global_module_hook()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert private.any_global_module_hook()
    handle.remove()
    assert not private.any_global_module_hook()


def test_modes_are_counted() -> None:
    assert private.function_mode_count() == private.dispatch_mode_count() == 0
    with torch.device("cpu"):
        assert private.function_mode_count() == 1
    with private.FakeTensorMode():
        assert private.dispatch_mode_count() == 1
    mapping, key, value = private.forward_mode_inactive
    assert mapping[key] is value
    with torch.autograd.forward_ad.dual_level():
        assert mapping[key] is not value


@pytest.mark.skipif(sys.platform != "linux", reason="the names of C++ functions differ")
def test_exported_functions_and_the_layout_of_tensors() -> None:
    assert private.exported_function("no_such_function") is None
    assert None not in map(private.exported_function, private.TENSOR_FUNCTIONS)
    layout = private.tensor_layout()
    assert layout is not None
    in_object, of_keys, usual, in_inference_mode = layout

    def keys(tensor: Tensor) -> int:
        content = ctypes.c_uint64.from_address(id(tensor) + in_object).value
        return ctypes.c_uint64.from_address(content + of_keys).value

    weight = torch.nn.Parameter(torch.randn(4, 5, dtype=torch.float64))
    for tensor in (torch.randn(3), weight, weight[1:], weight.t() @ weight, torch.zeros(0)):
        assert keys(tensor) == usual
    with torch.inference_mode():
        assert keys(torch.randn(3)) == in_inference_mode
    others = torch._neg_view(torch.randn(2)), torch.eye(2).to_sparse(), torch._efficientzerotensor((2,))
    for tensor in (*others, torch.randn(2).to("meta"), torch.eye(2).to_mkldnn()):
        assert keys(tensor) not in (usual, in_inference_mode)


def test_recorded_graphs() -> None:
    modes: list[Any] = []

    def function(x: Tensor) -> Tensor:
        modes.append(private.get_proxy_mode())
        return torch.nn.functional.layer_norm(x, (3,))

    assert private.get_proxy_mode() is None
    decompositions = private.core_aten_decompositions()
    decompositions.update(private.get_decompositions([torch.ops.aten.native_layer_norm.default]))
    with private.use_lazy_graph_module(True):
        graph = private.make_fx(function, decompositions, tracing_mode="fake")(torch.randn(2, 3)).graph
    assert modes[0] is not None
    targets = {node.target for node in graph.nodes if node.op == "call_function"} - {operator.getitem}
    assert all(isinstance(target, private.OpOverload) for target in targets)
    assert torch.ops.aten.native_layer_norm.default not in targets
    assert torch.ops.aten.rsqrt.default in targets


def test_tensors_without_data() -> None:
    with private.FakeTensorMode() as mode:
        x = mode.from_tensor(torch.ones(3))
        assert isinstance(x, private.FakeTensor)
        with pytest.raises(private.DataDependentOutputException):
            bool(x.sum() > 0)
        with pytest.raises(private.DynamicOutputShapeException):
            torch.nonzero(x)
    assert private.fake_tensor_logger.name in sys.modules


def test_memory_of_tensors() -> None:
    assert private.has_storage(torch.ones(2))
    assert not private.has_storage(torch.ones(2).to_sparse())
    assert not private.is_functional_tensor(torch.ones(2))
    seen: list[bool] = []
    torch.func.functionalize(lambda x: (seen.append(private.is_functional_tensor(x)), x)[1])(torch.ones(2))
    assert seen == [True]


def test_the_state_of_a_backward_pass() -> None:
    seen: list[Any] = []
    after: list[int] = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            node, task = private.current_autograd_node(), private.current_graph_task_id()
            seen.append((node is not None, task >= 0, private.keep_graph()))
            private.queue_callback(lambda: after.append(len(seen)))
            return grad

    x = torch.ones(2, requires_grad=True)
    y = Probe.apply(x).sum()  # type: ignore[no-untyped-call]
    y.backward(retain_graph=True)
    y.backward()
    assert seen == [(True, True, True), (True, True, False)]
    assert after == [1, 2]
    assert private.current_autograd_node() is None
    assert private.current_graph_task_id() == -1


def test_hooks_of_saved_tensors_can_be_suspended() -> None:
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    x = torch.ones(2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hooks = private.top_saved_tensors_hooks(False)
        assert hooks is not None
        private.pop_saved_tensors_hooks()
        x.sin()
        assert not packed
        private.push_saved_tensors_hooks(*hooks)
        x.sin()
    assert packed
    assert private.top_saved_tensors_hooks(True) is None


def test_dispatch_below_autograd() -> None:
    x = torch.ones(2, requires_grad=True)
    assert private.any_requires_grad([torch.ones(2)], x)
    assert not private.any_requires_grad([torch.ones(2)])
    with private.BelowAutograd():
        assert not x.sin().requires_grad


def test_functions_of_a_single_level() -> None:
    class Double(private.SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 2

    x = torch.ones(2, requires_grad=True)
    with private.enable_single_level_autograd_function():
        y = Double.apply(x)
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [2, 2]


def test_torch_functions_can_be_disabled() -> None:
    class Mine(Tensor):
        calls = 0

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Mine.calls += 1
            return super().__torch_function__(func, types, args, kwargs or {})

    x = torch.ones(2).as_subclass(Mine)
    calls = Mine.calls
    with private.DisableTorchFunction():
        x.sin()
    assert Mine.calls == calls
    x.sin()
    assert Mine.calls > calls


def test_checks() -> None:
    with pytest.raises(RuntimeError, match="a message"):
        private.check(False, lambda: "a message")
    with pytest.raises(RuntimeError, match="a message"):
        private.assert_async(torch.tensor(False), "a message")
    with pytest.raises(RuntimeError, match="a message"):
        private.functional_assert_async(torch.tensor(False), "a message", torch.ones(1))


def test_nested_tensors() -> None:
    tree = {"a": [1, (2, 3)], "b": None}
    leaves, spec = private.tree_flatten(tree)
    assert isinstance(spec, private.TreeSpec)
    assert private.tree_unflatten(leaves, spec) == tree
    assert private.tree_leaves([1, (2, 3)]) == [1, 2, 3]
    assert private.tree_map(lambda leaf: leaf + 1, [1, (2, 3)]) == [2, (3, 4)]


PROGRAM = """
import sys
import torch
from unrolled.engines import _torch_private as private

assert not private.dynamo_imported(), [name for name in sys.modules if "dynamo" in name]
private.add_dynamo_guard(lambda: True, "nothing happens outside of torch.compile")
value, reads = [2.0], []


@private.constant_for_dynamo
def read():
    private.add_dynamo_guard(lambda old=value[0]: value[0] == old, "the value is the same")
    reads.append(value[0])
    return value[0]


function = torch.compile(lambda x: x * read(), backend="eager", fullgraph=True)
x = torch.ones(1)
assert [function(x).item(), function(x).item()] == [2, 2] and reads == [2], reads
value[0] = 3.0
assert function(x).item() == 3 and reads == [2, 3], reads
assert private.dynamo_imported()
from torch._dynamo import convert_frame

lock = convert_frame.compile_lock
private.renew_dynamo_lock()
assert convert_frame.compile_lock is not lock and type(convert_frame.compile_lock) is type(lock)
"""


@pytest.mark.slow
def test_torch_compile() -> None:
    process = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_the_scan_and_the_decompositions_of_the_export_to_onnx() -> None:
    assert torch.ops.unrolled.recurrence.default in torch._decomp.decomposition_table
    x = torch.randn(5, 2)

    def step(total: Tensor, x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        return total + factor * x, total + factor * x

    total, totals = private.scan_operator(step, [torch.zeros(2)], [x], (torch.tensor(2.0),))
    torch.testing.assert_close(totals, 2 * x.cumsum(0))
    torch.testing.assert_close(total, totals[-1])
