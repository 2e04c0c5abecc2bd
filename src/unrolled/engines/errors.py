"""Errors that more than one part of the engines raises."""


class UnavailableError(Exception):
    """Compiled loops can't run on this machine, such as for lack of a compiler; the message says why."""
