"""A diagram as an SVG picture, with the numbers of one unit at one step in it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from torch import Tensor

from unrolled.diagram.lanes import BEFORE, INPUT
from unrolled.diagram.model import Diagram, DiagramNode
from unrolled.diagram.numbers import Numbers, Shown, scales
from unrolled.diagram.placed import Dot, Layout, PlacedNode, Port, Route
from unrolled.diagram.shapes import (
    NORMALIZED,
    is_circle,
    is_fader,
    is_normalized,
    is_softmax,
    name_size,
    weight_index,
)
from unrolled.diagram.style import style_sheet
from unrolled.diagram.text import digits, is_word, shortened, symbol, width

THEMES = ("auto", "light", "dark")
BELT = 26.0
_THIN, _THICK = 1.3, 4.4  # width of a line: at zero, and what it grows by
_FAINT = 0.3  # opacity of the color of a line at zero
_RING_INSET = 2.0
FADER_INSET = 9.0
_DIGITS_SIZE = 12.5


def svg(
    diagram: Diagram,
    layout: Layout,
    values: Sequence[Tensor],
    *,
    unit: int = 0,
    theme: str = "auto",
    meanings: Mapping[str, str] | None = None,
    limits: Mapping[str, float] | None = None,
) -> str:
    """Draw a diagram as a standalone SVG picture.

    The color and width of a line are the number that it carries. A gate is filled as far as it is open. Gray
    lines carry whole vectors. NaN and infinity have a color of their own.

    Args:
        diagram: The diagram.
        layout: Its layout.
        values: The values of one step that the diagram's indices refer to.
        unit: The unit whose numbers are shown.
        theme: ``"light"``, ``"dark"``, or ``"auto"`` to follow the reader's system.
        meanings: A description of quantities, by name, for the titles of nodes.
        limits: The scale of each source, from :func:`unrolled.diagram.numbers.scales` over all steps. By
            default, the scales of this step.

    Returns:
        The SVG document.

    Raises:
        ValueError: If the theme or the unit doesn't exist.
    """
    if theme not in THEMES:
        raise ValueError(f"theme must be one of {', '.join(THEMES)}, but got {theme!r}.")
    units = max([len(values[node.value].flatten()) for node in diagram.nodes], default=1)
    if not 0 <= unit < units:
        raise ValueError(f"unit must be from 0 to {units - 1}, but got {unit}.")
    numbers = Numbers(diagram, values, unit, scales(diagram, [values]) if limits is None else limits)
    return _Painter(diagram, layout, numbers, theme, meanings or {}).document(unit)


class _Painter:
    def __init__(
        self, diagram: Diagram, layout: Layout, numbers: Numbers, theme: str, meanings: Mapping[str, str]
    ) -> None:
        self.diagram = diagram
        self.layout = layout
        self.numbers = numbers
        self.theme = theme
        self.meanings = meanings
        self.nodes = {node.id: node for node in diagram.nodes}
        key = hashlib.sha256(repr((diagram, theme)).encode()).hexdigest()[:8]
        self.id = f"cell-{key}"  # pictures in one page may differ in theme

    def document(self, unit: int) -> str:
        w, h = _number(self.layout.width), _number(self.layout.height)
        title = f"One step of {self.diagram.cell}, unit {unit}"
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="{self.id}" viewBox="0 0 {w} {h}" width="{w}" '
            f'height="{h}" role="img" aria-label="{_attribute(title)}">',
            f"<title>{escape(title)}</title>",
            f"<style>{style_sheet('.' + self.id, self.theme)}</style>",
            f'<rect class="ground" width="{w}" height="{h}"/>',
            *[self._belt(place) for _, place in self.layout.belts],
            *self._routes(),
            *[self._dot(dot) for dot in self.layout.dots],
            *[self._port(port) for port in self.layout.ports],
            self._output(),
            *[
                self._node(node, placed)
                for node, placed in zip(self.diagram.nodes, self.layout.nodes, strict=True)
            ],
            "</svg>",
        ]
        return "\n".join(part for part in parts if part) + "\n"

    # Lines

    def _routes(self) -> list[str]:
        """Draw the lines net by net: a line has a gap where another crosses over it, but not at a branch."""
        lanes = {route.net for route in self.layout.routes if route.kind == "lane"}
        nets = dict.fromkeys(route.net for route in self.layout.routes)
        found = []
        for net in sorted(nets, key=lambda net: net in lanes):
            routes = [route for route in self.layout.routes if route.net == net]
            for vector in (True, False):
                same = [route for route in routes if route.is_vector == vector]
                if same:
                    halos = "".join(f'<path class="halo" d="{route.path}"/>' for route in same)
                    found.append(f'<g class="{"vector" if vector else "number"}">{halos}</g>')
            found += [self._route(route) for route in routes]
        return found

    def _route(self, route: Route) -> str:
        shown = None if route.is_vector else self.numbers.of(route.sources[0])
        minus = ""
        if route.minus:
            x, y = route.minus
            minus = f'<text class="minus" x="{_number(x)}" y="{_number(y + 4)}">−</text>'
        if shown is None:
            line = f'<path class="line" d="{route.path}"/>{self._arrow(route, 0.0)}'
            return f'<g class="wire vector">{line}{minus}</g>'
        size = abs(shown.share) if shown.tone != "alarm" else 1.0
        stroke = f'd="{route.path}" style="stroke-width:{_number(_THIN + _THICK * size)}"'
        arrow = self._arrow(route, size)
        line = f'<path class="line under" {stroke}/>{arrow.replace("arrow", "arrow under", 1)}'
        line += (
            f'<g opacity="{_number(_FAINT + (1 - _FAINT) * size)}"><path class="line" {stroke}/>{arrow}</g>'
        )
        return f'<g class="wire scalar {shown.tone}">{line}{minus}</g>'

    def _arrow(self, route: Route, size: float) -> str:
        head = route.arrow
        if head is None:
            return ""
        angle = (0 if head.dx > 0 else 180) if head.dx else (90 if head.dy > 0 else -90)
        place = f"translate({_number(head.x)} {_number(head.y)}) rotate({angle})"
        place += f" scale({_number(1 + 0.12 * size)} {_number(1 + 0.75 * size)})"
        return f'<path class="arrow" transform="{place}" d="M0 0L-8.5 -4.3L-8.5 4.3Z"/>'

    def _dot(self, dot: Dot) -> str:
        shown = None if dot.weighted else self.numbers.of(dot.net)
        place = f'cx="{_number(dot.x)}" cy="{_number(dot.y)}"'
        if shown is None:
            return f'<circle class="dot" {place} r="3"/>'
        size = abs(shown.share) if shown.tone != "alarm" else 1.0
        radius = _number(2.6 + 2 * size)
        color = f'opacity="{_number(_FAINT + (1 - _FAINT) * size)}"'
        under = f'<circle class="dot under" {place} r="{radius}"/>'
        return f'{under}<circle class="dot scalar {shown.tone}" {place} r="{radius}" {color}/>'

    # Ports

    def _port(self, port: Port) -> str:
        time = "t−1" if port.side == "in" else "t"
        name = _name(port.name, 15.0, port.text_x, port.name_y, port.anchor, time)
        if port.value_y is None:
            return f"<g>{name}</g>"
        state = next(state for state in self.diagram.states if state.name == port.name)
        shown = self.numbers.of(BEFORE + state.name if port.side == "in" else state.end)
        if shown is None:
            return f"<g>{name}</g>"
        return f"<g>{name}{_digits(shown, port.text_x, port.value_y, port.anchor)}</g>"

    def _belt(self, place: float) -> str:
        start, across = _number(place - BELT / 2), _number(BELT)
        if self.layout.orientation == "vertical":
            return f'<rect class="belt" x="{start}" width="{across}" height="{_number(self.layout.height)}"/>'
        return f'<rect class="belt" y="{start}" width="{_number(self.layout.width)}" height="{across}"/>'

    def _output(self) -> str:
        x, y = self.layout.output
        upright = self.layout.orientation == "vertical"
        turn = " rotate(90)" if upright else ""
        text_x, text_y, anchor = (3, 15, "start") if upright else (0, -37, "middle")
        return (
            f'<g transform="translate({_number(x)} {_number(y)})"><g transform="scale(1){turn}">'
            '<path class="output" d="M0 0v-26"/><path class="output-head" d="M0 -33l-4.6 8h9.2z"/></g>'
            f'<text class="small {anchor}" x="{text_x}" y="{text_y}">output</text></g>'
        )

    # Nodes

    def _node(self, node: DiagramNode, placed: PlacedNode) -> str:
        shown = self.numbers.of(node.id)
        title = node.name or node.glyph
        if self.meanings.get(node.name):
            title += f", {self.meanings[node.name]}"
        if shown:
            title += f": {_exact(shown.value)}"
        tone = shown.tone if shown else ""
        inner = self._circle(node, placed) if is_circle(node) else self._box(node, placed, shown)
        return (
            f'<g class="node {node.kind} {tone}" data-node="{_attribute(node.id)}" '
            f'transform="translate({_number(placed.x)} {_number(placed.y)})"><title>{escape(title)}</title>'
            f"{inner}{self._label(node, placed, shown)}</g>"
        )

    def _circle(self, node: DiagramNode, placed: PlacedNode) -> str:
        radius = placed.width / 2
        found = f'<circle class="body" r="{_number(radius)}"/>'
        gate = self._gate(node)
        opening = self.numbers.of(gate) if gate else None
        if opening is not None and opening.tone == "gate":
            inner = radius - _RING_INSET
            share = max(0.0, min(1.0, opening.value)) * 100
            found += f'<circle class="track" r="{_number(inner)}"/>'
            found += (
                f'<circle class="ring" r="{_number(inner)}" pathLength="100" transform="rotate(-90)" '
                f'style="stroke-dasharray:{_number(share)} 100"/>'
            )
        short = len(node.glyph) == 1
        y, size = (6, 19) if short else (4.5, 13)
        return found + f'<text class="middle" y="{y}" font-size="{size}">{escape(node.glyph)}</text>'

    def _gate(self, node: DiagramNode) -> str | None:
        """Return the gate that a product opens or shuts."""
        if node.glyph != "×":
            return None
        sources = [self.nodes[t.source] for t in node.terms if t.source in self.nodes]
        gates = [source for source in sources if source.range == "gate"]
        direct = [source for source in gates if source.glyph != "1−"]
        return next((source.id for source in direct or gates), None)

    def _box(self, node: DiagramNode, placed: PlacedNode, shown: Shown | None) -> str:
        w, h, radius = placed.width, placed.height, placed.radius
        rect = f'x="{_number(-w / 2)}" y="{_number(-h / 2)}" width="{_number(w)}" height="{_number(h)}"'
        corners = f'rx="{_number(radius)}"'
        found = f'<rect class="body" {rect} {corners}/>'
        if shown is not None and shown.tone != "alarm":
            clip = f"{self.id}-{node.id}"
            found += f'<clipPath id="{clip}"><rect {rect} {corners}/></clipPath>'
            fill = self._shares if is_softmax(node) else self._fill
            found += fill(node, placed, shown, clip)
        if node.kind == "layer" and node.range != "gate":
            found += f'<path class="zero" d="M{_number(-w / 2)} 0h{_number(w)}"/>'
        found += f'<rect class="rim" {rect} {corners}/>'
        if node.kind != "layer":
            text = escape(shortened(node.glyph))
            y = "4.5"
            if is_fader(node):
                found, y = found + self._fader(node, w), "0"
            return found + f'<text class="middle" y="{y}" font-size="13.5">{text}</text>'
        glyph = '<tspan class="symbol">W</tspan>' if node.glyph == "W" else escape(shortened(node.glyph))
        if node.name:
            found += (
                f'<text class="small" x="{_number(-w / 2 + 5)}" y="{_number(-h / 2 + 12)}">{glyph}</text>'
            )
            if is_normalized(node):
                place = f'x="{_number(w / 2 - 4)}" y="{_number(-h / 2 + 11)}"'
                found += f'<text class="small end" {place}>{NORMALIZED}</text>'
            found += _name(node.name, name_size(node.name), 0.0, 5.0, "middle")
        elif index := weight_index(node):
            found += _name(f"W_{index}", 18.0, 0.0, 3.0, "middle")
        else:
            size = 18 if node.glyph == "W" else 15
            found += f'<text class="middle" y="3" font-size="{size}">{glyph}</text>'
        return found + (_digits(shown, 0.0, h / 2 - 5, "middle") if shown else "")

    def _fill(self, node: DiagramNode, placed: PlacedNode, shown: Shown, clip: str) -> str:
        w, h = placed.width, placed.height
        if node.kind != "layer":  # a pill is tinted as a whole
            y, tall, opacity = -h / 2, h, f' style="fill-opacity:{_number(0.04 + 0.4 * abs(shown.share))}"'
        elif shown.tone == "gate":
            tall, opacity = max(0.0, shown.share) * h, ""
            y = h / 2 - tall
        else:
            tall, opacity = abs(shown.share) * h / 2, ""
            y = -tall if shown.share > 0 else 0.0
        return (
            f'<rect class="fill" clip-path="url(#{clip})" x="{_number(-w / 2)}" y="{_number(y)}" '
            f'width="{_number(w)}" height="{_number(tall)}"{opacity}/>'
        )

    def _shares(self, node: DiagramNode, placed: PlacedNode, _shown: Shown, clip: str) -> str:
        """Fill a softmax with the shares of all units."""
        found, left = "", -placed.width / 2
        place = f'y="{_number(-placed.height / 2)}" height="{_number(placed.height)}"'
        for element, share in enumerate(self.numbers.shares(node)):
            mine = " mine" if self.numbers.is_chosen(node, element) else ""
            wide = share * placed.width
            found += f'<rect class="share{mine}" x="{_number(left)}" width="{_number(wide)}" {place}/>'
            left += wide
        return f'<g clip-path="url(#{clip})">{found}</g>'

    def _fader(self, node: DiagramNode, width: float) -> str:
        """Draw the weight of a lerp: at the left end it is 0, at the right end 1."""
        half = width / 2 - FADER_INSET
        weight = self.numbers.operand(node.terms[-1])
        found = f'<path class="fader" d="M{_number(-half)} 8h{_number(2 * half)}"/>'
        if weight is None or weight != weight:
            return found
        x = half * (2 * max(0.0, min(1.0, weight)) - 1)
        return found + f'<circle class="knob" cx="{_number(x)}" cy="8" r="3.2"/>'

    def _label(self, node: DiagramNode, placed: PlacedNode, shown: Shown | None) -> str:
        label = placed.label
        if label is None:
            return ""
        x = label.text_x - placed.x
        found = ""
        if label.name_y is not None:
            found = _name(node.name, 14.0, x, label.name_y - placed.y, label.anchor)
        return found + (_digits(shown, x, label.value_y - placed.y, label.anchor) if shown else "")


def _name(name: str, size: float, x: float, y: float, anchor: str, time: str = "") -> str:
    """Return a name as a symbol with its index."""
    base, index = ("x", "") if name == INPUT else symbol(name)
    word = is_word(base)
    sub = ",".join(part for part in (index, time) if part)
    text = (
        f'<tspan class="{"word" if word else "symbol"}" '
        f'font-size="{_number(size * 0.82 if word else size)}">{escape(base)}</tspan>'
    )
    if sub:
        text += f'<tspan font-size="{_number(size * 0.66)}" dy="{_number(size * 0.24)}">{escape(sub)}</tspan>'
    return f'<text class="{anchor}" x="{_number(x)}" y="{_number(y)}">{text}</text>'


def _digits(shown: Shown, x: float, y: float, anchor: str) -> str:
    text = digits(shown.value)
    room = 36.0  # a longer number is set narrower
    fit = (
        f' textLength="{_number(room)}" lengthAdjust="spacingAndGlyphs"'
        if width(text, _DIGITS_SIZE) > room
        else ""
    )
    alarm = " alarm" if shown.tone == "alarm" else ""
    return f'<text class="digits {anchor}{alarm}" x="{_number(x)}" y="{_number(y)}"{fit}>{text}</text>'


def _exact(value: float) -> str:
    return (
        digits(value)
        if value != value or value in (float("inf"), float("-inf"))
        else f"{value:.4g}".replace("-", "−")
    )


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".").replace("-0", "-0") if value else "0"


def _attribute(text: str) -> str:
    return escape(text, {'"': "&quot;"})
