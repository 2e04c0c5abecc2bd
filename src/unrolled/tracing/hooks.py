"""Hooks that observe the calls of a model's recurrent layers without changing them."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from unrolled.engines import memory
from unrolled.engines._torch_private import current_graph_task_id, queue_callback
from unrolled.engines.torch_ops import transforms
from unrolled.layers.cell_layers import as_sequence, first_state, is_single_step
from unrolled.layers.convert import as_recurrent
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.tensors import map_tensors, tensors
from unrolled.tracing.equivalent_layer import equivalent_layer, observe_inner_calls, overridden_base
from unrolled.tracing.indexing import equal_up_to_rounding
from unrolled.tracing.internal_uses import on_internal_gradient
from unrolled.tracing.random_state import RandomState, capture_random_state, cuda_devices

_LAYERS = (Recurrent, nn.RNNBase)
MISMATCH = (
    "differs from what the call returned: a hook or parametrization changed the result, or rounding errors "
    "grow from step to step"
)

_IN_A_MODEL = (
    "To trace a layer inside a model, run the model: with unrolled.record(model) as rec: model(...). "
    "Then use rec[{!r}]."
)


class UnsupportedCallError(ValueError):
    """A call that can't be traced. The message says why, with the call as its subject."""


@dataclass(eq=False)
class LayerCall:
    """One call of a layer.

    It holds no reference to the autograd graph, because the graph holds references to it.

    Attributes:
        recurrent: The equivalent layer of this library.
        input: Input of the call; packed if sequence lengths were passed.
        initial_state: Initial state of the call, or None.
        random_state: Random state before the call.
        output: Output of the call, or its data if it is packed.
        final_state: Final state that the call returned.
        lengths: The sequence lengths that were passed with a padded input, or None.
        is_single_step: Whether the module is a single-step cell. Its input and states have an axis of size 1
            in front here: that of time, or of layers.
    """

    recurrent: Recurrent
    input: Tensor | PackedSequence
    initial_state: Any
    random_state: RandomState
    output: Tensor
    final_state: Any
    lengths: Tensor | None
    is_single_step: bool = False

    @classmethod
    def from_forward(
        cls,
        module: nn.Module,
        args: Any,
        kwargs: dict[str, Any],
        random_state: RandomState,
        result: Any,
        *,
        recurrent: Recurrent | None = None,
    ) -> LayerCall:
        """Create a call from the arguments and the result of a module's forward method.

        Args:
            module: The module that was called.
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.
            random_state: Random state before the call.
            result: Result of the call.
            recurrent: The equivalent layer of this library, if it is known.

        Raises:
            UnsupportedCallError: If the call can't be traced.
        """
        if transforms.active():
            raise UnsupportedCallError("was inside a torch transform, such as torch.func.vmap")
        recurrent = equivalent_layer(module) if recurrent is None else recurrent
        x, state = input_and_state(args, kwargs)
        if is_single_step(module):
            x, state, final_state = map(as_sequence, map(_detached, (x, state, result)))
            result = first_state(final_state), final_state
        for name in ("resets", "reset_state"):
            if kwargs.get(name) is not None:
                raise UnsupportedCallError(f"used {name}=, which changes states between steps")
        if kwargs.get("mask") is not None:
            raise UnsupportedCallError("used mask=, which skips steps: pass lengths instead")
        if x.data.is_meta:
            raise UnsupportedCallError("was on the meta device, which holds no values")
        if transforms.autocast_enabled(x.data.device.type):
            raise UnsupportedCallError("was under autocast, which traces don't support")
        try:
            recurrent.check_only_step("a trace")
        except ValueError as error:
            raise UnsupportedCallError(f"isn't supported: {error}") from None
        lengths = kwargs.get("lengths")
        if lengths is not None:
            lengths = torch.as_tensor(lengths, device="cpu").long()
            if not lengths.all():
                raise UnsupportedCallError("used lengths= with a row of length 0")
            x = pack_padded_sequence(x, lengths, recurrent.batch_first, enforce_sorted=False)
        output = result[0].data if isinstance(result[0], PackedSequence) else result[0]
        x, state, output, final_state = map(_detached, (x, state, output, result[1]))
        single = is_single_step(module)
        return cls(recurrent, x, state, random_state, output, final_state, lengths, single)

    def with_input_layout(self, output: Tensor) -> Tensor:
        """Convert an output or its gradient to the layout of the input, or of its data if it is packed."""
        if self.lengths is None:
            return output
        return pack_padded_sequence(
            output, self.lengths, self.recurrent.batch_first, enforce_sorted=False
        ).data

    def on_backward(
        self, inputs: Any, result: Any, callback: Callable[[Tensor | None, list[Tensor | None]], None]
    ) -> bool:
        """Call a function after each backward pass that reaches the result of the call.

        Args:
            inputs: Arguments of the call.
            result: What the call returned.
            callback: Receives the gradient of the output, in the layout of the input or its data, and the
                gradients of the final states. None means no gradient.

        Returns:
            Whether a backward pass can reach the result.
        """
        outputs = tensors(result if self.is_single_step else result[:2])
        count, gradients, graph_task = len(outputs), dict[int, Tensor](), -1
        internal = dict[int, Tensor]()

        # torch's register_multi_grad_hook does the same, but its hook holds the graph that holds the hook, so
        # that neither is ever freed.
        def store(index: int, gradient: Tensor) -> None:
            nonlocal graph_task
            if graph_task != current_graph_task_id():
                graph_task = current_graph_task_id()
                gradients.clear()
                internal.clear()
                queue_callback(finish)
            gradients[index] = gradient

        def store_internal(index: int, gradient: Tensor) -> None:
            internal[index] = internal[index] + gradient if index in internal else gradient

        def finish() -> None:
            output: Tensor | None = None
            states = [gradients.get(k) for k in range(count)]
            for k, gradient in internal.items():
                total = states[k]
                states[k] = None if total is None else total - gradient
            gradients.clear()
            internal.clear()
            if self.is_single_step:
                states = [None if state is None else state.unsqueeze(0) for state in states]
            else:
                output, *states = states
            callback(None if output is None else self.with_input_layout(output), states)

        differentiable = [k for k, tensor in enumerate(outputs) if tensor.requires_grad]
        for k in differentiable:
            outputs[k].register_hook(functools.partial(store, k))  # type: ignore[no-untyped-call]
        if self.is_single_step and len(differentiable) > 1:
            on_internal_gradient(outputs, inputs, store_internal)
        return bool(differentiable)


def _detached(value: Any) -> Any:
    return map_tensors(value, Tensor.detach)


def input_and_state(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Return the input and the initial state, or None, from the arguments of a layer's forward method."""
    arguments = dict(zip(("x", "state"), args, strict=False)) | kwargs
    state = next((arguments[name] for name in ("state", "hx") if arguments.get(name) is not None), None)
    return arguments.get("x", arguments.get("input")), state


def require_recurrent_layers(model: nn.Module, caller: str) -> dict[str, nn.Module]:
    """Return the recurrent layers and cells of a model by name. A shared one has each of its names.

    Args:
        model: The model.
        caller: The function that needs the layers, for error messages.

    Raises:
        TypeError: If the model isn't a module.
        ValueError: If it has no recurrent layers.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller} expects a torch.nn.Module, got {type(model).__name__}")
    layers = recurrent_layers(model)
    if not layers:
        raise ValueError(f"{caller} needs a model with recurrent layers, but {type(model).__name__} has none")
    return layers


def recurrent_layers(model: Any) -> dict[str, nn.Module]:
    """Return the recurrent layers and single-step cells of a model by name; empty if it isn't a module.

    A shared layer appears under each of its names.
    """
    modules = model.named_modules(remove_duplicate=False) if isinstance(model, nn.Module) else ()
    return {name: module for name, module in modules if isinstance(module, _LAYERS) or is_single_step(module)}


def recurrent_for_input(module: nn.Module, x: Any) -> Recurrent:
    """Return the equivalent layer of this library, after checking the module and the dtype of its input.

    Raises:
        TypeError: If the module isn't a recurrent layer, or overrides its forward method.
        ValueError: If the input has integers instead of features.
    """
    try:
        recurrent = as_recurrent(module)
    except TypeError as error:
        names = [name for name in recurrent_layers(module) if name]
        raise TypeError(f"{error}. {_IN_A_MODEL.format(names[0])}" if names else str(error)) from None
    data = x.data if isinstance(x, PackedSequence) else x
    if isinstance(data, Tensor) and not (data.is_floating_point() or data.is_complex()):
        raise ValueError(
            f"{type(module).__name__} expects features, but got dtype {data.dtype}, such as tokens before an "
            f"embedding. {_IN_A_MODEL.format('name of the layer')}"
        )
    return recurrent


def check_memory(name: str, *values: Any) -> None:
    """Raise RuntimeError if the memory of a tensor was freed, or only some tensors have values."""
    memory.check_not_freed(tensors(values))
    memory.check_meta(name, tensors(values))


def results_match(actual: Any, expected: Any) -> bool:
    """Whether all tensors of two results are equal up to rounding."""
    pairs = zip(tensors(actual), tensors(expected), strict=True)
    return all(bool(equal_up_to_rounding(a.detach(), b.detach()).all()) for a, b in pairs)


class ModuleHook:
    """A forward hook that copies and pickles of the module replace with a function that does nothing.

    Args:
        function: The hook.
        argument_count: The number of its arguments.

    While the hook is being registered or removed, torch may call it without ``kwargs`` in another thread.
    Such calls are ignored.
    """

    def __init__(self, function: Callable[..., None], argument_count: int) -> None:
        self._function, self._argument_count = function, argument_count

    def __call__(self, *call: Any) -> None:
        """Call the function, unless arguments are missing."""
        if len(call) == self._argument_count:
            self._function(*call)

    def __reduce__(self) -> Any:
        # From the standard library, so that the pickled module can be loaded without this library.
        return getattr, (contextlib.nullcontext(), "__exit__")


def observe_calls(
    modules: Sequence[nn.Module],
    should_observe: Callable[[nn.Module, Any, Any], bool],
    callback: Callable[[nn.Module, Any, dict[str, Any], RandomState, Any], None],
) -> Callable[[], None]:
    """Pass each call of some modules to a callback.

    The callback sees the arguments and the result of the module's forward method itself, without the changes
    by other hooks. If a subclass overrides `forward`, it sees the call of `super().forward`. Calls that a
    backward pass recomputes are skipped, and so are calls in code that torch.compile compiled.

    Args:
        modules: The modules.
        should_observe: Decides from module, args and kwargs at the start of a call whether to pass it to the
            callback.
        callback: Receives the module, args, kwargs, random state before the call, and result. Its errors are
            raised in the call.

    Returns:
        A function that removes the hooks.
    """
    local = threading.local()  # .started: the random states before the running calls, by the module's id
    observed = {id(module) for module in modules}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        # A copy of a module shares its hooks, but isn't observed.
        if torch.compiler.is_compiling() or id(module) not in observed:
            return
        started = vars(local).setdefault("started", {})
        started.pop(id(module), None)
        if current_graph_task_id() == -1 and should_observe(module, args, kwargs):
            x = next(iter((*args, *kwargs.values())), None)
            started[id(module)] = capture_random_state(cuda_devices(x))

    def after(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if not torch.compiler.is_compiling():
            random_state = vars(local).get("started", {}).pop(id(module), None)
            if random_state is not None:
                callback(module, args, kwargs, random_state, result)

    handles = []
    inner = [module for module in modules if overridden_base(module) is not None]
    end_inner = observe_inner_calls(inner, before, after)
    for module in modules:
        if module in inner:
            continue
        handles.append(module.register_forward_pre_hook(ModuleHook(before, 3), with_kwargs=True))
        handles.append(module.register_forward_hook(ModuleHook(after, 4), with_kwargs=True, prepend=True))

    def remove() -> None:
        end_inner()
        for handle in handles:
            handle.remove()

    return remove
