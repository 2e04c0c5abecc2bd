"""Everything that this library uses of torch's private API, which may change without notice.

``tests/engines/test_torch_private.py`` checks what each name does, so that a change is noticed here first.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

# Capturing a step: decompositions into torch's core operators, tensors without data, recorded graphs.
from torch._decomp import core_aten_decompositions, get_decompositions

# Functions whose gradients can be differentiated again under every transform of torch.func.
from torch._functorch import autograd_function

# What torch.compile assumes about a function that it has compiled.
from torch._guards import Guard, TracingContext
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
from torch.utils._python_dispatch import _get_current_dispatch_mode as current_dispatch_mode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = [
    "BelowAutograd",
    "DataDependentOutputException",
    "DeviceContext",
    "DisableTorchFunction",
    "DispatchModeKey",
    "DynamicOutputShapeException",
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
    "current_autograd_node",
    "current_dispatch_mode",
    "current_graph_task_id",
    "disable_current_modes",
    "dispatch_mode",
    "dispatch_mode_count",
    "dynamo_imported",
    "enable_single_level_autograd_function",
    "fake_tensor_logger",
    "forward_mode_active",
    "function_mode_count",
    "function_modes",
    "functional_assert_async",
    "functorch_interpreter",
    "functorch_interpreters",
    "get_decompositions",
    "get_proxy_mode",
    "has_storage",
    "is_functional_tensor",
    "jit_tracing_state",
    "keep_graph",
    "make_fx",
    "pop_saved_tensors_hooks",
    "pre_dispatch_modes",
    "push_saved_tensors_hooks",
    "queue_callback",
    "renew_dynamo_lock",
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


def forward_mode_active() -> bool:
    """Return whether ``torch.autograd.forward_ad`` is active; torch.func has levels of its own."""
    return forward_ad._current_level >= 0


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

# Checks that also work in graphs.
check = torch._check
assert_async = torch._assert_async
functional_assert_async = torch.ops.aten._functional_assert_async.msg

_Function = TypeVar("_Function", bound=Callable[..., Any])


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
