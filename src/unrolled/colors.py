"""The colours of numbers in a terminal: one scale, centred on zero, safe for the colour-blind."""

from __future__ import annotations

import cmath
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.style import Style
from rich.text import Text
from torch import Tensor

from unrolled.explain import number

if TYPE_CHECKING:
    from unrolled.layer_trace import LayerTrace
    from unrolled.trace import Trace

NEGATIVE, POSITIVE = "#2166ac", "#b2182b"
"""The ends of the scale: those of RdBu (ColorBrewer, Brewer & Harrower, 2003), with nine classes."""

NAN, INFINITY = "#f0e442", "#cc79a7"
"""Two colours of Okabe & Ito (2008), which the scale doesn't hold."""

# Where the scale begins. RdBu begins with white, which on a dark terminal outshines the ends; these
# are as far from a black background as from a white one.
_PALE_NEGATIVE, _PALE_POSITIVE = "#9db4cc", "#d1a79e"
_ZERO = 0.05  # of the largest magnitude: below it a number keeps the terminal's own background


@dataclass(frozen=True)
class Scale:
    """Colours from the largest magnitude below zero, blue, to the same above it, red.

    Attributes:
        largest: the magnitude that has the full colour; larger ones have it too.
    """

    largest: float

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Scale:
        """The scale that reaches to the largest finite number of these tensors of any shapes."""
        real = [tensor.detach().double().flatten() for tensor in tensors if not tensor.is_complex()]
        return cls(max((float(x.abs().nan_to_num(0, 0, 0).max()) for x in real if x.numel()), default=0.0))

    def color(self, value: float | complex) -> str | None:
        """The background of a number as ``#rrggbb``.

        None, the terminal's own, stands for zero and its neighbourhood, and for complex numbers.
        """
        if cmath.isnan(value):
            return NAN
        if cmath.isinf(value):
            return INFINITY
        if isinstance(value, complex) or abs(value) <= _ZERO * self.largest:
            return None
        pale, full = (_PALE_NEGATIVE, NEGATIVE) if value < 0 else (_PALE_POSITIVE, POSITIVE)
        share = abs(value) / self.largest if abs(value) < self.largest else 1.0
        mixed = (round(a + (b - a) * share) for a, b in zip(_channels(pale), _channels(full), strict=True))
        return "#" + "".join(f"{channel:02x}" for channel in mixed)

    def style(self, value: float | complex) -> Style:
        """The background of a number, and black or white for its digits, whichever stands out more."""
        background = self.color(value)
        return Style(color=_ink(background), bgcolor=background) if background else Style()

    def legend(self, shares: Iterable[float] = (-1, -0.5, 0, 0.5, 1)) -> Text:
        """The numbers at these shares of the largest magnitude, each on its colour."""
        values = [share * self.largest for share in shares]
        return Text(" ").join(Text(number(value), self.style(value)) for value in values)


@dataclass(frozen=True)
class Scales:
    """The scales of a whole trace: its parameters, its input, and all else that its steps compute."""

    parameters: Scale
    input: Scale
    quantities: Scale

    @classmethod
    def of(cls, trace: Trace, batch: int = 0) -> Scales:
        """Those of one row of a trace, of every layer, direction and step."""
        length = int(trace.layers[0].lengths[batch])
        values = (value for part in trace.layers for value in part.values.values())
        return cls(
            Scale.of(trace.recurrent.parameters()),
            Scale.of([trace.layers[0].input[:length, batch]]),
            Scale.of(value[:length, batch] for value in values),
        )

    def of_quantity(self, part: LayerTrace, name: str) -> Scale:
        """The scale of a quantity; an upper layer reads what the one below computes."""
        return self.input if part.layer == 0 and name == "x" and name not in part.values else self.quantities


def shown_on(console: Console) -> bool:
    """Whether a console has enough colours for a scale, and they are wished for."""
    return console.color_system in ("truecolor", "256") and not console.no_color


def _channels(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color[1:]))


def _ink(background: str) -> str:
    """Black or white: of the higher contrast as WCAG 2 has it, 4.5 at least."""
    shares = [channel / 255 for channel in _channels(background)]
    red, green, blue = (s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#000000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"
