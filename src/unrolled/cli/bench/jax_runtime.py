"""JAX: the layer's equations in ``lax.scan``, compiled with ``jit``."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import torch

from unrolled.cli.bench.workload import Call, Workload


def prepare_jax(workload: Workload) -> Call:
    """Prepare the compiled scan with torch's number of threads.

    The matrix products with the input are outside of the loop. JAX sets its number of threads at its first
    use in a process and never changes it.
    """
    jax = _import_jax()
    state_count, step = _STEPS[len(workload.weights()[1]) // workload.row.hidden]

    def run(x: Any, w: list[Any]) -> Any:
        zeros = jax.numpy.zeros((workload.row.batch, workload.row.hidden), jax.numpy.float32)
        input_sums = x @ w[0].T + w[2]

        def scan_step(state: Any, input_sum: Any) -> Any:
            new = step(jax, input_sum, state, w[1].T, w[3])
            return new, new[0]

        final, output = jax.lax.scan(scan_step, (zeros,) * state_count, input_sums)
        return [output, *final]

    if workload.row.mode == "streaming":
        return _prepare_streaming(jax, workload, state_count, step)
    x = jax.numpy.asarray(workload.x.detach().numpy())
    weights = [*map(jax.numpy.asarray, workload.weights())]
    if workload.row.mode == "inference":
        infer = jax.jit(run)
        return lambda: jax.block_until_ready(infer(x, weights))
    train = jax.jit(jax.value_and_grad(lambda x, w: run(x, w)[0].sum(), argnums=(0, 1)))

    def call() -> list[Any]:
        _, (grad_x, grad_weights) = jax.block_until_ready(train(x, weights))
        return [grad_x, *grad_weights]

    return call


def _prepare_streaming(jax: Any, workload: Workload, state_count: int, step: Callable[..., Any]) -> Call:
    """Prepare one call of the compiled step per time step."""
    weights = [*map(jax.numpy.asarray, workload.weights())]
    zeros = jax.numpy.zeros((workload.row.batch, workload.row.hidden), jax.numpy.float32)
    steps = [jax.numpy.asarray(x_t) for x_t in workload.x.detach().numpy()]

    compiled = jax.jit(lambda x_t, state, w: step(jax, x_t @ w[0].T + w[2], state, w[1].T, w[3]))

    def call() -> list[Any]:
        state, outputs = (zeros,) * state_count, []
        for x_t in steps:
            state = jax.block_until_ready(compiled(x_t, state, weights))
            outputs.append(state[0])
        return [numpy.stack(outputs), *state]

    return call


def _import_jax() -> Any:
    """Import JAX for the CPU; at the first import in a process, set its number of threads."""
    threads = str(torch.get_num_threads())
    os.environ.setdefault("NPROC", threads)  # the size of XLA's thread pool
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if threads == "1":
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)  # by other libraries
    return importlib.import_module("jax")


def _rnn_step(jax: Any, input_sum: Any, state: Any, weight: Any, bias: Any) -> Any:
    return (jax.numpy.tanh(input_sum + state[0] @ weight + bias),)


def _three_gate_step(jax: Any, input_sum: Any, state: Any, weight: Any, bias: Any) -> Any:
    (h,) = state
    input_r, input_z, input_n = jax.numpy.split(input_sum, 3, -1)
    hidden_r, hidden_z, hidden_n = jax.numpy.split(h @ weight + bias, 3, -1)
    r, z = jax.nn.sigmoid(input_r + hidden_r), jax.nn.sigmoid(input_z + hidden_z)
    return ((1 - z) * jax.numpy.tanh(input_n + r * hidden_n) + z * h,)


def _four_gate_step(jax: Any, input_sum: Any, state: Any, weight: Any, bias: Any) -> Any:
    h, c = state
    i, f, g, o = jax.numpy.split(input_sum + h @ weight + bias, 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jax.numpy.tanh(g)
    return jax.nn.sigmoid(o) * jax.numpy.tanh(c), c


# The number of states and the equations of torch.nn, by the number of gates.
_STEPS: dict[int, tuple[int, Callable[..., Any]]] = {
    1: (1, _rnn_step),
    3: (1, _three_gate_step),
    4: (2, _four_gate_step),
}
