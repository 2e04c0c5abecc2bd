"""What the page calls the input and the output of a layer: the names are evaluated and give its numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import unrolled as ur
from unrolled.page.tensor_names import tensor_names


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("shape", [(4, 2), (4, 3, 2)])
@pytest.mark.parametrize("options", [{}, {"proj_size": 2}])
def test_names_are_right(
    shape: tuple[int, ...], bidirectional: bool, batch_first: bool, options: dict[str, int]
) -> None:
    layer = nn.LSTM(2, 3, num_layers=2, batch_first=batch_first, bidirectional=bidirectional, **options)
    x = torch.randn(shape if not batch_first or len(shape) < 3 else (3, 4, 2))
    trace = ur.trace(layer, x)
    tensors = {"input": x, "output": layer(x)[0]}
    for part in trace.layers:
        for row in range(3 if len(shape) == 3 else 1):
            names = tensor_names(trace, part, row)
            assert names["above"] == (1 if part.layer == 0 else None)
            assert (names["input"] is None, names["output"] is None) == (part.layer == 1, part.layer == 0)
            for name, values in (("input", part.input), ("output", part["h"])):
                if names[name] is not None:
                    for step in range(4):
                        found = eval(names[name].replace("{}", str(step)), tensors)
                        torch.testing.assert_close(found, values[step, row], rtol=0, atol=1e-6)


def test_a_packed_sequence_has_no_index() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 2), torch.randn(2, 2)])
    trace = ur.trace(nn.RNN(2, 3), packed)
    names = tensor_names(trace, trace.layers[0], 0)
    assert names == {"input": None, "output": None, "joined": False, "above": None}
