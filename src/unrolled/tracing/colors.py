"""Diverging color scale for numbers in a terminal, centered on zero and safe for color-blind readers."""

from __future__ import annotations

import cmath
import math
from collections.abc import Iterable
from dataclasses import dataclass

from rich.style import Style
from rich.text import Text
from torch import Tensor

from unrolled.tracing.explain import format_number

NEGATIVE, POSITIVE = "#2166ac", "#b2182b"
"""The two ends of the scale, from the nine-class RdBu palette (ColorBrewer; Brewer & Harrower, 2003)."""

NAN, INFINITY = "#f0e442", "#cc79a7"
"""Two colors of Okabe & Ito (2008) that are not on the scale."""

# Colors of the smallest magnitudes. RdBu starts at white, which is brighter than the ends on a dark terminal.
# These have the same contrast with a black background as with a white one.
_PALE_NEGATIVE, _PALE_POSITIVE = "#9db4cc", "#d1a79e"
# A terminal with 256 colors would round interpolated colors to other hues, so these are colors it has.
_NEGATIVE_STEPS = ("#87afd7", "#5f87d7", "#005fd7", "#005faf")
_POSITIVE_STEPS = ("#d7afaf", "#d78787", "#d75f5f", "#af0000")
_UNCOLORED = 0.05  # numbers below this fraction of the largest magnitude keep the terminal's background


@dataclass(frozen=True)
class ColorScale:
    """Color scale from blue (``-largest``) to red (``+largest``).

    Attributes:
        largest: Magnitude with the full color. Larger magnitudes get the full color, too.
        coarse: Use only four steps per sign, all among the 256 colors of xterm.
    """

    largest: float
    coarse: bool = False

    @classmethod
    def of(cls, tensors: Iterable[Tensor], coarse: bool = False) -> ColorScale:
        """Return a scale that covers the finite numbers of the given tensors. Complex tensors are ignored."""
        real = [tensor.detach().double().flatten() for tensor in tensors if not tensor.is_complex()]
        finite = (float(x.abs().nan_to_num(0, 0, 0).max()) for x in real if x.numel())
        return cls(max(finite, default=0.0), coarse)

    def color(self, value: float | complex) -> str | None:
        """Return the background color of a number as ``#rrggbb``.

        Returns:
            The color; None for complex numbers and numbers near zero, which keep the terminal's background.
        """
        if cmath.isnan(value):
            return NAN
        if cmath.isinf(value):
            return INFINITY
        if isinstance(value, complex) or abs(value) <= _UNCOLORED * self.largest:
            return None
        fraction = abs(value) / self.largest if abs(value) < self.largest else 1.0
        if self.coarse:
            steps = _NEGATIVE_STEPS if value < 0 else _POSITIVE_STEPS
            return steps[math.ceil(fraction * len(steps)) - 1]
        pale, full = (_PALE_NEGATIVE, NEGATIVE) if value < 0 else (_PALE_POSITIVE, POSITIVE)
        channels = (
            round(a + (b - a) * fraction) for a, b in zip(_channels(pale), _channels(full), strict=True)
        )
        return "#" + "".join(f"{channel:02x}" for channel in channels)

    def style(self, value: float | complex) -> Style:
        """Return the style of a number: its background color, with black or white text for contrast."""
        background = self.color(value)
        return Style(color=text_color(background), bgcolor=background) if background else Style()

    def legend(self, fractions: Iterable[float] = (-1, -0.5, 0, 0.5, 1)) -> Text:
        """Return the numbers at the given fractions of the largest magnitude, each on its color."""
        values = [fraction * self.largest for fraction in fractions]
        return Text(" ").join(Text(format_number(value), self.style(value)) for value in values)


def _channels(color: str) -> tuple[int, ...]:
    """Parse ``#rrggbb`` into its three channels, 0 to 255."""
    return tuple(bytes.fromhex(color[1:]))


def text_color(background: str) -> str:
    """Return black or white, whichever has the higher contrast by WCAG 2: at least 4.5."""
    srgb = [channel / 255 for channel in _channels(background)]
    red, green, blue = (s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in srgb)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#000000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"
