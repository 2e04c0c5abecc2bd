"""GPU kernels of other libraries: TorchRL (in Triton) and FlashRNN."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from unrolled.cli.bench.rows import CELLS
from unrolled.cli.bench.workload import Call, Workload


def prepare_torchrl(workload: Workload) -> Call:
    """Return a call of TorchRL's layer with its Triton kernels. It takes ``(batch, time, input)``."""
    row, device = workload.row, workload.x.device
    count = len(CELLS[row.cell].state)
    names = ["hidden0", "hidden1"] if count == 2 else ["hidden"]
    modules, tensordict = import_module("torchrl.modules"), import_module("tensordict")
    module = getattr(modules, f"{row.cell.upper()}Module")(
        input_size=row.input,
        hidden_size=row.hidden,
        in_keys=["x", *names],
        out_keys=["y", *(("next", name) for name in names)],
        recurrent_backend="triton",
        default_recurrent_mode=True,
        device=device,
    )
    own: torch.nn.Module = getattr(module, row.cell)
    own.load_state_dict(workload.theirs.state_dict())
    zeros = torch.zeros(row.batch, row.time, 1, row.hidden, device=device)
    is_init = torch.zeros(row.batch, row.time, 1, dtype=torch.bool, device=device)

    def layer(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        values = {"x": x.transpose(0, 1), "is_init": is_init, **dict.fromkeys(names, zeros)}
        out = module(tensordict.TensorDict(values, [row.batch, row.time]))
        final = [out["next", name][:, -1].transpose(0, 1) for name in names]
        return out["y"].transpose(0, 1), tuple(final)

    return workload.call(layer, own.parameters())


def prepare_flashrnn(workload: Workload) -> Call:
    """Return a call of FlashRNN's fused kernel for a cell with four gates, in float32, with one head.

    Its gates are in torch.nn's order. torch computes the products with the input.
    """
    flashrnn: Any = import_module("flashrnn").flashrnn
    row, parameters = workload.row, list(workload.theirs.parameters())
    weight_ih, weight_hh, bias_ih, bias_hh = parameters

    def layer(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        gates = torch.nn.functional.linear(x, weight_ih, bias_ih)
        gates = gates.view(row.time, row.batch, 4, 1, row.hidden).transpose(0, 1).contiguous()
        recurrent, bias = weight_hh.view(4, 1, row.hidden, row.hidden), bias_hh.view(4, 1, row.hidden)
        states, last = flashrnn(
            gates, recurrent, bias, function=row.cell, backend="cuda_fused", dtype="float32"
        )
        output = states[0].view(row.batch, row.time, row.hidden).transpose(0, 1)
        return output, tuple([part.reshape(1, row.batch, row.hidden) for part in last])

    return workload.call(layer, parameters)
