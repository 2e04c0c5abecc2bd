"""The constants that affect speed. They are defined in ``include/tuning.h``."""

from __future__ import annotations

import functools
import re

from unrolled.engines.native.toolchain import cpp_files


@functools.cache
def constants() -> dict[str, int]:
    """Return the constants by name.

    Raises:
        RuntimeError: If an application was packaged without the C++ files.
    """
    text = cpp_files.read("tuning.h")
    return {
        name: int(value) for name, value in re.findall(r"^constexpr \w+ (\w+) = (\d+);", text, re.MULTILINE)
    }
