"""What torch's own tests ask of torch.nn's recurrent modules, asked of any classes.

The inputs and the errors are those of ``torch.testing._internal.common_modules`` in the torch wheel; the
checks are of the same things as those that torch's ``test/test_modules.py`` makes with them.
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
    """The names of the modules, with what torch knows of them."""
    for info in common_modules.module_db:
        name = info.module_cls.__name__
        if name in NAMES and info.module_cls is getattr(nn, name, None):
            yield name, info


def samples(
    classes: Classes, dtype: torch.dtype = torch.float64, training: bool = True
) -> Iterator[tuple[str, Any, Any, Any]]:
    """The name, our module and torch's with the same random parameters, and an input of forward."""
    for name, info in infos():
        for sample in info.module_inputs_func(
            info, device="cpu", dtype=dtype, requires_grad=True, training=training
        ):
            given = sample.constructor_input
            theirs = getattr(nn, name)(*given.args, **given.kwargs, dtype=dtype).train(training)
            ours = classes[name](*given.args, **given.kwargs, dtype=dtype).train(training)
            ours.load_state_dict(theirs.state_dict())
            yield f"{name}({given.args}, {given.kwargs})", ours, theirs, sample.forward_input


def call(module: Any, given: Any) -> list[Tensor]:
    """All tensors of a forward."""
    return flat(module(*given.args, **given.kwargs))


def flat(value: Any) -> list[Tensor]:
    """All tensors in a value."""
    if isinstance(value, PackedSequence):
        return [value.data]
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def leaves(given: Any) -> list[Tensor]:
    """The tensors of an input that want gradients."""
    return [tensor for tensor in flat((given.args, given.kwargs)) if tensor.requires_grad]


def near(found: Any, expected: Any, what: str, tolerance: float = 1e-10) -> None:
    """Equal to float64's precision."""
    found, expected = flat(found), flat(expected)
    assert len(found) == len(expected), what
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape, what
        assert a.dtype == b.dtype, what
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")


def gradients(module: Any, given: Any) -> list[Tensor]:
    """Of a weighted sum of all results, for inputs and parameters."""
    results = call(module, given)
    loss = sum((r * torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view(r.shape)).sum() for r in results)
    wanted = [*leaves(given), *module.parameters()]
    return list(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))


# --- the checks ---


def check_forward(classes: Classes) -> None:
    for what, ours, theirs, given in samples(classes):
        near(call(ours, given), call(theirs, given), what)


def check_gradients(classes: Classes) -> None:
    for what, ours, theirs, given in samples(classes):
        near(gradients(ours, given), gradients(theirs, given), what)


def check_finite_differences(classes: Classes) -> None:
    """First gradients; second ones of the smallest input of each class."""
    seen = set()
    for what, ours, _, given in samples(classes):
        tensors = [*leaves(given), *ours.parameters()]
        if type(ours) in seen or any(isinstance(part, PackedSequence) for part in given.args):
            continue
        seen.add(type(ours))
        names = [name for name, _ in ours.named_parameters()]

        def run(*values: Tensor, ours: Any = ours, given: Any = given, names: list[str] = names) -> Any:
            count = len(values) - len(names)
            filled = iter(values[:count])
            args = tree_map(lambda leaf: next(filled) if isinstance(leaf, Tensor) else leaf, given.args)
            parameters = dict(zip(names, values[count:], strict=True))
            return tuple(flat(torch.func.functional_call(ours, parameters, args, given.kwargs)))

        detached = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        assert torch.autograd.gradcheck(run, detached, fast_mode=True), what
        assert torch.autograd.gradgradcheck(run, detached, fast_mode=True), what


def check_non_contiguous(classes: Classes) -> None:
    def spread(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        wide = torch.stack((value.detach(), torch.full_like(value, torch.nan)), -1)
        return wide.requires_grad_(value.requires_grad)[..., 0]

    for what, ours, _, given in samples(classes):
        if any(isinstance(part, PackedSequence) for part in given.args):
            continue
        expected = gradients(ours, given)
        args = tree_map(spread, given.args)
        results = ours(*args, **given.kwargs)
        near(results, call(ours, given), what)
        for parameter in ours.parameters():
            parameter.data = spread(parameter.data)
        near(ours(*args, **given.kwargs), results, what)
        near(gradients(ours, given), expected, what)


def check_pickle_and_copy(classes: Classes) -> None:
    for what, ours, _, given in samples(classes):
        expected = call(ours, given)
        near(call(copy.deepcopy(ours), given), expected, what, 0)
        near(call(pickle.loads(pickle.dumps(ours)), given), expected, what, 0)
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        near(call(torch.load(file, weights_only=False), given), expected, what, 0)


def check_state_dicts(classes: Classes) -> None:
    for what, ours, theirs, given in samples(classes):
        assert list(ours.state_dict()) == list(theirs.state_dict()), what
        file = io.BytesIO()
        torch.save(ours.state_dict(), file)
        file.seek(0)
        theirs.load_state_dict(torch.load(file))
        near(call(theirs, given), call(ours, given), what)


def check_modes(classes: Classes) -> None:
    """In and out of training: the same, as these modules have no dropout by themselves."""
    for training in (True, False):
        for what, ours, theirs, given in samples(classes, training=training):
            assert ours.training is training, what
            near(call(ours, given), call(theirs, given), what)


def check_repr_and_attributes(classes: Classes) -> None:
    for what, ours, theirs, _ in samples(classes):
        assert repr(ours) == repr(theirs), what
        for name in (
            "input_size",
            "hidden_size",
            "bias",
            "num_layers",
            "batch_first",
            "bidirectional",
            "proj_size",
        ):
            assert getattr(ours, name, None) == getattr(theirs, name, None), f"{what}: {name}"


def check_factory_arguments(classes: Classes) -> None:
    """dtype and device are arguments, parameters are made so, and meta tensors hold no data."""
    for name, info in infos():
        for sample in info.module_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
        ):
            given = sample.constructor_input
            for kwargs in (
                {"dtype": torch.float64},
                {"device": "meta"},
                {"device": "cpu", "dtype": torch.bfloat16},
            ):
                made = classes[name](*given.args, **given.kwargs, **kwargs)
                assert {p.dtype for p in made.parameters()} == {kwargs.get("dtype", torch.float32)}, name
                assert {p.device.type for p in made.parameters()} == {kwargs.get("device", "cpu")}, name
            empty = classes[name](*given.args, **given.kwargs, device="meta").to_empty(device="cpu")
            empty.reset_parameters()
            near(
                flat(empty(*sample.forward_input.args)),
                flat(copy.deepcopy(empty)(*sample.forward_input.args)),
                name,
                0,
            )


def check_conversions(classes: Classes) -> None:
    """To other dtypes and back, and shared memory."""
    for what, ours, theirs, given in samples(classes):
        for module in (ours, theirs):
            module.to(torch.float32).double()
        near(call(ours, given), call(theirs, given), what)
        near(call(ours.share_memory(), given), call(theirs, given), what)
        ours.zero_grad()


def check_errors(classes: Classes) -> None:
    for name, info in infos():
        if info.module_error_inputs_func is None:
            continue
        for sample in info.module_error_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
        ):
            given = sample.module_error_input
            made = given.constructor_input
            kind, pattern = sample.error_type, sample.error_regex.replace("RNN input", f"{name} input")
            if "relu" in made.args or "tanh" in made.args:  # given as bias, which torch.nn takes for True
                kind, pattern = TypeError, "bias should be of type bool, got: str"

            def run(name: str = name, given: Any = given, made: Any = made) -> None:
                module = classes[name](*made.args, **made.kwargs)
                module(*given.forward_input.args, **given.forward_input.kwargs)

            with pytest.raises(kind, match=pattern):
                run()


CHECKS: dict[str, Callable[[Classes], None]] = {
    name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")
}
NUMERIC = ("forward", "gradients", "modes")  # those that see a cell that computes something else
