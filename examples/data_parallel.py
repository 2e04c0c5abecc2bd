r"""Train on several processes, on one machine or many, with torch's own engine: DDP, or fully sharded.

    torchrun --nproc-per-node 2 examples/data_parallel.py
    torchrun --nproc-per-node 2 examples/data_parallel.py --sharded
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        examples/data_parallel.py

Each process reads its share of the windows of yearly sunspot numbers (statsmodels ships them); gradients are
averaged. Before training the averaged gradients are compared with those that one process gets of all windows.
"""

from __future__ import annotations

import argparse
import copy
import os
from typing import Any

import statsmodels.api as sm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import unrolled as ur

YEARS = 33  # that a forecast sees


class Forecaster(nn.Module):
    """A recurrent layer over past years, and a linear map of its last output."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layer = ur.LSTM(1, hidden, num_layers=2, batch_first=True)
        self.next_year = nn.Linear(hidden, 1)

    def forward(self, past: Tensor) -> Tensor:
        """``(batch, years, 1)`` to ``(batch,)``: the change from the last year to the next."""
        change: Tensor = self.next_year(self.layer(past)[0][:, -1])
        return change.squeeze(-1)


def windows() -> tuple[Tensor, Tensor]:
    """Years in a row, and the change to the year after."""
    values = sm.datasets.sunspots.load_pandas().data["SUNACTIVITY"].to_numpy(float)
    scaled = torch.tensor(values / values.std(), dtype=torch.float32)
    return scaled.unfold(0, YEARS, 1)[:-1].unsqueeze(-1), scaled[YEARS:] - scaled[YEARS - 1 : -1]


def whole(tensor: Tensor | None) -> Tensor:
    """A gradient as one tensor, whoever holds the parts of it."""
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(given: argparse.Namespace, rank: int, processes: int, past: Tensor, change: Tensor) -> None:
    """Compare the gradients with those of one process, then train.

    What belongs to the group of processes ends with this function, before the group does.
    """
    mine = slice(rank * len(past) // processes, (rank + 1) * len(past) // processes)
    model = Forecaster(given.hidden)
    alone = copy.deepcopy(model)
    if given.sharded:
        mesh = init_device_mesh("cpu", (processes,))
        shards: Any = model
        fully_shard(shards.layer, mesh=mesh)
        fully_shard(shards, mesh=mesh)
    else:
        shards = DistributedDataParallel(model)

    torch.autograd.backward(nn.functional.huber_loss(alone(past), change))
    torch.autograd.backward(nn.functional.huber_loss(shards(past[mine]), change[mine]))
    worst = 0.0
    for one, part in zip(alone.parameters(), shards.parameters(), strict=True):
        expected = whole(one.grad)
        worst = max(worst, float((whole(part.grad) - expected).abs().max() / expected.abs().max()))
    if rank == 0:
        print(f"{processes} processes, gradients as of one to {worst:.0e} of the largest")
    assert worst < 1e-4, "the gradients differ"

    optimiser = torch.optim.Adam(shards.parameters(), lr=0.01)
    for epoch in range(given.epochs):
        optimiser.zero_grad()
        loss = nn.functional.huber_loss(shards(past[mine]), change[mine])
        torch.autograd.backward(loss)
        optimiser.step()
        dist.all_reduce(mean := loss.detach() / processes)
        if rank == 0 and epoch in (0, given.epochs - 1):
            print(f"epoch {epoch}: loss {float(mean):.4f}")


def main() -> None:
    """Join the other processes, and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sharded", action="store_true", help="parameters, gradients and optimiser in parts")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=32)
    given = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --nproc-per-node 2 examples/data_parallel.py")
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    past, change = windows()
    past, change = past[: len(past) // processes * processes], change[: len(past) // processes * processes]
    train(given, rank, processes, past, change)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
