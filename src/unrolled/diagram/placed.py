"""A diagram with positions in pixels: everything that a painter needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

XY = tuple[float, float]


@dataclass(frozen=True)
class Label:
    """The box for the name and the digits of a node that has no room for them inside.

    Attributes:
        x, y: Its top left corner.
        width, height: Its size.
        anchor: Where texts are aligned: ``"start"``, ``"middle"`` or ``"end"``.
        text_x: The x that they are aligned to.
        name_y: Baseline of the name; None without a name.
        value_y: Baseline of the digits.
    """

    x: float
    y: float
    width: float
    height: float
    anchor: str
    text_x: float
    name_y: float | None
    value_y: float


@dataclass(frozen=True)
class PlacedNode:
    """A node: its center, size and corner radius, the state whose lane it is on, and its label."""

    id: str
    x: float
    y: float
    width: float
    height: float
    radius: float
    lane: str | None = None
    label: Label | None = None


@dataclass(frozen=True)
class Arrow:
    """An arrow head: its tip, and the direction it points to (one of -1, 0, 1 for x and y)."""

    x: float
    y: float
    dx: int
    dy: int


@dataclass(frozen=True)
class Route:
    """A line.

    Attributes:
        kind: ``"lane"``, ``"rail"``, ``"tap"`` (from a rail to a node) or ``"edge"``.
        net: What it carries: the id of a source, or ``"rail ..."`` for a line of several sources. A net's
            lines run on one another.
        sources: The sources it carries: ids of nodes, ``"x"``, ``"before:NAME"``.
        target: The node that it ends at; None for a rail, and at the right end.
        state: The state of a lane, or whose new value leaves here.
        points: Its corners, from the border of its source to the tip of its arrow.
        path: The same as SVG path data, with round corners, as far as the arrow head.
        weighted: Whether it carries a whole vector, which is read through weights.
        sign: -1 if what it carries is subtracted.
        arrow: Its arrow head.
        minus: Center of the minus sign of a difference.
    """

    kind: str
    net: str
    sources: tuple[str, ...]
    target: str | None
    state: str | None
    points: tuple[XY, ...]
    path: str
    weighted: bool = False
    sign: int = 1
    arrow: Arrow | None = None
    minus: XY | None = None

    @property
    def is_vector(self) -> bool:
        """Whether it carries a whole vector instead of the number of one unit."""
        return self.weighted or self.kind in ("rail", "tap")


@dataclass(frozen=True)
class Port:
    """Where a state enters (``"in"``) or leaves (``"out"``), with the boxes of its texts.

    Attributes:
        side: ``"in"``, ``"out"``, or ``"below"`` for the input.
        name: The state, or ``"x"``.
        x, y: The end of its line.
        anchor: Alignment of its texts.
        text_x: The x that they are aligned to.
        name_y, value_y: Baselines of its name and its digits; the input has no digits.
    """

    side: str
    name: str
    x: float
    y: float
    anchor: str
    text_x: float
    name_y: float
    value_y: float | None


@dataclass(frozen=True)
class Dot:
    """Where a line divides. It is weighted if only lines to weights meet there."""

    x: float
    y: float
    net: str
    weighted: bool


@dataclass(frozen=True)
class Layout:
    """The positions of all parts of a diagram.

    Attributes:
        width, height: Size of the picture.
        nodes: In the order of the diagram.
        routes: All lines, in the order they are drawn.
        ports: Where states and the input enter and leave.
        dots: Where lines divide.
        belts: For each lane, its state and its y (its x if time runs down).
        output: The foot of the arrow of the output. It points up, or to the right if time runs down.
        crossings: Number of points where lines of different nets cross.
        bends: Number of turns of edges.
        orientation: ``"horizontal"`` if time runs to the right, ``"vertical"`` if it runs down.
    """

    width: float
    height: float
    nodes: tuple[PlacedNode, ...]
    routes: tuple[Route, ...]
    ports: tuple[Port, ...]
    dots: tuple[Dot, ...]
    belts: tuple[tuple[str, float], ...]
    output: XY
    crossings: int = 0
    bends: int = 0
    orientation: str = "horizontal"

    def to_json(self) -> dict[str, Any]:
        """Return the layout as plain data: dicts, lists, numbers and strings."""
        plain = _rounded(asdict(self))
        assert isinstance(plain, dict)
        return plain


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(part) for part in value]
    return round(value, 2) if isinstance(value, float) else value
