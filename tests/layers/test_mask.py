"""Masks: skipped steps keep the states and have an output of zero, wherever they are in a sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER, assert_close

TIME, BATCH, INPUT, HIDDEN = 7, 3, 2, 4


def by_hand(layer: nn.LSTM, x: Tensor, mask: Tensor, resets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output and the final cell states, from single steps of torch.nn.LSTMCell."""
    cells = []
    for k in range(layer.num_layers):
        outputs = []
        for suffix in ("", "_reverse")[: 1 + layer.bidirectional]:
            cell = nn.LSTMCell(x.shape[-1], HIDDEN, dtype=x.dtype)
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                setattr(cell, name, getattr(layer, f"{name}_l{k}{suffix}"))
            # Running backward, an episode starts at the last step before the next episode.
            starts = torch.cat([resets[1:], torch.zeros_like(resets[:1])]) if suffix else resets
            output = torch.zeros(len(x), x.shape[1], HIDDEN, dtype=x.dtype)
            c_rows = []
            for row in range(x.shape[1]):
                h = c = torch.zeros(1, HIDDEN, dtype=x.dtype)
                steps, pending = [torch.zeros(HIDDEN, dtype=x.dtype)] * len(x), False
                for t in reversed(range(len(x))) if suffix else range(len(x)):
                    pending = pending or bool(starts[t, row])
                    if mask[t, row]:
                        if pending:
                            h, c, pending = torch.zeros_like(h), torch.zeros_like(c), False
                        h, c = cell(x[t, row : row + 1], (h, c))
                        steps[t] = h[0]
                output = output.index_copy(1, torch.tensor([row]), torch.stack(steps).unsqueeze(1))
                c_rows.append(c)
            outputs.append(output)
            cells.append(torch.cat(c_rows))
        x = torch.cat(outputs, -1)
    return x, torch.stack(cells)


def masks() -> dict[str, Tensor]:
    steps = torch.arange(TIME).unsqueeze(1)
    lengths = torch.tensor([TIME, 4, 0])
    return {
        "random": torch.rand(TIME, BATCH) > 0.4,
        "left padding": steps >= TIME - lengths,
        "right padding": steps < lengths,
        "all": torch.ones(TIME, BATCH, dtype=torch.bool),
    }


@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize(
    "engine", ["reference", pytest.param("native", marks=[NEEDS_COMPILER, pytest.mark.slow])]
)
def test_masked_steps(name: str, with_resets: bool, engine: str) -> None:
    mask = masks()[name]
    resets = torch.rand(TIME, BATCH) > (0.6 if with_resets else 2.0)
    layer = ur.LSTM(INPUT, HIDDEN, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(TIME, BATCH, INPUT, dtype=torch.float64)
    spoiled = torch.where(mask.unsqueeze(-1), x, torch.nan)
    expected = by_hand(layer, x, mask, resets)  # type: ignore[arg-type]
    with ur.engine(engine):
        output, (_, c) = layer(spoiled, mask=mask, resets=resets if with_resets else None)
    assert_close((output, c), expected, 1e-12)
    parameters = list(layer.parameters())
    actual = torch.autograd.grad(output.sum() + (c * c).sum(), parameters)
    wanted = torch.autograd.grad(expected[0].sum() + (expected[1] * expected[1]).sum(), parameters)
    assert_close(actual, wanted, 1e-12)


def test_layouts_and_other_options() -> None:
    mask, x = masks()["random"], torch.randn(TIME, BATCH, INPUT)
    layer, batch_first = ur.LSTM(INPUT, HIDDEN), ur.LSTM(INPUT, HIDDEN, batch_first=True)
    batch_first.load_state_dict(layer.state_dict())
    with ur.engine("reference"):
        expected = layer(x, mask=mask)[0]
        assert_close(batch_first(x.transpose(0, 1), mask=mask.T)[0].transpose(0, 1), expected, 1e-6)
        assert_close(layer(x[:, 1], mask=mask[:, 1])[0], expected[:, 1], 1e-6)
        assert_close(layer(x, mask=mask, checkpoint=2)[0], expected, 1e-6)
        _, _, states = layer(x, mask=mask, all_states=True)
        assert_close(states["h"][0] * mask.unsqueeze(-1), expected, 1e-6)
        right = masks()["right padding"]
        assert_close(layer(x, mask=right), layer(x, lengths=[TIME, 4, 0]), 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": [True] * TIME}, "LSTM: mask should be a tensor of booleans, got a list"),
        ({"mask": torch.ones(TIME, BATCH)}, "LSTM: mask should be a tensor of booleans, got torch.float32"),
        ({"mask": torch.ones(BATCH, TIME) > 0}, r"LSTM: Expected mask of shape \(7, 3\), got \(3, 7\)"),
        (
            {"mask": torch.ones(TIME, BATCH) > 0, "lengths": [TIME] * BATCH},
            "LSTM: got both lengths and mask: pass only one of them",
        ),
    ],
)
def test_wrong_masks(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        ur.LSTM(INPUT, HIDDEN)(torch.randn(TIME, BATCH, INPUT), **arguments)


def test_masked_calls_are_not_recorded() -> None:
    layer = ur.GRU(INPUT, HIDDEN)
    with ur.engine("reference"), ur.record(nn.Sequential(layer)) as rec:
        layer(torch.randn(TIME, BATCH, INPUT), mask=masks()["random"])
    assert "mask=" in str(rec.not_recorded)
