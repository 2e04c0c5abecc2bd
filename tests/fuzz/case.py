"""A layer with a random cell, and the calls that compute its results."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence

import unrolled as ur
from fuzz.program import Program
from fuzz.rounding import Results
from helpers.layer_pairs import tensors

# In torch, the gradient of these is NaN or a number where the input is NaN, by the position in memory.
_ELU = re.compile(r"\b[cs]?elu\(")


class Case:
    """A layer for a program, with its inputs.

    Args:
        program: The program.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.call = call = program.call
        self.dtype: torch.dtype = getattr(torch, call.dtype)
        torch.manual_seed(program.seed)
        self.layer: Any = ur.Recurrent(
            program.cell(),
            program.input,
            program.hidden,
            call.layers,
            bias=call.bias,
            batch_first=call.batch_first,
            bidirectional=call.bidirectional,
            initial_state="learned" if call.initial_state == "learned" else "zeros",
            zoneout=call.zoneout,
            dropout=call.dropout if call.layers > 1 else 0.0,
            dtype=self.dtype,
            **program.cell_options(),
        ).train(call.training)
        for param in self.layer.parameters():
            nn.init.normal_(param, 0, 0.5)
        time, batch, features = call.time, call.batch, program.input
        shape = {
            "transposed": (batch, time, features),
            "strided": (2 * time, 2 * batch, 2 * features),
            "expanded": (time, 1, features),
        }.get(call.layout, (time, batch, features))
        rows = call.layers * (1 + call.bidirectional)
        sizes = program.states.values()
        self.inputs: dict[str, Tensor] = {"x": torch.randn(shape, dtype=self.dtype)}
        if call.initial_state == "given":
            self.inputs |= {
                f"state {k}": torch.randn(batch, rows, n, dtype=self.dtype) for k, n in enumerate(sizes)
            }
        if call.reset_state == "given":
            self.inputs |= {
                f"reset {k}": torch.randn(rows, batch, n, dtype=self.dtype) for k, n in enumerate(sizes)
            }
        self.lengths = torch.randint(1, time + 1, (batch,))
        if call.lengths == "lengths" and batch > 1:
            self.lengths[-1] = 0
        self.resets = torch.rand(time, batch) < 0.4
        leaves = [*self.inputs.values(), *self.layer.parameters()]
        with torch.no_grad():
            for leaf in leaves:
                if call.values == "halves":
                    leaf.copy_((2 * leaf).round() / 2)
            if call.values == "special":
                x = self.inputs["x"]
                for value in (float("nan"), float("inf"), -float("inf"), 0.0, 1e30, -1e-30):
                    x[torch.rand(x.shape) < 0.03] = value
                if _ELU.search(str(program)):
                    x.nan_to_num_(1.0, 1.0, -1.0)
        for k, leaf in enumerate(leaves):
            leaf.requires_grad_(k not in call.frozen)
        self.weights: list[Tensor] = []
        self.chosen = {"all": slice(None), "first": slice(0, 1), "last": slice(-1, None)}[call.outputs]

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The inputs and parameters, by name."""
        return {**self.inputs, **dict(self.layer.named_parameters())}

    def run(self, inputs: dict[str, Tensor], layer: Any = None) -> list[Tensor]:
        """Call the layer, and return the output, the final states and, if asked for, the states of all steps.

        Args:
            inputs: The input and the states.
            layer: The layer to call, if it isn't the case's own.
        """
        call = self.call
        if self.program.draws:
            torch.manual_seed(self.program.seed)
        x = inputs["x"]
        if call.layout == "transposed":
            x = x.transpose(0, 1)
        elif call.layout == "strided":
            x = x[::2, 1::2, ::2]
        elif call.layout == "expanded":
            x = x.expand(-1, call.batch, -1)
        state = [value.transpose(0, 1) for name, value in inputs.items() if name.startswith("state")]
        reset = [value for name, value in inputs.items() if name.startswith("reset")]
        x = x.transpose(0, 1) if call.batch_first else x
        resets = self.resets.t() if call.batch_first else self.resets
        if call.route == "unbatched":
            x, resets = x.select(1 - call.batch_first, 0), self.resets[:, 0]
            state, reset = ([part[:, 0] for part in parts] for parts in (state, reset))
        arguments: dict[str, Any] = {}
        if call.lengths == "lengths":
            arguments["lengths"] = self.lengths
        if call.resets:
            arguments["resets"] = resets
            if call.reset_state == "initial":
                arguments["reset_state"] = "initial"
            elif call.reset_state == "given":
                arguments["reset_state"] = tuple(reset) if len(reset) > 1 else reset[0]
        if call.all_states:
            arguments["all_states"] = True
        if call.checkpoint is not None:
            arguments["checkpoint"] = call.checkpoint
        sequence: Any = x
        if call.lengths == "packed":
            sequence = pack_padded_sequence(x, self.lengths, call.batch_first, enforce_sorted=False)
        given = None if not state else tuple(state) if len(state) > 1 else state[0]
        result = (layer or self.layer)(sequence, given, **arguments)
        parts = [*result[:2], *(result[2].values() if call.all_states else ())]
        return list(tensors(parts))

    def run_with(self, inputs: dict[str, Tensor], params: dict[str, Tensor]) -> list[Tensor]:
        """Call the layer with other parameters."""

        def layer(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.layer, params, args, kwargs)

        return self.run(inputs, layer)

    def draw_weights(self, values: list[Tensor]) -> None:
        """Draw the weights of the results in the loss."""
        self.weights = [torch.randn(value.shape, dtype=torch.float64).to(value.dtype) for value in values]

    def values_and_gradients(self) -> Results:
        """Return all results, and the gradient of each leaf that requires one."""
        values = self.run(self.inputs)
        pairs = zip(values[self.chosen], self.weights[self.chosen], strict=True)
        loss: Any = sum((value * weight).sum() for value, weight in pairs)
        leaves = [leaf for leaf in self.leaves.values() if leaf.requires_grad]
        if not loss.requires_grad or not leaves:
            return [*values, *[None] * len(leaves)]
        second = self.call.route == "second"
        gradients = torch.autograd.grad(loss, leaves, create_graph=second, allow_unused=True)
        results: Results = [*(value.detach() for value in values), *gradients]
        if second:
            terms = [(gradient**2).sum() for gradient in gradients if gradient is not None]
            penalty: Any = sum(terms)
            if terms and penalty.requires_grad:
                results += torch.autograd.grad(penalty, leaves, allow_unused=True)
            else:
                results += [None] * len(leaves)
        return results

    def names(self, count: int) -> list[str]:
        """Return the names of the results of :meth:`values_and_gradients`."""
        leaves = [name for name, leaf in self.leaves.items() if leaf.requires_grad]
        names = [f"result {k}" for k in range(len(self.weights))] + [f"gradient of {name}" for name in leaves]
        names += [f"second gradient of {name}" for name in leaves]
        return names[:count]

    def by_operators(self) -> list[Tensor]:
        """Return the results that the loss depends on, and its gradients, computed by the torch operators."""

        def run(inputs: dict[str, Tensor], params: dict[str, Tensor]) -> list[Tensor]:
            return self.run_with(inputs, params)[self.chosen]

        pull: Any
        values, pull = vjp(run, *self._detached())  # type: ignore[misc]
        gradients = {
            name: gradient for part in pull(self.weights[self.chosen]) for name, gradient in part.items()
        }
        return [*values, *(gradients[name] for name, leaf in self.leaves.items() if leaf.requires_grad)]

    def by_route(self, route: str) -> list[Tensor]:
        """Return the results, and then those for smaller inputs.

        Args:
            route: ``vmap`` or ``make_fx``. Otherwise the layer is simply called twice.
        """
        inputs, params = self._detached()
        smaller = {name: 0.5 * value for name, value in inputs.items()}

        def run(inputs: dict[str, Tensor]) -> list[Tensor]:
            return self.run_with(inputs, params)

        if route == "vmap":
            stacked = {name: torch.stack([value, smaller[name]]) for name, value in inputs.items()}
            results = vmap(run)(stacked)
            return [*(result[0] for result in results), *(result[1] for result in results)]
        call = make_fx(run)(inputs) if route == "make_fx" else run
        return [*call(inputs), *call(smaller)]

    def _detached(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the inputs and the parameters without gradients."""
        inputs = {name: value.detach() for name, value in self.inputs.items()}
        return inputs, {name: param.detach() for name, param in self.layer.named_parameters()}

    def in_float64(self) -> Case:
        """Return this case in float64."""
        twin = copy.copy(self)
        twin.layer = copy.deepcopy(self.layer).double()
        for old, new in zip(self.layer.parameters(), twin.layer.parameters(), strict=True):
            new.requires_grad_(old.requires_grad)
        twin.inputs = {
            name: value.detach().double().requires_grad_(value.requires_grad)
            for name, value in self.inputs.items()
        }
        twin.weights = [weight.double() for weight in self.weights]
        return twin
