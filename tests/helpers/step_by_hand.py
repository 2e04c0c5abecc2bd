"""One step of torch.nn's layers, written out from the equations in torch.nn's documentation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def step_by_hand(
    kind: str, parameter: Callable[[str], Tensor], x: Tensor, state: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """Compute one step, gate by gate.

    Args:
        kind: ``"rnn-tanh"``, ``"rnn-relu"``, ``"gru"``, ``"lstm"`` or ``"lstm-proj"``.
        parameter: Returns a parameter by name, such as ``"weight_ih"``.
        x: Input of the step.
        state: ``(h,)``, or ``(h, c)`` for an LSTM.

    Returns:
        The quantities by name.
    """
    h = state[0]
    a = x @ parameter("weight_ih").T + parameter("bias_ih")
    b = h @ parameter("weight_hh").T + parameter("bias_hh")
    if kind.startswith("rnn"):
        activation = torch.tanh if kind == "rnn-tanh" else torch.relu
        return {"input_sum": a, "hidden_sum": b, "h": activation(a + b)}
    if kind == "gru":
        (ar, az, an), (br, bz, bn) = a.chunk(3, -1), b.chunk(3, -1)
        r, z = torch.sigmoid(ar + br), torch.sigmoid(az + bz)
        n = torch.tanh(an + r * bn)
        return {"input_sum": a, "hidden_sum": b, "r": r, "z": z, "n": n, "h": n + z * (h - n)}
    i, f, g, o = (a + b).chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * state[1] + i * g
    h = o * c.tanh()
    h = h @ parameter("weight_hr").T if kind == "lstm-proj" else h
    return {"input_sum": a, "hidden_sum": b, "i": i, "f": f, "g": g, "o": o, "c": c, "h": h}
