"""Everything that this library uses of torch's private API, which may change without notice.

``tests/engines/test_torch_private.py`` checks what each name does, so that a change is noticed here first.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

# Capturing a step: decompositions into torch's core operators, tensors without data, recorded graphs.
from torch._decomp import core_aten_decompositions, get_decompositions, register_decomposition

# Functions whose gradients can be differentiated again under every transform of torch.func.
from torch._functorch import autograd_function

# What torch.compile assumes about a function that it has compiled.
from torch._guards import Guard, TracingContext

# The operator that torch.onnx exports as a Scan. It takes the step, the states, the inputs and other tensors.
from torch._higher_order_ops.scan import scan_op as scan_operator
from torch._ops import OpOverload
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.autograd import Variable, forward_ad
from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction
from torch.fx._lazy_graph_module import _use_lazy_graph_module as use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack

# The mode of torch.device in a with statement, and of torch.set_default_device.
from torch.utils._device import DeviceContext

# Modes, which see each operation, and nested structures of tensors.
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
from torch.utils._python_dispatch import _get_current_dispatch_mode as current_dispatch_mode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = [
    "TENSOR_FUNCTIONS",
    "BelowAutograd",
    "DataDependentOutputException",
    "DeviceContext",
    "DisableTorchFunction",
    "DispatchModeKey",
    "DynamicOutputShapeException",
    "EagerDispatchMode",
    "FakeTensor",
    "FakeTensorMode",
    "OpOverload",
    "SingleLevelFunction",
    "TorchDispatchMode",
    "TransformType",
    "TreeSpec",
    "add_dynamo_guard",
    "any_autocast_enabled",
    "any_global_module_hook",
    "any_requires_grad",
    "assert_async",
    "check",
    "constant_for_dynamo",
    "core_aten_decompositions",
    "counts_flops",
    "current_autograd_node",
    "current_dispatch_mode",
    "current_graph_task_id",
    "disable_current_modes",
    "dispatch_mode",
    "dispatch_mode_count",
    "dynamo_imported",
    "enable_single_level_autograd_function",
    "exported_function",
    "fake_tensor_logger",
    "forward_mode_active",
    "forward_mode_inactive",
    "function_mode_count",
    "function_modes",
    "functional_assert_async",
    "functorch_interpreter",
    "functorch_interpreters",
    "get_decompositions",
    "get_proxy_mode",
    "has_storage",
    "in_onnx_export",
    "is_functional_tensor",
    "jit_tracing_state",
    "keep_graph",
    "make_fx",
    "pop_saved_tensors_hooks",
    "pre_dispatch_modes",
    "push_saved_tensors_hooks",
    "queue_callback",
    "register_decomposition",
    "renew_dynamo_lock",
    "scan_operator",
    "tensor_layout",
    "top_saved_tensors_hooks",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "use_lazy_graph_module",
]

# Which transform is active, and how.
jit_tracing_state = torch._C._get_tracing_state  # None outside of torch.jit.trace
functorch_interpreter = torch._C._functorch.peek_interpreter_stack  # None outside of torch.func
functorch_interpreters = torch._C._functorch.get_interpreter_stack
TransformType = torch._C._functorch.TransformType
any_autocast_enabled = torch._C._is_any_autocast_enabled
dispatch_mode = torch._C._get_dispatch_mode  # by the following keys
DispatchModeKey = torch._C._TorchDispatchModeKey
pre_dispatch_modes = torch._ops.mode_stack_state_for_pre_dispatch()  # type: ignore[no-untyped-call]
dispatch_mode_count = torch._C._len_torch_dispatch_stack  # also those that torch itself uses
function_mode_count = torch._C._len_torch_function_stack
function_modes: Callable[[], list[Any]] = _get_current_function_mode_stack  # those in with statements
any_global_module_hook: Callable[[], bool] = _has_any_global_hook  # a hook that all modules call


class EagerDispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode whose first use doesn't import the modules of torch.compile, which takes a second."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def forward_mode_active() -> bool:
    """Return whether ``torch.autograd.forward_ad`` is active; torch.func has levels of its own."""
    return forward_ad._current_level >= 0


# The dictionary, the key and the value that say that no level of forward_ad is active, for compiled code.
forward_mode_inactive = vars(forward_ad), "_current_level", -1

# The backward pass.
current_autograd_node = torch._C._current_autograd_node  # None outside of a backward pass
current_graph_task_id = torch._C._current_graph_task_id  # -1 outside of a backward pass
queue_callback = Variable._execution_engine.queue_callback  # run a function after the backward pass
keep_graph = torch._C._autograd._get_current_graph_task_keep_graph  # True with retain_graph=True
top_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks
pop_saved_tensors_hooks = torch._C._autograd._pop_saved_tensors_default_hooks
push_saved_tensors_hooks = torch._C._autograd._push_saved_tensors_default_hooks
any_requires_grad = torch._C._any_requires_grad  # of tensors and lists of tensors
BelowAutograd = torch._C._AutoDispatchBelowAutograd  # inside, operators skip their autograd kernel
DisableTorchFunction = torch._C.DisableTorchFunction

enable_single_level_autograd_function: Callable[[], Any] = (
    autograd_function.enable_single_level_autograd_function  # type: ignore[attr-defined]
)

# Warnings and errors of tensors without data.
fake_tensor_logger = logging.getLogger("torch._subclasses.fake_tensor")

# Tensors and their memory.
has_storage = torch._C._has_storage
is_functional_tensor = torch._is_functional_tensor

# The functions that ``call_plan.cpp`` reads and creates tensors with, see :func:`exported_function`.
TENSOR_FUNCTIONS = (
    "aoti_torch_get_sizes",
    "aoti_torch_get_strides",
    "aoti_torch_get_dim",
    "aoti_torch_get_dtype",
    "aoti_torch_get_data_ptr",
    "aoti_torch_empty_strided",
    "aoti_torch_delete_tensor_object",
    "aoti_torch_grad_mode_is_enabled",
    "_Z16THPVariable_WrapRKN2at10TensorBaseE",  # the C++ function THPVariable_Wrap
)


def exported_function(name: str) -> int | None:
    """Return the address of a function that torch's libraries export, or None if there is none."""
    for library in _torch_libraries():
        try:
            return ctypes.cast(library[name], ctypes.c_void_p).value
        except AttributeError:
            continue
    return None


@functools.cache
def _torch_libraries() -> list[ctypes.CDLL]:
    """Return torch's libraries, which are loaded already."""
    names = {"darwin": "lib{}.dylib", "win32": "{}.dll"}.get(sys.platform, "lib{}.so")
    folder = Path(torch.__file__).parent / "lib"
    paths = [folder / names.format(name) for name in ("torch_cpu", "torch_python")]
    return [ctypes.CDLL(str(path)) for path in paths if path.exists()]


def tensor_layout() -> tuple[int, int, int, int] | None:
    """Return where a tensor lies in its Python object, and where its dispatch keys lie, both in bytes.

    Returns:
        The offset of the tensor in its Python object; the offset of the keys in the memory that the tensor
        points to; and the keys of a tensor in the CPU's memory, outside and inside of inference mode. None if
        they can't be found.
    """
    plain = torch.zeros(2, 3)
    with torch.inference_mode():
        inference = torch.zeros(2, 3)
    examples = [plain, inference, torch._neg_view(plain), plain.to_sparse(), torch.nn.Parameter(plain)]
    objects = [_words(id(tensor), object.__sizeof__(tensor)) for tensor in examples]
    contents = [_words(tensor._cdata, _TENSOR_BYTES) for tensor in examples]
    keys = [torch._C._dispatch_keys(tensor).raw_repr() for tensor in examples]
    own = _common_index(objects, [tensor._cdata for tensor in examples])
    of_keys = _common_index(contents, keys)
    if own is None or of_keys is None or keys[4] != keys[0] or keys[0] in keys[2:4]:
        return None
    return 8 * own, 8 * of_keys, keys[0], keys[1]


_TENSOR_BYTES = 192  # the size of a c10::TensorImpl on 64-bit systems


def _words(address: int, size: int) -> list[int]:
    """Return the memory at an address as 64-bit numbers."""
    return list((ctypes.c_uint64 * (size // 8)).from_address(address))


def _common_index(lists: list[list[int]], values: list[int]) -> int | None:
    """Return the only index at which each list has its value, or None."""
    columns = zip(*lists, strict=False)
    indices = [index for index, column in enumerate(columns) if list(column) == values]
    return indices[0] if len(indices) == 1 else None


# Checks that also work in graphs.
check = torch._check
assert_async = torch._assert_async
functional_assert_async = torch.ops.aten._functional_assert_async.msg

_Function = TypeVar("_Function", bound=Callable[..., Any])


def in_onnx_export() -> bool:
    """Return whether ``torch.onnx.export`` is active."""
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


def counts_flops() -> bool:
    """Return whether a ``torch.utils.flop_counter.FlopCounterMode`` is active, outside of torch.compile."""
    if torch.compiler.is_compiling() or "torch.utils.flop_counter" not in sys.modules:
        return False
    modes = _get_current_dispatch_mode_stack()
    return any(type(mode).__module__ == "torch.utils.flop_counter" for mode in modes)


def constant_for_dynamo(function: _Function) -> _Function:
    """Let torch.compile call a function while it compiles, and take its result as a constant.

    :func:`torch.compiler.assume_constant_result` does the same, but imports torch.compile's own packages,
    which takes 1.5 s.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def add_dynamo_guard(is_valid: Callable[[], bool], description: str) -> None:
    """Let torch.compile compile the current function again when ``is_valid`` returns False.

    It does nothing outside of torch.compile.
    """
    context = TracingContext.try_get()
    if context is None:
        return
    from torch._dynamo.source import GlobalStateSource

    def create(builder: Any, _: Guard) -> None:
        builder.guard_manager.root.add_lambda_guard(lambda _: is_valid(), [description], None)

    context.guards_context.dynamo_guards.add(Guard(GlobalStateSource(), create))


def dynamo_imported() -> bool:
    """Return whether torch.compile may have compiled something."""
    return "torch._dynamo" in sys.modules


def renew_dynamo_lock() -> None:
    """Renew the lock that torch.compile holds while it compiles, for a forked process."""
    convert_frame: Any = sys.modules.get("torch._dynamo.convert_frame")
    if hasattr(convert_frame, "compile_lock"):
        convert_frame.compile_lock = threading.RLock()
