"""Export trained modules to other languages: C."""

from unrolled.export.library import CLibrary, c

__all__ = ["CLibrary", "c"]
