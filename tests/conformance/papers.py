"""NumPy implementations of published cells, written from the equations of the papers.

Each function computes one step for one row. It takes the parameters ``w``, options ``o``, the input and the
old states, and returns the new states. Matrices of several gates are split into ``(gates, units, inputs)``.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy
from numpy import exp, log1p, maximum, sqrt, tanh

Row = numpy.ndarray
Step = Callable[..., tuple[Row, ...]]
STEPS: dict[str, Step] = {}


def sigmoid(v: Row) -> Row:
    return 1 / (1 + exp(-v))


def relu(v: Row) -> Row:
    return maximum(v, 0)


def norm(v: Row, gain: Row, shift: Row | float, eps: float = 1e-5) -> Row:
    return (v - v.mean()) / sqrt(v.var() + eps) * gain + shift


def parts(value: Row, count: int) -> Row:
    """Split concatenated matrices or vectors: ``(count * units, …)`` to ``(count, units, …)``."""
    return value.reshape(count, -1, *value.shape[1:])


def cell(*names: str) -> Callable[[Step], Step]:
    """Register a step for the cells with these names."""

    def register(step: Step) -> Step:
        STEPS.update(dict.fromkeys(names, step))
        return step

    return register


def blocks(matrix: Row, v: Row, heads: int) -> Row:
    """Multiply a block-diagonal matrix, given by its blocks, with a vector."""
    stacked = parts(matrix, heads)
    _, outputs, inputs = stacked.shape
    full = numpy.zeros((heads * outputs, heads * inputs))
    for k in range(heads):
        full[k * outputs : (k + 1) * outputs, k * inputs : (k + 1) * inputs] = stacked[k]
    return full @ v


@cell("PeepholeLSTM")
def peephole_lstm(w: Any, o: Any, x: Row, h: Row, c: Row) -> tuple[Row, ...]:
    W, U, b = parts(w.weight_ih, 4), parts(w.weight_hh, 4), parts(w.bias_ih, 4)
    new = sigmoid(W[1] @ x + U[1] @ h + w.peep_f * c + b[1]) * c + sigmoid(
        W[0] @ x + U[0] @ h + w.peep_i * c + b[0]
    ) * tanh(W[2] @ x + U[2] @ h + b[2])
    return sigmoid(W[3] @ x + U[3] @ h + w.peep_o * new + b[3]) * tanh(new), new


@cell("LayerNormLSTM")
def layer_norm_lstm(w: Any, o: Any, x: Row, h: Row, c: Row) -> tuple[Row, ...]:
    sums = norm(w.weight_hh @ h, w.gain_hh, 0) + norm(w.weight_ih @ x, w.gain_ih, 0) + w.bias_ih
    i, f, g, out = parts(sums, 4)
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    return sigmoid(out) * tanh(norm(c, w.gain_c, w.bias_c)), c


@cell("CIFG")
def cifg(w: Any, o: Any, x: Row, h: Row, c: Row) -> tuple[Row, ...]:
    W, U, b = parts(w.weight_ih, 3), parts(w.weight_hh, 3), parts(w.bias_ih, 3)
    p_i, p_o = (w.peep_i, w.peep_o) if o.peepholes else (0, 0)
    i = sigmoid(W[0] @ x + U[0] @ h + p_i * c + b[0])
    c = (1 - i) * c + i * tanh(W[1] @ x + U[1] @ h + b[1])
    return sigmoid(W[2] @ x + U[2] @ h + p_o * c + b[2]) * tanh(c), c


@cell("MultiplicativeLSTM")
def multiplicative_lstm(w: Any, o: Any, x: Row, h: Row, c: Row) -> tuple[Row, ...]:
    m = (w.weight_mx @ x) * (w.weight_mh @ h)
    i, f, g, out = parts(w.weight_ih @ x + w.weight_im @ m + w.bias_ih, 4)
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    return tanh(c) * sigmoid(out), c


@cell("RHN")
def rhn(w: Any, o: Any, x: Row, s: Row) -> tuple[Row, ...]:
    W, R = parts(w.weight_ih, 2), w.weight_hh.reshape(o.depth, 2, len(s), len(s))
    b = w.bias_hh.reshape(o.depth, 2, len(s))
    for k in range(o.depth):
        h = tanh((W[0] @ x if k == 0 else 0) + R[k, 0] @ s + b[k, 0])
        t = sigmoid((W[1] @ x if k == 0 else 0) + R[k, 1] @ s + b[k, 1])
        s = h * t + s * (1 - t)
    return (s,)


@cell("JANET")
def janet(w: Any, o: Any, x: Row, h: Row) -> tuple[Row, ...]:
    s, u = parts(w.weight_ih @ x + w.weight_hh @ h + w.bias_ih, 2)
    return (sigmoid(s) * h + (1 - sigmoid(s - o.beta)) * tanh(u),)


@cell("LEM")
def lem(w: Any, o: Any, x: Row, y: Row, z: Row) -> tuple[Row, ...]:
    V, W, b = parts(w.weight_ih, 4), parts(w.weight_hh, 3), parts(w.bias_ih, 4)
    slow = o.dt * sigmoid(W[0] @ y + V[0] @ x + b[0])
    fast = o.dt * sigmoid(W[1] @ y + V[1] @ x + b[1])
    z = (1 - slow) * z + slow * tanh(W[2] @ y + V[2] @ x + b[2])
    y = (1 - fast) * y + fast * tanh(w.weight_zy @ z + V[3] @ x + b[3])
    return y, z


@cell("ResetBeforeGRU")
def reset_before_gru(w: Any, o: Any, x: Row, h: Row) -> tuple[Row, ...]:
    W, U = parts(w.weight_ih, 3), parts(w.weight_hh, 3)
    b = parts(w.bias_ih + w.bias_hh, 3)
    r = sigmoid(W[0] @ x + U[0] @ h + b[0])
    z = sigmoid(W[1] @ x + U[1] @ h + b[1])
    return (z * h + (1 - z) * tanh(W[2] @ x + U[2] @ (r * h) + b[2]),)


@cell("LayerNormGRU")
def layer_norm_gru(w: Any, o: Any, x: Row, h: Row) -> tuple[Row, ...]:
    joint = numpy.concatenate([w.weight_ih, w.weight_hh], 1) @ numpy.concatenate([x, h]) + w.bias_ih
    reset, candidate, update = parts(norm(joint, w.gain, w.bias_norm, 1e-3), 3)
    candidate, update = tanh(sigmoid(reset) * candidate), sigmoid(update + o.update_bias)
    return (update * candidate + (1 - update) * h,)


@cell("MGU", "MGU1", "MGU2", "MGU3")
def mgu(w: Any, o: Any, x: Row, h: Row) -> tuple[Row, ...]:
    if hasattr(w, "gate"):
        f, W, U, b = sigmoid(w.gate), w.weight_ih, w.weight_hh, w.bias_ih
    elif len(w.weight_ih) == 2 * len(h):
        (V, W), (T, U), (a, b) = parts(w.weight_ih, 2), parts(w.weight_hh, 2), parts(w.bias_ih, 2)
        f = sigmoid(V @ x + T @ h + a)
    else:
        (T, U), W, b = parts(w.weight_hh, 2), w.weight_ih, w.bias_ih
        f = sigmoid(T @ h + getattr(w, "bias_f", 0))
    return ((1 - f) * h + f * tanh(W @ x + U @ (f * h) + b),)


@cell("LightRU")
def light_ru(w: Any, o: Any, x: Row, h: Row) -> tuple[Row, ...]:
    (W, V), (b, a) = parts(w.weight_ih, 2), parts(w.bias_ih, 2)
    f = sigmoid(V @ x + w.weight_hh @ h + a)
    return ((1 - f) * h + f * tanh(W @ x + b),)


@cell("LiGRU")
def li_gru(w: Any, o: Any, x: Row, h: Row) -> tuple[Row, ...]:
    z, a = parts(w.weight_ih @ x + w.weight_hh @ h + w.bias_ih, 2)
    return (sigmoid(z) * h + (1 - sigmoid(z)) * relu(a),)


@cell("UGRNN")
def ugrnn(w: Any, o: Any, x: Row, h: Row) -> tuple[Row, ...]:
    c, g = parts(w.weight_ih @ x + w.weight_hh @ h + w.bias_ih, 2)
    return (sigmoid(g) * h + (1 - sigmoid(g)) * tanh(c),)


@cell("IntersectionRNN")
def intersection_rnn(w: Any, o: Any, x: Row, y: Row, h: Row) -> tuple[Row, ...]:
    x = w.weight_x @ x if hasattr(w, "weight_x") else x
    y_in, h_in, g_y, g_h = parts(w.weight_ih @ x + w.weight_hh @ h + w.bias_ih, 4)
    return (sigmoid(g_y) * x + sigmoid(-g_y) * relu(y_in), sigmoid(g_h) * h + sigmoid(-g_h) * tanh(h_in))


@cell("CFN")
def cfn(w: Any, o: Any, x: Row, h: Row) -> tuple[Row, ...]:
    V, U, b = parts(w.weight_ih, 3), parts(w.weight_hh, 2), parts(w.bias_ih, 2)
    theta, eta = (sigmoid(U[k] @ h + V[k] @ x + b[k]) for k in (0, 1))
    return (theta * tanh(h) + eta * tanh(V[2] @ x),)


@cell("RAN")
def ran(w: Any, o: Any, x: Row, h: Row, c: Row) -> tuple[Row, ...]:
    W, U, b = parts(w.weight_ih, 3), parts(w.weight_hh, 2), parts(w.bias_hh, 2)
    i, f = (sigmoid(U[k] @ h + W[k + 1] @ x + b[k]) for k in (0, 1))
    c = i * (W[0] @ x) + f * c
    return {"tanh": tanh(c), "identity": c}[o.output], c


@cell("STAR")
def star(w: Any, o: Any, x: Row, h: Row) -> tuple[Row, ...]:
    (W, V), (b, a) = parts(w.weight_ih, 2), parts(w.bias_ih, 2)
    k = sigmoid(V @ x + w.weight_hh @ h + a)
    return (tanh((1 - k) * h + k * tanh(W @ x + b)),)


@cell("ATR")
def atr(w: Any, o: Any, x: Row, h: Row) -> tuple[Row, ...]:
    p, q = w.weight_ih @ x + w.bias_ih, w.weight_hh @ h
    return (sigmoid(p + q) * p + sigmoid(p - q) * h,)


@cell("IndRNN")
def ind_rnn(w: Any, o: Any, x: Row, h: Row) -> tuple[Row, ...]:
    return ({"relu": relu, "tanh": tanh}[o.nonlinearity](w.weight_ih @ x + w.weight_u * h + w.bias_ih),)


@cell("AntisymmetricRNN", "GatedAntisymmetricRNN")
def antisymmetric_rnn(w: Any, o: Any, x: Row, h: Row) -> tuple[Row, ...]:
    turned = (w.weight_hh - w.weight_hh.T - o.gamma * numpy.eye(len(h))) @ h
    sums = parts(w.weight_ih @ x + w.bias_ih, len(w.bias_ih) // len(h))
    gate = sigmoid(turned + sums[0]) if len(sums) == 2 else 1
    return (h + o.epsilon * gate * tanh(turned + sums[-1]),)


def low_rank_product(matrix: Row, low: Row | None) -> Row:
    return matrix if low is None else matrix @ low


@cell("FastRNN")
def fast_rnn(w: Any, o: Any, x: Row, h: Row) -> tuple[Row, ...]:
    W, U = (low_rank_product(getattr(w, f"weight_{k}"), getattr(w, f"low_{k}", None)) for k in ("ih", "hh"))
    return (sigmoid(w.alpha) * tanh(W @ x + U @ h + w.bias_ih) + sigmoid(w.beta) * h,)


@cell("FastGRNN")
def fast_grnn(w: Any, o: Any, x: Row, h: Row) -> tuple[Row, ...]:
    W, U = (low_rank_product(getattr(w, f"weight_{k}"), getattr(w, f"low_{k}", None)) for k in ("ih", "hh"))
    z = sigmoid(W @ x + U @ h + w.bias_z)
    return ((sigmoid(w.zeta) * (1 - z) + sigmoid(w.nu)) * tanh(W @ x + U @ h + w.bias_h) + z * h,)


@cell("CoRNN")
def co_rnn(w: Any, o: Any, x: Row, y: Row, z: Row) -> tuple[Row, ...]:
    z = z + o.dt * (tanh(w.weight_hh @ y + w.weight_zh @ z + w.weight_ih @ x + w.bias_ih)
                    - o.gamma * y - o.epsilon * z)  # fmt: skip
    return y + o.dt * z, z


@cell("UnICORNN")
def unicornn(w: Any, o: Any, x: Row, y: Row, z: Row) -> tuple[Row, ...]:
    pace = o.dt * (0.5 + 0.5 * tanh(w.control / 2))
    z = z - pace * (tanh(w.weight_hh * y + w.weight_ih @ x + w.bias_ih) + o.alpha * y)
    return y + pace * z, z


@cell("BRC", "NBRC")
def brc(w: Any, o: Any, x: Row, h: Row) -> tuple[Row, ...]:
    U, b = parts(w.weight_gates, 2), parts(w.bias_gates, 2)
    seen = parts(w.weight_hh, 2) @ h if hasattr(w, "weight_hh") else (w.weight_a * h, w.weight_c * h)
    a, c = 1 + tanh(U[0] @ x + seen[0] + b[0]), sigmoid(U[1] @ x + seen[1] + b[1])
    return (c * h + (1 - c) * tanh(w.weight_ih @ x + a * h),)


@cell("SCRN")
def scrn(w: Any, o: Any, x: Row, h: Row, s: Row) -> tuple[Row, ...]:
    s = (1 - o.alpha) * w.weight_sx @ x + o.alpha * s
    return sigmoid(w.weight_hs @ s + w.weight_ih @ x + w.weight_hh @ h), s


@cell("NAS")
def nas(w: Any, o: Any, x: Row, h: Row, c: Row) -> tuple[Row, ...]:
    a, m = parts(w.weight_ih @ x, 8), parts(w.weight_hh @ h + w.bias_hh, 8)
    low = [sigmoid(a[0] + m[0]), relu(a[1] + m[1]), sigmoid(a[2] + m[2]), relu(a[3] * m[3]),
           tanh(a[4] + m[4]), sigmoid(a[5] + m[5]), tanh(a[6] + m[6]), sigmoid(a[7] + m[7])]  # fmt: skip
    middle = [tanh(low[0] * low[1]), tanh(low[2] + low[3]), tanh(low[4] * low[5]), sigmoid(low[6] + low[7])]
    c = tanh(middle[0] + c) * middle[1]
    return tanh(c * tanh(middle[2] + middle[3])), c


@cell("SRU")
def sru(w: Any, o: Any, x: Row, h: Row, c: Row) -> tuple[Row, ...]:
    W, v, b = parts(w.weight_gates, 2), parts(w.weight_c, 2), parts(w.bias_gates, 2)
    f, r = sigmoid(W[0] @ x + v[0] * c + b[0]), sigmoid(W[1] @ x + v[1] * c + b[1])
    c = f * c + (1 - f) * (w.weight_ih @ x)
    past = (w.weight_x @ x if hasattr(w, "weight_x") else x) * (
        sqrt(1 + 2 * exp(o.highway_bias)) if o.rescale else 1
    )
    return r * c + (1 - r) * past, c


@cell("QRNN")
def qrnn(w: Any, o: Any, x: Row, h: Row, c: Row) -> tuple[Row, ...]:
    z, f = parts(w.weight_zf @ x + w.bias_zf, 2)
    f = sigmoid(f)
    i = sigmoid(w.weight_i @ x + w.bias_i) if o.pooling == "ifo" else 1 - f
    c = f * c + i * tanh(z)
    return (c if o.pooling == "f" else sigmoid(w.weight_o @ x + w.bias_o) * c), c


def positive_candidate(v: Row, positive: bool) -> Row:
    return numpy.where(v >= 0, v + 0.5, sigmoid(v)) if positive else v


@cell("MinGRU")
def min_gru(w: Any, o: Any, x: Row, h: Row) -> tuple[Row, ...]:
    k, v = parts(w.weight_ih @ x + w.bias_ih, 2)
    return ((1 - sigmoid(k)) * h + sigmoid(k) * positive_candidate(v, o.positive),)


@cell("MinLSTM")
def min_lstm(w: Any, o: Any, x: Row, h: Row) -> tuple[Row, ...]:
    f, i, v = parts(w.weight_ih @ x + w.bias_ih, 3)
    share = sigmoid(f) / (sigmoid(f) + sigmoid(i))
    return (share * h + (1 - share) * positive_candidate(v, o.positive),)


@cell("LRU")
def lru(w: Any, o: Any, x: Row, y: Row, re: Row, im: Row) -> tuple[Row, ...]:
    turn = exp(-exp(w.nu) + 1j * exp(w.theta))
    b_re, b_im = parts(w.weight_b, 2)
    state = turn * (re + 1j * im) + exp(w.gamma) * ((b_re + 1j * b_im) @ x)
    return ((w.weight_re + 1j * w.weight_im) @ state).real + w.weight_d @ x, state.real, state.imag


@cell("RGLRU")
def rg_lru(w: Any, o: Any, x: Row, h: Row) -> tuple[Row, ...]:
    x = w.weight_x @ x if hasattr(w, "weight_x") else x
    r, i = (sigmoid(blocks(getattr(w, f"weight_{k}"), x, o.heads) + getattr(w, f"bias_{k}")) for k in "ri")
    a = sigmoid(-w.decay) ** (8 * r)
    return (a * h + sqrt(1 - a**2) * (i * x),)


@cell("HGRN")
def hgrn(w: Any, o: Any, x: Row, y: Row, re: Row, im: Row) -> tuple[Row, ...]:
    c = parts(w.weight_c @ x + w.bias_c, 2)
    c = (c * sigmoid(c))[0] + 1j * (c * sigmoid(c))[1]
    f = o.lower_bound + (1 - o.lower_bound) * sigmoid(w.weight_f @ x + w.bias_f)
    state = f * exp(1j * w.theta) * (re + 1j * im) + (1 - f) * c
    gated = sigmoid(w.weight_g @ x + w.bias_g) * numpy.concatenate([state.real, state.imag])
    return w.weight_y @ norm(gated, w.gain, w.bias_norm) + w.bias_y, state.real, state.imag


@cell("SLSTM")
def slstm(w: Any, o: Any, x: Row, h: Row, c: Row, n: Row, m: Row) -> tuple[Row, ...]:
    W, R, b = parts(w.weight_ih, 4), parts(w.weight_hh, 4), parts(w.bias_ih, 4)
    i, f, z, out = (W[k] @ x + blocks(R[k], h, o.heads) + b[k] for k in range(4))
    log_f = -log1p(exp(-f))
    new = maximum(log_f + m, i)
    c = exp(log_f + m - new) * c + exp(i - new) * tanh(z)
    n = exp(log_f + m - new) * n + exp(i - new)
    return sigmoid(out) * c / n, c, n, new


def run(name: str, params: dict[str, Row], options: dict[str, Any], x: Row, states: list[Row]) -> Row:
    """Return the outputs of a cell for a sequence of one row, ``(time, units)``.

    Args:
        name: The name of the cell.
        params: Its parameters by name.
        options: Its options by name.
        x: The input, ``(time, features)``.
        states: The initial states.
    """
    w, o, outputs = SimpleNamespace(**params), SimpleNamespace(**options), []
    for row in x:
        states = list(STEPS[name](w, o, row, *states))
        outputs.append(states[0])
    return numpy.stack(outputs)
