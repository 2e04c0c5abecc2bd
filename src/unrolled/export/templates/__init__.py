"""The fixed text of exported files."""

from __future__ import annotations

import re
from importlib import resources


def template(name: str) -> str:
    """Return the content of a file of this package."""
    return (resources.files(__package__) / name).read_text(encoding="ascii")


def fill(text: str, **values: object) -> str:
    """Replace each ``@name@`` in a text; names without a value stay, for CMake."""
    return re.sub(r"@(\w+)@", lambda match: str(values.get(match[1], match[0])), text)
