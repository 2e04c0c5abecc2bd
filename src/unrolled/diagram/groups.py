"""Groups of nodes that fold into one."""

from __future__ import annotations

from unrolled.diagram.model import Diagram, Group


def find_groups(diagram: Diagram) -> tuple[Group, ...]:
    return ()
