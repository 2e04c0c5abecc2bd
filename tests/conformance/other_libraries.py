"""Comparison with Keras' layers and flax' cells, with random weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

os.environ.setdefault("KERAS_BACKEND", "torch")

import jax.numpy
import keras
from flax import linen

import unrolled as ur

TIME, BATCH, INPUT, HIDDEN = 7, 3, 4, 5
TOLERANCE = {"rtol": 1e-4, "atol": 2e-6}

KERAS: dict[str, Callable[[], Any]] = {
    "RNN": lambda: keras.layers.SimpleRNN(HIDDEN, return_sequences=True, return_state=True),
    "GRU": lambda: keras.layers.GRU(HIDDEN, return_sequences=True, return_state=True),
    "GRU, reset before": lambda: keras.layers.GRU(
        HIDDEN, reset_after=False, return_sequences=True, return_state=True
    ),
    "LSTM": lambda: keras.layers.LSTM(HIDDEN, return_sequences=True, return_state=True),
}
FLAX: dict[str, Any] = {
    "RNN": linen.SimpleCell,
    "GRU": linen.GRUCell,
    "LSTM": linen.LSTMCell,
}


def _uniform(shape: Any, rng: Any) -> Any:
    return rng.uniform(-1, 1, shape).astype(numpy.float32)


def check_keras(name: str, mutate: Callable[[Any], Any] = lambda layer: layer) -> None:
    """Compare outputs, final states and masked rows with Keras, and convert the weights back.

    Args:
        name: A key of ``KERAS``.
        mutate: Changes the converted layer.
    """
    rng = numpy.random.default_rng(0)
    theirs, x = KERAS[name](), _uniform((BATCH, TIME, INPUT), rng)
    theirs.build(x.shape)
    theirs.set_weights([_uniform(array.shape, rng) for array in theirs.get_weights()])
    ours = mutate(ur.io.from_keras(theirs.get_weights(), reset_after="before" not in name))
    lengths = torch.tensor([7, 2, 5])
    mask = (torch.arange(TIME) < lengths.unsqueeze(1)).numpy()
    for their_options, our_options in (({}, {}), ({"mask": torch.from_numpy(mask)}, {"lengths": lengths})):
        with torch.no_grad():
            expected = [numpy.array(part.detach()) for part in theirs(torch.from_numpy(x), **their_options)]
            output, final = ours(torch.from_numpy(x).transpose(0, 1), **our_options)
        actual = [output.transpose(0, 1).numpy(), *(part[0].numpy() for part in _states(final))]
        for a, b in zip(actual, expected, strict=True):
            if their_options and a.ndim == 3:  # in padded steps Keras repeats the last output
                a, b = a[mask], b[mask]
            numpy.testing.assert_allclose(a, b, **TOLERANCE, err_msg=name)
    for a, b in zip(ur.io.to_keras(ours), theirs.get_weights(), strict=True):
        numpy.testing.assert_array_equal(a, b)


def check_flax(name: str, mutate: Callable[[Any], Any] = lambda layer: layer) -> None:
    """Compare outputs and final states with flax, and convert the weights back.

    Args:
        name: A key of ``FLAX``.
        mutate: Changes the converted layer.
    """
    rng = numpy.random.default_rng(1)
    x, cell = _uniform((TIME, BATCH, INPUT), rng), FLAX[name](HIDDEN)
    carry = cell.initialize_carry(jax.random.key(0), (BATCH, INPUT))
    initial = cell.init(jax.random.key(0), carry, x[0])["params"]
    params = jax.tree.map(lambda leaf: _uniform(leaf.shape, rng), initial)
    ours = mutate(ur.io.from_flax(params))
    outputs = []
    for step in x:
        carry, output = cell.apply({"params": params}, carry, step)
        outputs.append(numpy.array(output))
    with torch.no_grad():
        output, final = ours(torch.from_numpy(x))
    numpy.testing.assert_allclose(output.numpy(), numpy.stack(outputs), **TOLERANCE, err_msg=name)
    last = carry[::-1] if isinstance(carry, tuple) else (carry,)  # the cell state comes first in flax
    for a, b in zip(_states(final), last, strict=True):
        numpy.testing.assert_allclose(a[0].numpy(), numpy.array(b), **TOLERANCE, err_msg=name)
    exported = ur.io.to_flax(ours)
    assert jax.tree.structure(exported) == jax.tree.structure(dict(params))
    for a, b in zip(jax.tree.leaves(exported), jax.tree.leaves(params), strict=True):
        numpy.testing.assert_allclose(a, b, rtol=1e-6)


def _states(final: Any) -> tuple[Tensor, ...]:
    return final if isinstance(final, tuple) else (final,)
