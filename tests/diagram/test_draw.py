"""The drawing of a cell: ``trace.plot("cell")``."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

import unrolled as ur
from unrolled.diagram import DiagramError


class InPlace(ur.Cell):
    """A cell that changes a tensor in place."""

    weight = ur.Param("hidden", "input")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        h = h.clone()
        h[:, :1] = 0
        return torch.tanh(x @ self.weight.T + h)


def _digits(svg: str) -> set[str]:
    texts = (
        element.text or "" for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    )
    return {text for text in texts if re.fullmatch(r"−?\d+\.\d+", text)}


def test_a_drawing_has_the_numbers_of_a_unit_and_a_step(tmp_path: Path) -> None:
    t = ur.trace(ur.LSTM(2, 5, num_layers=2), torch.randn(6, 3, 2))
    for step, unit, batch, layer in ((0, 0, 0, 0), (4, 3, 2, 1)):
        drawing = t.plot("cell", step=step, unit=unit, batch=batch, layer=layer)
        part = t.layer(layer)
        expected = {
            f"{part[name][step, batch, unit].item():.2f}".replace("-", "−")
            for name in ("i", "f", "g", "o", "c", "h")
        }
        assert expected - {"−0.00"} <= _digits(drawing.svg) | {"0.00"}
        path = drawing.save(tmp_path / "cell.svg")
        assert path.read_text(encoding="utf-8") == drawing.svg == drawing._repr_svg_()


def test_errors_of_drawings(tmp_path: Path) -> None:
    t = ur.trace(ur.GRU(2, 3), torch.randn(4, 2))
    with pytest.raises(IndexError, match="unit"):
        t.plot("cell", unit=3)
    with pytest.raises(IndexError, match="time step"):
        t.plot("cell", step=4)
    with pytest.raises(ValueError, match="theme"):
        t.plot("cell", theme="blue")
    with pytest.raises(ValueError, match="expected a path ending in .svg, got"):
        t.plot("cell").save(tmp_path / "cell.png")
    with pytest.raises(DiagramError, match="InPlace has no diagram, because"):
        ur.trace(ur.Recurrent(InPlace, 2, 3), torch.randn(4, 2)).plot("cell")
