"""Calls of a model's recurrent layers as they come, without touching them."""

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

from unrolled.engines.torch_ops import transforms
from unrolled.layers.convert import as_recurrent
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.single_step import SingleStep
from unrolled.layers.tensors import map_tensors, tensors
from unrolled.tracing.indexing import same
from unrolled.tracing.random_state import cuda_devices, random_state

_LAYERS = (Recurrent, nn.RNNBase)
_CELLS = (SingleStep, nn.RNNCellBase)
DIFFERS = (
    "differs from what its call returned: a hook or parametrization changed that, or rounding grows from "
    "step to step"
)
SINGLE_STEPS = "what passes between their calls is the model's own affair, and isn't followed"

_IN_A_MODEL = (
    "a layer inside of a model is traced while that runs: with unrolled.record(model) as rec: model(...), "
    "then rec[{!r}]"
)


class UnseenError(ValueError):
    """A call of which no trace can be made, and why."""


@dataclass(eq=False)
class LayerCall:
    """One call of a layer. It holds nothing of the graph of gradients, which may hold it.

    Attributes:
        recurrent: the layer, as ours.
        x: what it was given; packed where the lengths of rows were given.
        state: the initial state that it was given, or None.
        drawn_from: the random state before it.
        output: what it returned, or the data of it where that is packed.
        final: the final state that it returned.
        lengths: of the rows of a padded input, where they were given.
    """

    recurrent: Recurrent
    x: Tensor | PackedSequence
    state: Any
    drawn_from: list[Tensor]
    output: Tensor
    final: Any
    lengths: Tensor | None

    @classmethod
    def of(
        cls, module: nn.Module, args: Any, kwargs: dict[str, Any], drawn_from: list[Tensor], result: Any
    ) -> LayerCall:
        """A call of a layer, from what it was given and what it returned.

        Raises:
            UnseenError: it asked for what a trace doesn't have.
        """
        if transforms.active():
            raise UnseenError("it was inside a transform of torch, such as torch.func.vmap")
        recurrent = as_recurrent(module)
        given = dict(zip(("x", "state"), args, strict=False)) | kwargs
        x: Any = given.get("x", given.get("input"))
        state = next((given[name] for name in ("state", "hx") if given.get(name) is not None), None)
        for name in ("resets", "reset_state"):
            if given.get(name) is not None:
                raise UnseenError(f"{name}= changed its states between the steps")
        if x.data.is_meta:
            raise UnseenError("it was on the meta device, where there are no numbers")
        if transforms.autocasts(x.data.device.type):
            raise UnseenError("it was under autocast, which a trace doesn't follow")
        try:
            recurrent.check_noise("a trace")
        except ValueError as error:
            raise UnseenError(str(error)) from None
        lengths = given.get("lengths")
        if lengths is not None:
            lengths = torch.as_tensor(lengths, device="cpu").long()
            if not lengths.all():
                raise UnseenError("lengths= gave rows without a step")
            x = pack_padded_sequence(x, lengths, recurrent.batch_first, enforce_sorted=False)
        output = result[0].data if isinstance(result[0], PackedSequence) else result[0]
        x, state, output, final = (map_tensors(part, Tensor.detach) for part in (x, state, output, result[1]))
        return cls(recurrent, x, state, drawn_from, output, final, lengths)

    def as_input(self, value: Tensor) -> Tensor:
        """The output or its gradient, laid out as the input or its data."""
        if self.lengths is None:
            return value
        first = self.recurrent.batch_first
        return pack_padded_sequence(value, self.lengths, first, enforce_sorted=False).data

    def on_backward(self, result: Any, take: Callable[[Tensor | None, list[Tensor | None]], None]) -> bool:
        """Have ``take(gradient of the output, gradients of the final states)`` run after a backward came.

        Args:
            result: what the call returned.
            take: gets the gradient of the output laid out as the input or its data; None for no gradient.

        Returns:
            Whether one can come.
        """
        made = tensors(result[:2])
        count, found, task = len(made), dict[int, Tensor](), -1

        # register_multi_grad_hook does this too, but holds the graph whose hook it is: it is never freed
        def arrived(place: int, gradient: Tensor) -> None:
            nonlocal task
            if task != torch._C._current_graph_task_id():
                task = torch._C._current_graph_task_id()
                found.clear()
                torch.autograd.Variable._execution_engine.queue_callback(done)
            found[place] = gradient

        def done() -> None:
            output, *states = (found.get(k) for k in range(count))
            found.clear()
            take(None if output is None else self.as_input(output), states)

        can = [k for k, tensor in enumerate(made) if tensor.requires_grad]
        for k in can:
            made[k].register_hook(functools.partial(arrived, k))  # type: ignore[no-untyped-call]
        return bool(can)


def layers_of(model: nn.Module, what: str) -> dict[str, nn.Module]:
    """The recurrent layers of a model by name; those of several names by each of them.

    Raises:
        TypeError: it is no module.
        ValueError: it holds none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{what} takes a module, got {type(model).__name__}")
    found = layers_in(model)
    if not found:
        modules = model.named_modules(remove_duplicate=False)
        cells = ", ".join(repr(name) for name, module in modules if isinstance(module, _CELLS))
        single = f" but single steps ({cells}): {SINGLE_STEPS}" if cells else ""
        raise ValueError(
            f"{what} takes a model with recurrent layers, {type(model).__name__} has none{single}"
        )
    return found


def layers_in(model: Any) -> dict[str, nn.Module]:
    """The recurrent layers of a model by name, those of several names by each of them; none of no module."""
    modules = model.named_modules(remove_duplicate=False) if isinstance(model, nn.Module) else ()
    return {name: module for name, module in modules if isinstance(module, _LAYERS)}


def layer_to_run(module: nn.Module, x: Any) -> Recurrent:
    """Our layer of a module that is to run on x by itself.

    Raises:
        TypeError: the module is no recurrent layer, or overrides the forward of one.
        ValueError: x holds no features, but whole numbers.
    """
    try:
        recurrent = as_recurrent(module)
    except TypeError as error:
        inside = [name for name in layers_in(module) if name]
        raise TypeError(f"{error}: {_IN_A_MODEL.format(inside[0])}" if inside else str(error)) from None
    data = x.data if isinstance(x, PackedSequence) else x
    if isinstance(data, Tensor) and not (data.is_floating_point() or data.is_complex()):
        raise ValueError(
            f"{type(module).__name__} reads features, got numbers of the type {data.dtype}, such as those of "
            f"tokens before an embedding: {_IN_A_MODEL.format('name of the layer')}"
        )
    return recurrent


def agree(result: Any, there: Any) -> bool:
    """Whether two results are the same but for rounding."""
    pairs = zip(tensors(result), tensors(there), strict=True)
    return all(bool(same(a.detach(), b.detach()).all()) for a, b in pairs)


def is_single_step(module: nn.Module | None) -> bool:
    """Whether a module is a cell that its caller runs step by step."""
    return isinstance(module, _CELLS)


class _Hook:
    """A hook that stays behind where a module is copied or pickled: there is one that does nothing.

    In the moment in which it is registered or removed, a call of another thread may come without keywords.
    """

    def __init__(self, function: Callable[..., None], arguments: int) -> None:
        self._function, self._arguments = function, arguments

    def __call__(self, *call: Any) -> None:
        if len(call) == self._arguments:
            self._function(*call)

    def __reduce__(self) -> Any:
        # of the standard library, so that whoever loads the module needs nothing of this one
        return getattr, (contextlib.nullcontext(), "__exit__")


def observe(
    modules: Sequence[nn.Module],
    wants: Callable[[nn.Module], bool],
    take: Callable[[nn.Module, Any, dict[str, Any], list[Tensor], Any], None],
) -> Callable[[], None]:
    """Have ``take(module, args, kwargs, random state before, result)`` see calls of modules.

    It is given what the module's forward got and returned: hooks that change that run outside of it. Calls
    that a backward makes anew are left out, as are those inside of what torch compiles.

    Args:
        modules: any.
        wants: whether a call that begins is to be seen.
        take: what sees it. An error that it raises is raised in the call.

    Returns:
        What ends it.
    """
    here = threading.local()  # .before: the random states of calls that have begun, by the module's id
    known = {id(module) for module in modules}

    def first(module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or id(module) not in known:  # not a copy that shares its hooks
            return
        begun = vars(here).setdefault("before", {})
        begun.pop(id(module), None)
        if torch._C._current_graph_task_id() == -1 and wants(module):
            given = next(iter((*args, *kwargs.values())), None)
            begun[id(module)] = random_state(cuda_devices(given))

    def last(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if not torch.compiler.is_compiling():
            before = vars(here).get("before", {}).pop(id(module), None)
            if before is not None:
                take(module, args, kwargs, before, result)

    hooks = []
    for module in modules:
        hooks.append(module.register_forward_pre_hook(_Hook(first, 3), with_kwargs=True))
        hooks.append(module.register_forward_hook(_Hook(last, 4), with_kwargs=True, prepend=True))

    def end() -> None:
        for hook in hooks:
            hook.remove()

    return end
