"""What a call asks of a layer beside its plain run: lengths, resets, the states of every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.cells.wrappers import (
    AllStatesWrapper,
    MaskWrapper,
    RecurrentDropoutWrapper,
    ResetWrapper,
    WrapperSpec,
    ZoneoutWrapper,
)
from unrolled.engines.torch_ops import transforms
from unrolled.layers.regularization import RecurrentRegularization
from unrolled.layers.sequence import InputError, SequenceBatch

States = tuple[Tensor, ...]

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(slots=True)
class CallOptions:
    """The variants of cells that a call needs, and what goes to them and comes from them.

    Attributes:
        layer: its name, for messages.
        sequence: the input, without the steps past the end of each row if they are left out.
        resets: ``(time, batch, directions)``, or laid out as the steps are: before which of them each
            direction goes back to its initial state; None: before none.
        first: what resets go back to: of each state ``(layers × directions, batch, size)``, or nothing for
            zeros; None: what the call begins from.
        alive: ``(time, batch, 1)``, the steps that count; None: all of the sequence.
        every: whether the states of every step are wanted.
        noise: what the layer is trained with; None: nothing.
        training: whether it is in training.
        found: of each direction of each layer, its states of every step.
        lane: how many directions of layers have run.
    """

    layer: str
    sequence: SequenceBatch
    resets: Tensor | None = None
    first: States | None = None
    alive: Tensor | None = None
    every: bool = False
    noise: RecurrentRegularization | None = None
    training: bool = False
    found: list[States] = field(default_factory=list)
    lane: int = 0

    def mark(self, resets: Any, lanes: int) -> None:
        """Have the layer go back to its initial state before some steps; called before :meth:`end`.

        Args:
            resets: booleans laid out as the input without its features: the first steps of episodes.
            lanes: the number of directions.

        Raises:
            TypeError, ValueError: something else.
        """
        sequence = self.sequence
        self.check("resets")
        if not isinstance(resets, Tensor) or resets.dtype is not torch.bool:
            what = f"{resets.dtype}" if isinstance(resets, Tensor) else f"a {type(resets).__name__}"
            raise TypeError(f"{self.layer}: resets should be a tensor of booleans, got {what}")
        time, batch, _ = sequence.steps.shape
        wanted = [batch, time] if sequence.batch_first else [time, batch]
        wanted = wanted if sequence.batched else [time]
        if list(resets.shape) != wanted:
            shapes = f"{tuple(wanted)}, got {tuple(resets.shape)}"
            raise InputError(f"{self.layer}: Expected resets of shape {shapes}")
        forward = resets if sequence.batched else resets.unsqueeze(1)
        forward = forward.transpose(0, 1) if sequence.batched and sequence.batch_first else forward
        forward = forward.to(sequence.steps.device)
        self.resets = forward.unsqueeze(-1)
        if lanes == 2:  # the second one meets the border of two episodes at the last step of the first one
            back = torch.cat((forward[1:], torch.zeros_like(forward[:1])))
            self.resets = torch.stack((forward, back), -1)

    def end(self, lengths: Any, keep: bool) -> None:
        """Have each row end after its number of steps.

        Args:
            lengths: ``(batch,)``, whole numbers up to the number of time steps.
            keep: run over all steps, with no effect past the end; else only over those that count.

        Raises:
            TypeError, ValueError: something else.
        """
        sequence = self.sequence
        self.check("lengths")
        if not sequence.batched:
            raise InputError(
                f"{self.layer}: lengths needs an input with a batch axis, got one sequence: cut its end off"
            )
        time, batch, _ = sequence.steps.shape
        given = lengths if isinstance(lengths, Tensor) else _numbers(lengths)
        if given is None or given.dtype not in _WHOLE:
            what = f"{given.dtype}" if given is not None else repr(lengths)
            raise TypeError(f"{self.layer}: lengths should be whole numbers, got {what}")
        if tuple(given.shape) != (batch,):
            raise InputError(f"{self.layer}: Expected lengths of shape {(batch,)}, got {tuple(given.shape)}")
        if transforms.active() or given.is_meta:
            if not transforms.vectorises() and not given.is_meta:  # else the numbers can't be seen
                fits = ((given >= 0) & (given <= time)).all()
                what = f"{self.layer}: Expected lengths from 0 to the number of time steps"
                torch._assert_async(fits, what)
            self._mask(given)
            return
        given = given.detach().to("cpu", torch.int64)
        wrong = ((given < 0) | (given > time)).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise InputError(
                f"{self.layer}: Expected lengths from 0 to {time}, the number of time steps, got "
                f"{int(given[row])} for row {row}"
            )
        if keep:
            self._mask(given)
        elif batch and int(given.min()) < time:
            self.sequence = sequence.packed_by(given)
            if self.resets is not None and self.sequence.ragged is not None:
                self.resets = self.sequence.ragged.pack(self.resets)

    def _mask(self, lengths: Tensor) -> None:
        """Keep all steps; those past the end of a row read zeros, or what is no number would spread."""
        sequence = self.sequence
        steps = torch.arange(sequence.steps.shape[0], device=sequence.steps.device).unsqueeze(1)
        self.alive = (steps < lengths.to(sequence.steps.device)).unsqueeze(-1)
        self.sequence = replace(sequence, steps=torch.where(self.alive, sequence.steps, 0.0))

    def check(self, what: str) -> None:
        """Raise where what is asked for, by name, can't be had of a packed sequence."""
        if self.sequence.packed is not None:
            raise InputError(
                f"{self.layer}: {what} takes no packed sequence: give a padded one with its lengths"
            )

    def run(
        self, run: Any, cells: Sequence[Cell], x: Tensor, states: Sequence[States | None], sizes: Any
    ) -> list[tuple[Tensor, States]]:
        """Run cells as :func:`unrolled.engines.dispatch.run` does, variants of them where something is asked for."""
        count = len(cells[0].state)
        widths = list(cells[0].state_sizes().values())
        noise = self.noise
        if noise is not None and self.training and noise.variational:
            x = x * self._over_time(noise.mask(x, noise.variational, self.sequence.batch, x.shape[-1]))
        kept = None if noise is None or not self.training else noise.kept(x, widths)
        columns = [part.to(x.dtype) for part in (kept, self.resets, self.alive) if part is not None]
        beside = None if not columns else columns[0] if len(columns) == 1 else torch.cat(columns, -1)
        begun: list[States | None] = []
        chains: list[WrapperSpec] = []
        for back, state in enumerate(states):
            chain: list[tuple[str, tuple[Any, ...]]] = []
            given, first = state, state
            if self.first is not None:
                first = tuple(part[self.lane] for part in self.first) or None
            self.lane += 1
            if noise is not None and any(noise.zoneout):
                chain.append((ZoneoutWrapper.stored_name, (noise.zoneout, self.training)))
            if noise is not None and noise.recurrent and self.training:
                chain.append((RecurrentDropoutWrapper.stored_name, ()))
                mask = noise.mask(x, noise.recurrent, self.sequence.batch, widths[0])
                given = (*(given or self._zeros(x, widths)), mask)
                first = (*(first or self._zeros(x, widths)), mask)
            if self.resets is not None:
                chain.append((ResetWrapper.stored_name, (first is not None, back == 1, len(cells))))
                given = given if first is None else (*(given or self._zeros(x, widths)), *first)
            if self.alive is not None:
                chain.append((MaskWrapper.stored_name, ()))
            if self.every and count > 1:
                chain.append((AllStatesWrapper.stored_name, (count,)))
                given = None if given is None else (torch.cat(given[:count], -1), *given[count:])
            begun.append(given)
            chains.append(tuple(chain))
        results = (
            run(cells, x, begun, sizes, chains=chains, columns=beside)
            if chains[0]
            else run(cells, x, states, sizes)
        )
        pairs = zip(results, states, strict=True)
        return [self._taken(output, final, widths, state) for (output, final), state in pairs]

    def _taken(
        self, output: Tensor, final: States, widths: list[int], start: States | None
    ) -> tuple[Tensor, States]:
        """Of what a variant gives, the output and the final states; those of every step are put aside."""
        if self.alive is not None:
            output = torch.where(self.alive, output, 0.0)
        every: States = (output,)
        if self.every and len(widths) > 1:
            every = _parts(output, widths)
            final = (*_parts(final[0], widths), *final[1:])
        if self.every:
            self.found.append(every)
        final = final[: len(widths)]
        ragged = self.sequence.ragged
        if ragged is not None and ragged.empty is not None:
            empty = ragged.empty.to(output.device)
            first = start or tuple(torch.zeros_like(part) for part in final)
            final = tuple(torch.where(empty, a, b) for a, b in zip(first, final, strict=True))
        return every[0], final

    def _zeros(self, x: Tensor, widths: list[int]) -> States:
        return tuple(x.new_zeros(self.sequence.batch, width) for width in widths)

    def _over_time(self, rows: Tensor) -> Tensor:
        """Values of each row of the batch, in its order here, as they go with the steps."""
        sizes = self.sequence.sizes
        if sizes is None:
            return rows
        return torch.cat([rows[: int(size)] for size in sizes])

    def states(self, names: Sequence[str]) -> dict[str, Tensor]:
        """By name the states of every step of each direction of each layer, ``(layers × directions, …)``."""
        laid = [[self.sequence.output(part) for part in parts] for parts in zip(*self.found, strict=True)]
        return {name: torch.stack(parts) for name, parts in zip(names, laid, strict=True)}  # type: ignore[arg-type]


def _parts(joined: Tensor, widths: list[int]) -> States:
    """As torch.split along the features, which makes views that must not be changed in place."""
    return tuple(joined.narrow(-1, sum(widths[:k]), width) for k, width in enumerate(widths))


def _numbers(given: Any) -> Tensor | None:
    """Whole numbers in a list or an array as a tensor; None where they are none."""
    try:
        return torch.as_tensor(given, device="cpu") if len(given) else torch.zeros(0, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError):
        return None
