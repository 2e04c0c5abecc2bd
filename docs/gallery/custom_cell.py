"""A cell of your own: each unit follows its input with a speed of its own."""

import torch
from torch import sigmoid
from torch.nn.functional import linear

import unrolled as ur


class Follow(ur.Cell):
    """Each unit follows a weighted input.

    Quantities:
        target: weighted input, which the unit follows
        speed: how much of the distance to the target is covered in one step
        h: hidden state
    """

    state = ("h",)
    weight = ur.Param("hidden", "input", init=torch.nn.init.ones_)
    rate = ur.Param("hidden", init=torch.nn.init.zeros_)

    def step(self, x, h):
        target = linear(x, self.weight)
        speed = sigmoid(self.rate)
        h = h + speed * (target - h)
        return h


layer = ur.Recurrent(Follow, input_size=1, hidden_size=3)
with torch.no_grad():
    layer.rate_l0.copy_(torch.tensor([-2.0, 0.0, 2.0]))  # a slow, a medium and a fast unit

t = ur.trace(layer, torch.tensor([[1.0], [1.0], [1.0], [-1.0], [-1.0], [-1.0]]))
t.to_html("custom_cell.html", title="A custom cell: units that follow their input")
