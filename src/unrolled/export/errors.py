"""The error of a module that can't become C code."""


class ExportError(ValueError):
    """A module can't be exported; the message names it and gives the reason."""
