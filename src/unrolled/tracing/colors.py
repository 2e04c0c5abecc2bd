"""The colours of numbers in a terminal, centred on zero and safe for the colour-blind, and their scales."""

from __future__ import annotations

import cmath
import math
from collections.abc import Iterable
from dataclasses import dataclass

from rich.style import Style
from rich.text import Text
from torch import Tensor

from unrolled.tracing.explain import number

NEGATIVE, POSITIVE = "#2166ac", "#b2182b"
"""The ends of the scale: those of RdBu (ColorBrewer, Brewer & Harrower, 2003), with nine classes."""

NAN, INFINITY = "#f0e442", "#cc79a7"
"""Two colours of Okabe & Ito (2008), which the scale doesn't hold."""

# Where the scale begins. RdBu begins with white, which on a dark terminal outshines the ends; these
# are as far from a black background as from a white one.
_PALE_NEGATIVE, _PALE_POSITIVE = "#9db4cc", "#d1a79e"
# Terminals of 256 colours would round such mixtures to other hues, so these are steps among their own.
_NEGATIVE_STEPS = ("#87afd7", "#5f87d7", "#005fd7", "#005faf")
_POSITIVE_STEPS = ("#d7afaf", "#d78787", "#d75f5f", "#af0000")
_ZERO = 0.05  # of the largest magnitude: below it a number keeps the terminal's own background


@dataclass(frozen=True)
class Scale:
    """Colours from the largest magnitude below zero, blue, to the same above it, red.

    Attributes:
        largest: the magnitude that has the full colour; larger ones have it too.
        coarse: in four steps each way, all among the 256 colours of xterm.
    """

    largest: float
    coarse: bool = False

    @classmethod
    def of(cls, tensors: Iterable[Tensor], coarse: bool = False) -> Scale:
        """The scale that reaches to the largest finite number of these tensors of any shapes."""
        real = [tensor.detach().double().flatten() for tensor in tensors if not tensor.is_complex()]
        finite = (float(x.abs().nan_to_num(0, 0, 0).max()) for x in real if x.numel())
        return cls(max(finite, default=0.0), coarse)

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
        share = abs(value) / self.largest if abs(value) < self.largest else 1.0
        if self.coarse:
            steps = _NEGATIVE_STEPS if value < 0 else _POSITIVE_STEPS
            return steps[math.ceil(share * len(steps)) - 1]
        pale, full = (_PALE_NEGATIVE, NEGATIVE) if value < 0 else (_PALE_POSITIVE, POSITIVE)
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


def _channels(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color[1:]))


def _ink(background: str) -> str:
    """Black or white: of the higher contrast as WCAG 2 has it, 4.5 at least."""
    shares = [channel / 255 for channel in _channels(background)]
    red, green, blue = (s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#000000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"
