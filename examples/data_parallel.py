r"""Train on several processes, on one machine or many, with DistributedDataParallel or fully_shard.

    torchrun --nproc-per-node 2 examples/data_parallel.py
    torchrun --nproc-per-node 2 examples/data_parallel.py --sharded
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        examples/data_parallel.py

The data is the yearly sunspot numbers of statsmodels. Each process reads its share of the samples, and the
gradients are averaged. Before training, the averaged gradients are compared with those of a single process
that reads all samples.
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

YEARS = 33  # in each input


class Forecaster(nn.Module):
    """A recurrent layer over past years, and a linear layer on its last output."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layer = ur.LSTM(1, hidden, num_layers=2, batch_first=True)
        self.next_year = nn.Linear(hidden, 1)

    def forward(self, past: Tensor) -> Tensor:
        """Return the change to the next year, of shape ``(batch,)``, for input ``(batch, years, 1)``."""
        change: Tensor = self.next_year(self.layer(past)[0][:, -1])
        return change.squeeze(-1)


def load_windows() -> tuple[Tensor, Tensor]:
    """Return windows of consecutive years, and the change to the year after each."""
    values = sm.datasets.sunspots.load_pandas().data["SUNACTIVITY"].to_numpy(float)
    scaled = torch.tensor(values / values.std(), dtype=torch.float32)
    return scaled.unfold(0, YEARS, 1)[:-1].unsqueeze(-1), scaled[YEARS:] - scaled[YEARS - 1 : -1]


def full_gradient(tensor: Tensor | None) -> Tensor:
    """Return a gradient as one tensor, also if it is sharded."""
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(args: argparse.Namespace, rank: int, processes: int, past: Tensor, change: Tensor) -> None:
    """Compare the gradients with those of a single process, then train.

    All objects that use the process group are local to this function, so they are freed before the group.
    """
    share = slice(rank * len(past) // processes, (rank + 1) * len(past) // processes)
    model = Forecaster(args.hidden)
    single = copy.deepcopy(model)
    if args.sharded:
        mesh = init_device_mesh("cpu", (processes,))
        parallel: Any = model
        fully_shard(parallel.layer, mesh=mesh)
        fully_shard(parallel, mesh=mesh)
    else:
        parallel = DistributedDataParallel(model)

    torch.autograd.backward(nn.functional.huber_loss(single(past), change))
    torch.autograd.backward(nn.functional.huber_loss(parallel(past[share]), change[share]))
    largest = 0.0
    for reference, parameter in zip(single.parameters(), parallel.parameters(), strict=True):
        expected = full_gradient(reference.grad)
        error = (full_gradient(parameter.grad) - expected).abs().max() / expected.abs().max()
        largest = max(largest, float(error))
    if rank == 0:
        print(f"{processes} processes, largest relative difference of the gradients: {largest:.0e}")
    assert largest < 1e-4, "the gradients differ"

    optimizer = torch.optim.Adam(parallel.parameters(), lr=0.01)
    for epoch in range(args.epochs):
        optimizer.zero_grad()
        loss = nn.functional.huber_loss(parallel(past[share]), change[share])
        torch.autograd.backward(loss)
        optimizer.step()
        dist.all_reduce(mean := loss.detach() / processes)
        if rank == 0 and epoch in (0, args.epochs - 1):
            print(f"epoch {epoch}: loss {float(mean):.4f}")


def main() -> None:
    """Join the process group and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sharded", action="store_true", help="shard parameters, gradients and optimizer states"
    )
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=32)
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --nproc-per-node 2 examples/data_parallel.py")
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    past, change = load_windows()
    past, change = past[: len(past) // processes * processes], change[: len(past) // processes * processes]
    train(args, rank, processes, past, change)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
