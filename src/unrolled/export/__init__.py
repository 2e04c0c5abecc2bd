"""Export of trained modules to other languages: C."""

from unrolled.export.library import c

__all__ = ["c"]
