"""Options of a forward call: how lengths pack the input, and which wrappers implement the other options."""

from __future__ import annotations

import functools
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
from unrolled.engines._torch_private import assert_async, functional_assert_async
from unrolled.engines.torch_ops import recording, transforms
from unrolled.layers import episodes
from unrolled.layers.regularization import RecurrentRegularization
from unrolled.layers.sequence import InputError, SequenceBatch, check_values

States = tuple[Tensor, ...]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(slots=True)
class CallOptions:
    """The options of one forward call. :meth:`run` wraps the cells of each layer accordingly.

    Attributes:
        layer: Name of the layer, for error messages.
        sequence: The input. If it is packed by lengths, without the steps past the end of each row.
        resets: Whether each direction resets its state before a step, ``(time, batch, directions)``, or
            packed like the steps. None: no resets.
        reset_states: The states after a reset, each ``(layers × directions, batch, size)``. Empty: zeros.
            None: the initial states of the call.
        mask: Whether each step counts, ``(time, batch, 1)``. None: all steps count.
        all_states: Whether to return the states of every step.
        regularization: The dropout and zoneout of the layer, if any.
        training: Whether the layer is in training mode.
        states_by_direction: The states of every step, for each direction of each layer that has run.
        direction_index: The number of directions of layers that have run.
    """

    layer: str
    sequence: SequenceBatch
    resets: Tensor | None = None
    reset_states: States | None = None
    mask: Tensor | None = None
    all_states: bool = False
    regularization: RecurrentRegularization | None = None
    training: bool = False
    states_by_direction: list[States] = field(default_factory=list)
    direction_index: int = 0

    def set_resets(self, resets: Any, directions: int) -> None:
        """Reset the states before some steps. Must be called before :meth:`set_lengths`.

        Args:
            resets: Booleans in the layout of the input, without its features. True marks the first step of
                an episode.
            directions: Number of directions of the layer.

        Raises:
            TypeError: If ``resets`` isn't a tensor of booleans.
            InputError: If ``resets`` has the wrong shape or the input is packed.
        """
        forward = self._step_flags("resets", resets)
        self.resets = forward.unsqueeze(-1)
        if directions == 2:  # running backward, an episode starts at the last step before the next episode
            backward = torch.cat((forward[1:], torch.zeros_like(forward[:1])))
            self.resets = torch.stack((forward, backward), -1)

    def _step_flags(self, argument: str, flags: Any) -> Tensor:
        """Return the booleans of an argument that has one for each step as ``(time, batch)``.

        Args:
            argument: Name of the argument, for error messages.
            flags: Booleans in the layout of the input, without its features.

        Raises:
            TypeError: If ``flags`` isn't a tensor of booleans.
            InputError: If ``flags`` has the wrong shape or the input is packed.
        """
        sequence = self.sequence
        self.check_not_packed(argument)
        if not isinstance(flags, Tensor) or flags.dtype is not torch.bool:
            kind = f"{flags.dtype}" if isinstance(flags, Tensor) else f"a {type(flags).__name__}"
            raise TypeError(f"{self.layer}: {argument} should be a tensor of booleans, got {kind}")
        check_values(f"{self.layer}: {argument}", flags, sequence.steps.is_meta, may_be_functional=True)
        time, batch, _ = sequence.steps.shape
        expected = [batch, time] if sequence.batch_first else [time, batch]
        expected = expected if sequence.batched else [time]
        if list(flags.shape) != expected:
            shapes = f"{tuple(expected)}, got {tuple(flags.shape)}"
            raise InputError(f"{self.layer}: Expected {argument} of shape {shapes}")
        forward = flags if sequence.batched else flags.unsqueeze(1)
        forward = forward.transpose(0, 1) if sequence.batched and sequence.batch_first else forward
        return forward.to(sequence.steps.device)

    def set_mask(self, mask: Any, lengths: Any, mask_steps: bool) -> None:
        """Skip the steps where a mask is False. Must be called after :meth:`set_resets`.

        Args:
            mask: Booleans in the layout of the input, without its features.
            lengths: The argument ``lengths`` of the same call.
            mask_steps: If True, run all steps. Otherwise steps past the end of a row don't run if these are
                the only ones to skip.

        Raises:
            TypeError: If ``mask`` isn't a tensor of booleans.
            InputError: If ``mask`` has the wrong shape, the input is packed, or ``lengths`` is given.
        """
        if lengths is not None:
            raise InputError(f"{self.layer}: got both lengths and mask: pass only one of them")
        flags = self._step_flags("mask", mask)
        if not (mask_steps or transforms.active() or flags.is_meta) and self.sequence.batched:
            counts = flags.sum(0)
            if torch.equal(flags, torch.arange(len(flags), device=flags.device).unsqueeze(1) < counts):
                self.set_lengths(counts, mask_steps=False)
                return
        if self.resets is not None:
            self.resets = _defer_resets(self.resets, flags)
        self._skip_steps(flags.unsqueeze(-1))

    def set_lengths(self, lengths: Any, mask_steps: bool) -> None:
        """Set the length of each row.

        Args:
            lengths: ``(batch,)``, integers from 0 to the number of time steps.
            mask_steps: If True, run all steps but keep the states unchanged past the end of a row. Otherwise
                pack the sequence, so that these steps don't run.

        Raises:
            TypeError: If ``lengths`` aren't integers.
            InputError: If ``lengths`` have the wrong shape or values, or the input is packed or unbatched.
        """
        sequence = self.sequence
        self.check_not_packed("lengths")
        if not sequence.batched:
            raise InputError(
                f"{self.layer}: lengths needs an input with a batch dimension; cut a single sequence to its "
                "length instead"
            )
        time, batch, _ = sequence.steps.shape
        tensor = lengths if isinstance(lengths, Tensor) else _as_tensor(lengths)
        if tensor is None or tensor.dtype not in _INTEGERS:
            kind = f"{tensor.dtype}" if tensor is not None else repr(lengths)
            advice = ": while torch records a graph, pass a tensor" if transforms.active() else ""
            raise TypeError(f"{self.layer}: lengths should be integers, got {kind}{advice}")
        check_values(f"{self.layer}: lengths", tensor, sequence.steps.is_meta)
        if tuple(tensor.shape) != (batch,):
            raise InputError(f"{self.layer}: Expected lengths of shape {(batch,)}, got {tuple(tensor.shape)}")
        if transforms.active() or tensor.is_meta:
            if not transforms.in_functorch() and not tensor.is_meta:  # elsewhere the values are unknown
                in_range = ((tensor >= 0) & (tensor <= time)).all()
                message = f"{self.layer}: Expected lengths from 0 to the number of time steps"
                if recording.in_jit_trace():  # it drops an assertion whose result nothing reads
                    tensor = functional_assert_async(in_range, message, tensor)
                else:
                    assert_async(in_range, message)
            self._mask_lengths(tensor)
            return
        tensor = tensor.detach().to("cpu", torch.int64)
        invalid_rows = ((tensor < 0) | (tensor > time)).nonzero()
        if len(invalid_rows):
            row = int(invalid_rows[0])
            raise InputError(
                f"{self.layer}: Expected lengths from 0 to {time}, the number of time steps, got "
                f"{int(tensor[row])} for row {row}"
            )
        if mask_steps:
            self._mask_lengths(tensor)
        elif batch and int(tensor.min()) < time:
            self.sequence = sequence.pack(tensor)
            if self.resets is not None and self.sequence.packed_layout is not None:
                self.resets = self.sequence.packed_layout.pack(self.resets)

    def _mask_lengths(self, lengths: Tensor) -> None:
        steps = torch.arange(self.sequence.steps.shape[0], device=self.sequence.steps.device).unsqueeze(1)
        self._skip_steps((steps < lengths.to(self.sequence.steps.device)).unsqueeze(-1))

    def _skip_steps(self, mask: Tensor) -> None:
        # Zero the input of skipped steps so that NaNs cannot spread into gradients.
        self.mask = mask
        self.sequence = replace(self.sequence, steps=torch.where(mask, self.sequence.steps, 0.0))

    def check_not_packed(self, argument: str) -> None:
        """Raise InputError if the input is packed, which ``argument`` doesn't support."""
        if self.sequence.packed is not None:
            raise InputError(
                f"{self.layer}: {argument} doesn't support packed sequences: pass a padded input and lengths"
            )

    def run(
        self,
        run: Any,
        cells: Sequence[Cell],
        x: Tensor,
        states: Sequence[States | None],
        sizes: Any,
        wrapper_specs: Sequence[WrapperSpec] = ((), ()),
        extra_inputs: Tensor | None = None,
    ) -> list[tuple[Tensor, States]]:
        """Run the cells of one layer, inside the wrappers that the options require.

        Args:
            run: Runs cells, as :func:`unrolled.engines.dispatch.run` does.
            cells: The bound cell of each direction.
            x: The input of the layer.
            states: The initial states of each cell. None: zeros.
            sizes: The batch sizes if the input is packed, else None.
            wrapper_specs: Wrappers to apply to each cell before those of the options.
            extra_inputs: Features that these wrappers read in addition to ``x``.

        Returns:
            The output and the final states of each cell, without the wrappers' own states.
        """
        count = len(cells[0].state)
        widths = list(cells[0].state_sizes().values())
        regularization = self.regularization
        if regularization is not None and self.training and regularization.variational:
            mask = regularization.dropout_mask(
                x, regularization.variational, self.sequence.batch, x.shape[-1]
            )
            x = x * self._repeat_over_time(mask)
        zoneout_mask = None
        if regularization is not None and self.training:
            zoneout_mask = regularization.zoneout_mask(x, widths)
        options = (extra_inputs, zoneout_mask, self.resets, self.mask)
        parts = [part.to(x.dtype) for part in options if part is not None]
        extra_inputs = None if not parts else parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        wrapper_states: list[States | None] = []
        all_specs: list[WrapperSpec] = []
        for direction, state in enumerate(states):
            spec: list[tuple[str, tuple[Any, ...]]] = list(wrapper_specs[direction])
            initial, reset_state = state, state
            if self.reset_states is not None:
                reset_state = tuple(part[self.direction_index] for part in self.reset_states) or None
            self.direction_index += 1
            if regularization is not None and any(regularization.zoneout):
                spec.append((ZoneoutWrapper.stored_name, (regularization.zoneout, self.training)))
            if regularization is not None and regularization.recurrent and self.training:
                spec.append((RecurrentDropoutWrapper.stored_name, ()))
                mask = regularization.dropout_mask(
                    x, regularization.recurrent, self.sequence.batch, widths[0]
                )
                initial = (*(initial or self._zeros(x, widths)), mask)
                reset_state = (*(reset_state or self._zeros(x, widths)), mask)
            if self.resets is not None:
                arguments = (reset_state is not None, direction == 1, len(cells))
                spec.append((ResetWrapper.stored_name, arguments))
                if reset_state is not None:
                    initial = (*(initial or self._zeros(x, widths)), *reset_state)
            if self.mask is not None:
                spec.append((MaskWrapper.stored_name, ()))
            if self.all_states and count > 1:
                spec.append((AllStatesWrapper.stored_name, (count,)))
                initial = None if initial is None else (torch.cat(initial[:count], -1), *initial[count:])
            wrapper_states.append(initial)
            all_specs.append(tuple(spec))
        if not all_specs[0]:
            results = run(cells, x, states, sizes)
        else:
            run = functools.partial(run, wrapper_specs=all_specs, extra_inputs=extra_inputs)
            results = run(cells, x, wrapper_states, sizes)
            if self.resets is not None and not transforms.active():
                current = 1 if self.all_states else count
                results = self._separate_episodes(run, cells, x, wrapper_states, sizes, results, current)
        pairs = zip(results, states, strict=True)
        return [self._unwrap(output, final, widths, state) for (output, final), state in pairs]

    def _separate_episodes(
        self,
        run: Any,
        cells: Sequence[Cell],
        x: Tensor,
        states: Sequence[States | None],
        sizes: Any,
        results: list[tuple[Tensor, States]],
        count: int,
    ) -> list[tuple[Tensor, States]]:
        """Keep NaN and infinity of episodes that others follow out of the gradients, if there are any.

        These episodes keep their results, but no gradient flows through them: the layer runs again with zeros
        in their place.

        Args:
            run: Runs cells.
            cells: The bound cell of each direction.
            x: The input of the layer.
            states: The initial states of each cell, the wrappers' own included.
            sizes: The batch sizes if the input is packed, else None.
            results: The output and the final states of each cell.
            count: The number of states that aren't the wrappers' own.
        """
        outputs = [output for output, _ in results]
        records = torch.is_grad_enabled() and any(output.requires_grad for output in outputs)
        initial = [(state or ())[:count] for state in states]
        if not records or episodes.all_finite([x, *outputs, *initial[0], *initial[-1]]):
            return results
        assert self.resets is not None
        found = episodes.find_nonfinite([x, *outputs], initial, self.resets, sizes)
        if found is None:
            return results
        steps, first, last = found
        clean_states: list[States | None] = []
        for state, begin in zip(states, (first, last), strict=False):
            clean = [torch.where(begin, 0.0, part) for part in (state or ())[:count]]
            clean_states.append(None if state is None else (*clean, *state[count:]))
        new_results = run(cells, torch.where(steps, 0.0, x), clean_states, sizes)
        separated = []
        for old, new, end in zip(results, new_results, (last, first), strict=False):
            output = torch.where(steps, old[0].detach(), new[0])
            pairs = zip(old[1], new[1], strict=True)
            separated.append((output, tuple(torch.where(end, a.detach(), b) for a, b in pairs)))
        return separated

    def _unwrap(
        self, output: Tensor, final: States, widths: list[int], initial: States | None
    ) -> tuple[Tensor, States]:
        """Return the cell's output and final states, and collect the states of every step if needed."""
        if self.mask is not None:
            output = torch.where(self.mask, output, 0.0)
        states: States = (output,)
        if self.all_states and len(widths) > 1:
            states = _split_features(output, widths)
            final = (*[part.clone() for part in _split_features(final[0], widths)], *final[1:])
        if self.all_states:
            self.states_by_direction.append(states)
        final = final[: len(widths)]
        layout = self.sequence.packed_layout
        if layout is not None and layout.empty_rows is not None:
            empty_rows = layout.empty_rows.to(output.device)
            initial = initial or tuple(torch.zeros_like(part) for part in final)
            final = tuple(torch.where(empty_rows, a, b) for a, b in zip(initial, final, strict=True))
        return states[0], final

    def _zeros(self, x: Tensor, widths: list[int]) -> States:
        return tuple(x.new_zeros(self.sequence.batch, width) for width in widths)

    def _repeat_over_time(self, rows: Tensor) -> Tensor:
        """Bring one value per row to a shape that broadcasts with the steps."""
        if self.sequence.batch_sizes is None:
            return rows
        return torch.cat([rows[:size] for size in self.sequence.size_list])

    def states(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the states of every step by name, ``(layers × directions, *layout of the input, size)``."""
        directions = zip(*self.states_by_direction, strict=True)
        outputs = [[self.sequence.output(part) for part in parts] for parts in directions]
        return {name: torch.stack(parts) for name, parts in zip(names, outputs, strict=True)}  # type: ignore[arg-type]


def _defer_resets(resets: Tensor, mask: Tensor) -> Tensor:
    """Move resets of skipped steps to the next step in the same direction that isn't skipped.

    Args:
        resets: ``(time, batch, directions)``.
        mask: ``(time, batch)``.
    """
    directions = [resets[..., 0], *[resets[..., k].flip(0) for k in range(1, resets.shape[-1])]]
    deferred = []
    for direction, (flags, runs) in enumerate(zip(directions, (mask, mask.flip(0)), strict=False)):
        count = flags.cumsum(0)  # of the resets so far
        seen = torch.where(runs, count, 0).cummax(0).values  # of those before the last step that ran
        before = torch.cat((torch.zeros_like(seen[:1]), seen[:-1]))
        moved = runs & (count > before)
        deferred.append(moved.flip(0) if direction else moved)
    return torch.stack(deferred, -1)


def _split_features(joined: Tensor, widths: list[int]) -> States:
    """Split the last dimension. Unlike views of torch.split, the results may be changed in place."""
    return tuple(joined.narrow(-1, sum(widths[:k]), width) for k, width in enumerate(widths))


def _as_tensor(values: Any) -> Tensor | None:
    """Convert a list or array to a tensor. Return None if that isn't possible."""
    try:
        return torch.as_tensor(values, device="cpu") if len(values) else torch.zeros(0, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError):
        return None
