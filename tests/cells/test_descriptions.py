"""What cells say about themselves in their docstrings."""

from __future__ import annotations

import re

import pytest
import torch

import unrolled as ur
from unrolled.cells.descriptions import docstring_paragraphs, option_descriptions, quantity_descriptions


@pytest.mark.parametrize("name", sorted(ur.cells.__all__))
def test_every_option_and_quantity_is_described(name: str) -> None:
    cell = getattr(ur.cells, name)
    options, quantities = option_descriptions(cell), quantity_descriptions(cell)
    assert options.keys() == cell.options().keys()
    assert all(options.values())
    assert all(quantities.values())
    paragraphs = docstring_paragraphs(cell)
    assert re.search(r"\(.+, \d{4}", paragraphs[0]), "the first paragraph names the source"
    text = " ".join([*paragraphs, *options, *options.values(), *quantities, *quantities.values()])
    left_out = re.sub(r"``|:", "", cell.__doc__).split()
    assert sorted(text.replace(":", "").split()) == sorted(
        word for word in left_out if word not in ("Options", "Quantities")
    )


class Leaky(ur.Cell):
    """A leaky integrator.

    Options:
        rate: how fast it forgets, from 0
            to 1
        steps: number of substeps: 1 or more

    Quantities:
        h: the state

    It has no bias.
    """

    weight = ur.Param("hidden", "input")
    rate: float = 0.5
    steps: int = 1

    def step(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        h = (1 - self.rate) * h + torch.nn.functional.linear(x, self.weight)
        return h


def test_sections_of_a_docstring() -> None:
    assert option_descriptions(Leaky) == {
        "rate": "how fast it forgets, from 0 to 1",
        "steps": "number of substeps: 1 or more",
    }
    assert quantity_descriptions(Leaky) == {"h": "the state"}
    assert docstring_paragraphs(Leaky) == ["A leaky integrator.", "It has no bias."]


def test_a_docstring_without_sections_or_no_docstring() -> None:
    class Plain(Leaky):
        """One line."""

    class Silent(Leaky):
        pass

    for cell, paragraphs in ((Plain, ["One line."]), (Silent, [])):
        assert docstring_paragraphs(cell) == paragraphs
    assert option_descriptions(Plain) == {}
