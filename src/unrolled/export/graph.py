"""Read the graph of a model, as torch.fx traces it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from unrolled.export.builder import Builder
from unrolled.export.errors import ExportError
from unrolled.export.program import Value
from unrolled.export.stateless import Call, weighted_sum
from unrolled.export.supported import (
    DROPOUT_FUNCTIONS,
    ELEMENTWISE_FUNCTIONS,
    ELEMENTWISE_METHODS,
    ELEMENTWISE_MODULES,
    IDENTITY_METHODS,
    IDENTITY_MODULES,
    LAST_AXIS_MODULES,
    PADDING_MODULES,
    SOFTMAX_MODULES,
    function_of,
    input_features,
)
from unrolled.export.traced import FinalState, LayerResult, Traced, input_width, location
from unrolled.layers.recurrent import Recurrent


class GraphReader:
    """Reads the graph of a model, node by node.

    Args:
        builder: Collects the stages.
        model: The model.
        graph: Its graph.
    """

    def __init__(self, builder: Builder, model: nn.Module, graph: fx.Graph) -> None:
        self._builder, self._model, self._graph = builder, model, graph
        self._roles: dict[int, str] = {}  # of the axes: time, batch or features
        self._traced: dict[fx.Node, Any] = {}
        self._output: Traced | None = None
        self._node: fx.Node  # the node that is read

    # --- the whole graph ---

    def read(self) -> tuple[Value, Call | Value]:
        """Read all nodes, and return the input and the output."""
        source = Value(input_width(self._model, self._graph))
        for node in self._graph.nodes:
            self._node = node
            if node.op == "placeholder":
                self._traced[node] = Traced(source, (0, 1, 2)) if not self._traced else None
            elif node.op == "output":
                self._output = self._result(node.args[0])
            elif node.users:
                self._traced[node] = getattr(self, f"_{node.op}")(node)
        assert self._output is not None
        return source, self._output.content

    def run(self, x: Tensor) -> Tensor:
        """Return the output of the model itself for a sequence.

        Args:
            x: ``(time, features)``, or ``(time,)`` whole numbers.

        Returns:
            The output, ``(time, features)``.
        """
        assert self._output is not None
        order = ("time", "batch", "features")[: x.dim() + 1]
        x = x.unsqueeze(1).permute([order.index(self._roles[axis]) for axis in range(x.dim() + 1)])
        result = self._model(x)
        while isinstance(result, (tuple, list)):
            result = result[0]
        positions = {self._roles[axis]: k for k, axis in enumerate(self._output.axes)}
        if result.dim() != 3:
            raise self._error(f"returns {result.dim()} axes, expected time, batch and features")
        output: Tensor = result.permute([positions[role] for role in ("time", "batch", "features")])[:, 0]
        return output.contiguous()

    def _result(self, value: Any) -> Traced:
        """Return the output of the model: the first of several, because states stay inside."""
        while isinstance(value, (tuple, list)):
            value = value[0]
        found = self._traced.get(value) if isinstance(value, fx.Node) else None
        result = found.output if isinstance(found, LayerResult) else found
        if not isinstance(result, Traced):
            raise self._error("doesn't return a value for each time step")
        self._check_complete(result)
        return result

    # --- kinds of nodes ---

    def _get_attr(self, node: fx.Node) -> Tensor:
        value: Any = self._model
        for part in str(node.target).split("."):
            value = getattr(value, part)
        assert isinstance(value, Tensor)
        return value.detach()

    def _call_module(self, node: fx.Node) -> Any:
        module = self._model.get_submodule(str(node.target))
        if isinstance(module, Recurrent):
            return self._layer(node, module)
        given = self._traced.get(node.args[0]) if node.args else None  # type: ignore[arg-type]
        if len(node.args) != 1 or node.kwargs or not isinstance(given, Traced):
            raise self._error(f"is given {self._describe(given)}, expected one value of each time step")
        if isinstance(module, nn.Embedding):
            return self._embedding(module, given)
        if isinstance(module, nn.Conv1d):
            return self._convolution(module, given)
        if isinstance(module, PADDING_MODULES):
            return self._pad(given, module.padding, module.value)
        if isinstance(module, IDENTITY_MODULES):
            return given
        self._check_complete(given)
        if isinstance(module, nn.BatchNorm1d):
            if module.running_mean is None:
                raise self._error("normalizes over the batch and the time (track_running_stats=False)")
            self._assign(given, ("batch", "features", "time"))
        elif isinstance(module, SOFTMAX_MODULES):
            self._require_features(given, -1 if module.dim is None else module.dim)
        elif isinstance(module, LAST_AXIS_MODULES):
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) != 1:
                raise self._error("normalizes over several axes, expected the features only")
            self._require_features(given, -1)
        elif not isinstance(module, ELEMENTWISE_MODULES):
            raise self._error("is not among the modules that can be exported (see docs/deploy.md)")
        self._check_width(module, given)
        function, weights = function_of(module)
        return self._call(function, [given], weights)

    def _call_function(self, node: fx.Node) -> Any:
        target: Any = node.target
        if target is operator.getitem:
            return self._item(node)
        if target in (torch.cat, torch.concat, torch.concatenate):
            return self._concatenate(node)
        if target is F.pad:
            given = self._operand(node.args[0])
            return self._pad(given, *_pad_arguments(*node.args[1:], **node.kwargs))  # type: ignore[arg-type]
        if target in (torch.transpose, torch.permute, torch.swapaxes):
            return self._moved(node, str(target.__name__))
        if target in DROPOUT_FUNCTIONS:
            return self._operand(node.args[0])
        if target in (F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, F.glu):
            return self._over_features(node, target)
        if target in ELEMENTWISE_FUNCTIONS:
            return self._elementwise(node, target)
        raise self._error("is not among the functions that can be exported (see docs/deploy.md)")

    def _call_method(self, node: fx.Node) -> Any:
        name = str(node.target)
        if name in IDENTITY_METHODS:
            return self._operand(node.args[0])
        if name in ("transpose", "permute", "swapaxes", "mT"):
            return self._moved(node, name)
        if name in ("softmax", "log_softmax"):
            return self._over_features(node, getattr(torch, name))
        if name in ELEMENTWISE_METHODS:
            return self._elementwise(node, getattr(torch, name))
        raise self._error("is not among the methods that can be exported (see docs/deploy.md)")

    # --- modules ---

    def _layer(self, node: fx.Node, layer: Recurrent) -> LayerResult:
        name = str(node.target)
        given = self._traced.get(node.args[0]) if node.args else None  # type: ignore[arg-type]
        if not isinstance(given, Traced):
            raise self._error(f"is given {self._describe(given)}, expected one value of each time step")
        options = [key for key, value in node.kwargs.items() if value is not None]
        if any(one is not None for one in node.args[1:]):
            options.append("a state")
        if options:
            raise self._error(f"is called with {', '.join(options)}, which C code doesn't have")
        self._check_complete(given)
        self._assign(
            given, ("batch", "time", "features") if layer.batch_first else ("time", "batch", "features")
        )
        self._check_width(layer, given)
        return LayerResult(name, replace(given, content=self._builder.layer(name, layer, given.content)))

    def _embedding(self, module: nn.Embedding, given: Traced) -> Traced:
        is_input = (
            isinstance(given.content, Value) and given.content is next(iter(self._traced.values())).content
        )
        if not is_input or given.axes != (0, 1, 2) or module.max_norm is not None:
            raise self._error(
                "is not the first module, or has max_norm: only the input can be looked up in a table"
            )
        self._assign(given, (None, None, "features"))
        return replace(given, content=self._builder.embedding(module))

    def _convolution(self, module: nn.Conv1d, given: Traced) -> Traced:
        past = (module.kernel_size[0] - 1) * module.dilation[0]
        padding = 0 if module.padding == "valid" or past == 0 else module.padding
        both = padding[0] if isinstance(padding, tuple) else -1 if padding == "same" else 0
        if module.stride != (1,) or module.padding_mode != "zeros":
            raise self._error("has a stride or pads with other values than zeros")
        if (given.padded, both) not in ((past, 0), (0, past)) or given.surplus:
            raise self._error(
                f"isn't causal (padding={module.padding!r}): give it padding=0, and pad its input with "
                f"{past} zeros at the beginning, F.pad(x, ({past}, 0))"
            )
        self._assign(given, ("batch", "features", "time"))
        self._check_width(module, given)
        if past == 0:
            weights = [one.detach() for one in (module.weight, module.bias) if one is not None]
            return self._call(lambda x, *tensors: weighted_sum([x], *tensors), [given], weights)
        value = self._builder.convolution(str(self._node.target), module, given.content)
        return replace(given, content=value, padded=0, surplus=both)

    # --- functions ---

    def _item(self, node: fx.Node) -> Any:
        source, index = self._traced.get(node.args[0]), node.args[1]  # type: ignore[arg-type]
        if isinstance(source, LayerResult) and index in (0, 1):
            return source.output if index == 0 else FinalState(source.name)
        if isinstance(source, FinalState):
            return source
        given = self._operand(node.args[0])
        indices = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis in indices:
            at = indices.index(Ellipsis)
            indices[at : at + 1] = [slice(None)] * (4 - len(indices))
        cut = [(axis, one) for axis, one in zip(given.axes, indices, strict=False) if one != slice(None)]
        if given.surplus and cut == [(self._axis("time"), slice(None, -given.surplus))]:
            return replace(given, surplus=0)
        raise self._error(
            "takes a part of a value, and C code computes all features of every time step: return the output "
            "of all time steps, and choose from it outside of the model"
        )

    def _concatenate(self, node: fx.Node) -> Traced:
        parts: Any = node.args[0]
        operands = [self._operand(part) for part in parts]
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
        self._require_features(operands[0], dim)
        return self._call(lambda *tensors: torch.cat(tensors, 1), operands, [])

    def _pad(self, given: Traced, padding: Any, value: Any, mode: str = "constant") -> Traced:
        before = list(padding)[-2:] if len(padding) in (2, 4) else [0, 1]
        others = list(padding)[:-2]
        self._assign_axis(given.axes[-1 - len(others) // 2], "time")
        if (
            mode != "constant"
            or value not in (0, None)
            or any(others)
            or before[1]
            or given.padded
            or given.surplus
        ):
            raise self._error("pads with something else than zeros before the first time step")
        return replace(given, padded=before[0])

    def _moved(self, node: fx.Node, name: str) -> Traced:
        given = self._operand(node.args[0])
        dims: Any = node.args[1:] or tuple(node.kwargs.values())
        dims = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else tuple(dims)
        axes = list(given.axes)
        if name == "permute":
            axes = [given.axes[dim] for dim in dims]
        else:
            first, second = dims
            axes[first], axes[second] = axes[second], axes[first]
        return replace(given, axes=(axes[0], axes[1], axes[2]))

    def _over_features(self, node: fx.Node, function: Any) -> Traced:
        given = self._operand(node.args[0])
        self._check_complete(given)
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", -1)
        self._require_features(given, -1 if dim is None else dim)
        return self._call(lambda x: function(x, dim=1), [given], [])

    def _elementwise(self, node: fx.Node, function: Any) -> Traced:
        """Return the result of an elementwise function of values, parameters and numbers."""
        operands: list[Traced] = []
        weights: list[Tensor] = []
        template: list[tuple[str, Any]] = []
        for one in node.args:
            found = self._traced.get(one) if isinstance(one, fx.Node) else one
            if isinstance(found, Tensor):
                template.append(("weight", len(weights)))
                weights.append(found)
            elif isinstance(one, fx.Node):
                template.append(("operand", len(operands)))
                operands.append(self._operand(one))
            else:
                template.append(("number", one))
        for weight in weights:
            if weight.dim() and operands and weight.numel() == weight.shape[-1]:
                self._require_features(operands[0], -1)
            elif weight.numel() != 1:
                raise self._error(
                    f"reads a parameter of shape {tuple(weight.shape)}, expected one per feature"
                )
        options = {key: value for key, value in node.kwargs.items() if key not in ("inplace", "out")}
        count = len(operands)

        def call(*tensors: Tensor) -> Tensor:
            places = {"operand": tensors[:count], "weight": [w.reshape(-1) for w in tensors[count:]]}
            arguments = [places[kind][one] if kind in places else one for kind, one in template]
            result: Tensor = function(*arguments, **options)
            return result

        return self._call(call, operands, weights)

    # --- helpers ---

    def _call(self, function: Any, operands: Sequence[Traced], weights: list[Tensor]) -> Traced:
        """Return the result of a function. If several nodes read it, it is computed once."""
        for one in operands:
            self._check_complete(one)
            if one.axes != operands[0].axes:
                raise self._error("combines values whose axes are in different order")
        call = Call(function, [one.content for one in operands], weights)
        single = len(self._node.users) == 1
        content = call if single else self._builder.value(self._node.name, call)
        return replace(operands[0], content=content)

    def _operand(self, node: Any) -> Traced:
        found = self._traced.get(node) if isinstance(node, fx.Node) else None
        if not isinstance(found, Traced):
            raise self._error(f"is given {self._describe(found)}, expected a value of each time step")
        return found

    def _check_complete(self, value: Traced) -> None:
        if value.padded or value.surplus:
            raise self._error("reads padded time steps; only a causal convolution may")

    def _check_width(self, module: nn.Module, given: Traced) -> None:
        expected, width = input_features(module), given.content.width
        if expected is not None and expected != width:
            raise self._error(f"expects {expected} features, got {width}")

    def _require_features(self, given: Traced, dim: Any) -> None:
        self._assign_axis(given.axes[dim], "features")

    def _assign(self, given: Traced, roles: tuple[str | None, ...]) -> None:
        for axis, role in zip(given.axes, roles, strict=True):
            if role is not None:
                self._assign_axis(axis, role)

    def _assign_axis(self, axis: int, role: str) -> None:
        """Record what an axis is."""
        known = self._roles.get(axis)
        if known == role or (known is None and role not in self._roles.values()):
            self._roles[axis] = role
            return
        raise self._error(
            f"takes an axis as {role} that was {known or 'another one'} before: transpose its input"
        )

    def _axis(self, role: str) -> int | None:
        return next((axis for axis, one in self._roles.items() if one == role), None)

    def _describe(self, found: Any) -> str:
        if isinstance(found, LayerResult):
            return f"the pair (output, state) of {found.name}"
        return f"the final state of {found.name}" if isinstance(found, FinalState) else "something else"

    def _error(self, problem: str) -> ExportError:
        """Return an error that names the node and its line."""
        node = self._node
        if node.op == "call_module":
            module = self._model.get_submodule(str(node.target))
            name = f"{type(module).__name__} {str(node.target)!r}"
        else:
            name = getattr(node.target, "__name__", str(node.target))
        if node.op == "output":
            name = type(self._model).__name__
        return ExportError(f"{name}{location(node)} {problem}")


def _pad_arguments(pad: Any, mode: str = "constant", value: Any = None) -> tuple[Any, Any, str]:
    """Return the arguments of ``F.pad`` after the first in the order in which they are needed here."""
    return pad, value, mode
