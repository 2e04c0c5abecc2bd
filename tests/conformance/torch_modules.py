"""Torch's tests of its recurrent modules, applied to other classes.

Inputs and errors are those of ``torch.testing._internal.common_modules``, which is part of the torch wheel.
The checks correspond to those in torch's ``test/test_modules.py``.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.testing._internal import common_modules
from torch.utils._pytree import tree_leaves, tree_map

NAMES = ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell")
ATTRIBUTES = ("input_size", "hidden_size", "bias", "num_layers", "batch_first", "bidirectional", "proj_size")
Classes = Mapping[str, Any]


def infos() -> Iterator[tuple[str, Any]]:
    """Yield the name and torch's ModuleInfo of each recurrent module."""
    for info in common_modules.module_db:
        name = info.module_cls.__name__
        if name in NAMES and info.module_cls is getattr(nn, name, None):
            yield name, info


def samples(
    classes: Classes, dtype: torch.dtype = torch.float64, training: bool = True
) -> Iterator[tuple[str, Any, Any, Any]]:
    """Yield a description, our module and torch's with the same parameters, and the arguments of forward."""
    for name, info in infos():
        for sample in info.module_inputs_func(
            info, device="cpu", dtype=dtype, requires_grad=True, training=training
        ):
            arguments = sample.constructor_input
            theirs = getattr(nn, name)(*arguments.args, **arguments.kwargs, dtype=dtype).train(training)
            ours = classes[name](*arguments.args, **arguments.kwargs, dtype=dtype).train(training)
            ours.load_state_dict(theirs.state_dict())
            yield f"{name}({arguments.args}, {arguments.kwargs})", ours, theirs, sample.forward_input


def call(module: Any, inputs: Any) -> list[Tensor]:
    """Run forward, and return all resulting tensors."""
    return flat(module(*inputs.args, **inputs.kwargs))


def flat(value: Any) -> list[Tensor]:
    """Return all tensors of a nested value."""
    if isinstance(value, PackedSequence):
        return [value.data]
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def leaves(inputs: Any) -> list[Tensor]:
    """Return the input tensors that require gradients."""
    return [tensor for tensor in flat((inputs.args, inputs.kwargs)) if tensor.requires_grad]


def assert_near(actual: Any, expected: Any, case: str, tolerance: float = 1e-10) -> None:
    """Compare all tensors of nested values. The default tolerance is for float64."""
    actual, expected = flat(actual), flat(expected)
    assert len(actual) == len(expected), case
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape, case
        assert a.dtype == b.dtype, case
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text: f"{case}: {text}")


def gradients(module: Any, inputs: Any) -> list[Tensor]:
    """Return the gradients of a weighted sum of all results, for inputs and parameters."""
    results = call(module, inputs)
    loss = sum((r * torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view(r.shape)).sum() for r in results)
    variables = [*leaves(inputs), *module.parameters()]
    return list(torch.autograd.grad(loss, variables, allow_unused=True, materialize_grads=True))


# --- the checks ---


def check_forward(classes: Classes) -> None:
    for case, ours, theirs, inputs in samples(classes):
        assert_near(call(ours, inputs), call(theirs, inputs), case)


def check_gradients(classes: Classes) -> None:
    for case, ours, theirs, inputs in samples(classes):
        assert_near(gradients(ours, inputs), gradients(theirs, inputs), case)


def check_finite_differences(classes: Classes) -> None:
    """Check first and second gradients for one input of each class."""
    checked = set()
    for case, ours, _, inputs in samples(classes):
        tensors = [*leaves(inputs), *ours.parameters()]
        if type(ours) in checked or any(isinstance(part, PackedSequence) for part in inputs.args):
            continue
        checked.add(type(ours))
        names = [name for name, _ in ours.named_parameters()]

        def run(*values: Tensor, ours: Any = ours, inputs: Any = inputs, names: list[str] = names) -> Any:
            count = len(values) - len(names)
            replacements = iter(values[:count])
            args = tree_map(
                lambda leaf: next(replacements) if isinstance(leaf, Tensor) else leaf, inputs.args
            )
            parameters = dict(zip(names, values[count:], strict=True))
            return tuple(flat(torch.func.functional_call(ours, parameters, args, inputs.kwargs)))

        detached = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        assert torch.autograd.gradcheck(run, detached, fast_mode=True), case
        assert torch.autograd.gradgradcheck(run, detached, fast_mode=True), case


def check_non_contiguous(classes: Classes) -> None:
    def non_contiguous(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        wide = torch.stack((value.detach(), torch.full_like(value, torch.nan)), -1)
        return wide.requires_grad_(value.requires_grad)[..., 0]

    for case, ours, _, inputs in samples(classes):
        if any(isinstance(part, PackedSequence) for part in inputs.args):
            continue
        expected = gradients(ours, inputs)
        args = tree_map(non_contiguous, inputs.args)
        results = ours(*args, **inputs.kwargs)
        assert_near(results, call(ours, inputs), case)
        for parameter in ours.parameters():
            parameter.data = non_contiguous(parameter.data)
        assert_near(ours(*args, **inputs.kwargs), results, case)
        assert_near(gradients(ours, inputs), expected, case)


def check_pickle_and_copy(classes: Classes) -> None:
    for case, ours, _, inputs in samples(classes):
        expected = call(ours, inputs)
        assert_near(call(copy.deepcopy(ours), inputs), expected, case, 0)
        assert_near(call(pickle.loads(pickle.dumps(ours)), inputs), expected, case, 0)
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        assert_near(call(torch.load(file, weights_only=False), inputs), expected, case, 0)


def check_state_dicts(classes: Classes) -> None:
    for case, ours, theirs, inputs in samples(classes):
        assert list(ours.state_dict()) == list(theirs.state_dict()), case
        file = io.BytesIO()
        torch.save(ours.state_dict(), file)
        file.seek(0)
        theirs.load_state_dict(torch.load(file))
        assert_near(call(theirs, inputs), call(ours, inputs), case)


def check_modes(classes: Classes) -> None:
    """Compare results in training and eval mode."""
    for training in (True, False):
        for case, ours, theirs, inputs in samples(classes, training=training):
            assert ours.training is training, case
            assert_near(call(ours, inputs), call(theirs, inputs), case)


def check_repr_and_attributes(classes: Classes) -> None:
    for case, ours, theirs, _ in samples(classes):
        assert repr(ours) == repr(theirs), case
        for name in ATTRIBUTES:
            assert getattr(ours, name, None) == getattr(theirs, name, None), f"{case}: {name}"


def check_factory_arguments(classes: Classes) -> None:
    """Check dtype and device of the parameters, also on the meta device."""
    for name, info in infos():
        for sample in info.module_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
        ):
            arguments = sample.constructor_input
            for kwargs in (
                {"dtype": torch.float64},
                {"device": "meta"},
                {"device": "cpu", "dtype": torch.bfloat16},
            ):
                module = classes[name](*arguments.args, **arguments.kwargs, **kwargs)
                assert {p.dtype for p in module.parameters()} == {kwargs.get("dtype", torch.float32)}, name
                assert {p.device.type for p in module.parameters()} == {kwargs.get("device", "cpu")}, name
            empty = classes[name](*arguments.args, **arguments.kwargs, device="meta").to_empty(device="cpu")
            empty.reset_parameters()
            assert_near(
                flat(empty(*sample.forward_input.args)),
                flat(copy.deepcopy(empty)(*sample.forward_input.args)),
                name,
                0,
            )


def check_conversions(classes: Classes) -> None:
    """Convert to another dtype and back, and move parameters to shared memory."""
    for case, ours, theirs, inputs in samples(classes):
        for module in (ours, theirs):
            module.to(torch.float32).double()
        assert_near(call(ours, inputs), call(theirs, inputs), case)
        assert_near(call(ours.share_memory(), inputs), call(theirs, inputs), case)
        ours.zero_grad()


def check_errors(classes: Classes) -> None:
    for name, info in infos():
        if info.module_error_inputs_func is None:
            continue
        for sample in info.module_error_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
        ):
            error_input = sample.module_error_input
            arguments = error_input.constructor_input
            error_type, pattern = sample.error_type, sample.error_regex.replace("RNN input", f"{name} input")
            if (
                "relu" in arguments.args or "tanh" in arguments.args
            ):  # passed as bias; torch.nn takes it for True
                error_type, pattern = TypeError, "bias should be of type bool, got: str"

            def run(name: str = name, error_input: Any = error_input, arguments: Any = arguments) -> None:
                module = classes[name](*arguments.args, **arguments.kwargs)
                module(*error_input.forward_input.args, **error_input.forward_input.kwargs)

            with pytest.raises(error_type, match=pattern):
                run()


CHECKS: dict[str, Callable[[Classes], None]] = {
    name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")
}
NUMERIC = ("forward", "gradients", "modes")  # the checks that detect wrong equations
