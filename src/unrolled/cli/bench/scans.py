"""JAX: the layer's equations in ``lax.scan`` under ``jit``."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import torch

from unrolled.cli.bench.work import Call, Work


def jax(work: Work) -> Call:
    """A call of the compiled scan, on torch's number of threads where JAX starts with it.

    The products with the input are outside the loop. JAX sets its threads at its first use in a
    process: later calls keep them.
    """
    library = _started()
    states, step = _STEPS[len(work.weights()[1]) // work.row.hidden]

    def run(x: Any, w: list[Any]) -> Any:
        zeros = library.numpy.zeros((work.row.batch, work.row.hidden), library.numpy.float32)
        before = x @ w[0].T + w[2]

        def one(state: Any, now: Any) -> Any:
            new = step(library, now, state, w[1].T, w[3])
            return new, new[0]

        final, output = library.lax.scan(one, (zeros,) * states, before)
        return [output, *final]

    if work.row.mode == "streaming":
        return _streamed(library, work, states, step)
    x, held = library.numpy.asarray(work.x.detach().numpy()), [*map(library.numpy.asarray, work.weights())]
    if work.row.mode == "inference":
        infer = library.jit(run)
        return lambda: library.block_until_ready(infer(x, held))
    train = library.jit(library.value_and_grad(lambda x, w: run(x, w)[0].sum(), argnums=(0, 1)))

    def call() -> list[Any]:
        _, (of_x, of_held) = library.block_until_ready(train(x, held))
        return [of_x, *of_held]

    return call


def _streamed(library: Any, work: Work, states: int, step: Callable[..., Any]) -> Call:
    """A call of the compiled step for every time step."""
    held = [*map(library.numpy.asarray, work.weights())]
    zeros = library.numpy.zeros((work.row.batch, work.row.hidden), library.numpy.float32)
    steps = [library.numpy.asarray(now) for now in work.x.detach().numpy()]

    one = library.jit(lambda now, state, w: step(library, now @ w[0].T + w[2], state, w[1].T, w[3]))

    def call() -> list[Any]:
        state, outputs = (zeros,) * states, []
        for now in steps:
            state = library.block_until_ready(one(now, state, held))
            outputs.append(state[0])
        return [numpy.stack(outputs), *state]

    return call


def _started() -> Any:
    """JAX on the CPU; its first use in the process sets its threads."""
    threads = str(torch.get_num_threads())
    os.environ.setdefault("NPROC", threads)  # what XLA sizes its pool by
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if threads == "1":
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)  # by other libraries
    return importlib.import_module("jax")


def _simple(jax: Any, before: Any, state: Any, weight: Any, bias: Any) -> Any:
    return (jax.numpy.tanh(before + state[0] @ weight + bias),)


def _reset_after(jax: Any, before: Any, state: Any, weight: Any, bias: Any) -> Any:
    (h,) = state
    input_r, input_z, input_n = jax.numpy.split(before, 3, -1)
    hidden_r, hidden_z, hidden_n = jax.numpy.split(h @ weight + bias, 3, -1)
    r, z = jax.nn.sigmoid(input_r + hidden_r), jax.nn.sigmoid(input_z + hidden_z)
    return ((1 - z) * jax.numpy.tanh(input_n + r * hidden_n) + z * h,)


def _cell_state(jax: Any, before: Any, state: Any, weight: Any, bias: Any) -> Any:
    h, c = state
    i, f, g, o = jax.numpy.split(before + h @ weight + bias, 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jax.numpy.tanh(g)
    return jax.nn.sigmoid(o) * jax.numpy.tanh(c), c


# By the number of gates: how many states, and torch.nn's equations.
_STEPS: dict[int, tuple[int, Callable[..., Any]]] = {
    1: (1, _simple),
    3: (1, _reset_after),
    4: (2, _cell_state),
}
