"""Recurrent layers for PyTorch that you can look inside."""

from types import ModuleType

from unrolled import _moved_modules, cells, export, io
from unrolled._version import __version__ as __version__
from unrolled.cells.base import Cell, Param
from unrolled.engines.selection import engine
from unrolled.inference.frozen import frozen
from unrolled.inference.stream import Stream
from unrolled.layers.convert import convert, revert
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.torch_layers import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from unrolled.quantization.quantize import quantize
from unrolled.tracing import display
from unrolled.tracing.record import Record, record
from unrolled.tracing.trace import Trace, trace
from unrolled.tracing.watch import Watch, watch

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Cell",
    "GRUCell",
    "LSTMCell",
    "Param",
    "RNNCell",
    "Record",
    "Recurrent",
    "Stream",
    "Trace",
    "Watch",
    "cells",
    "convert",
    "engine",
    "export",
    "frozen",
    "io",
    "quantize",
    "record",
    "revert",
    "trace",
    "watch",
]


def __dir__() -> list[str]:
    return sorted([*__all__, "__doc__", "__file__", "__name__", "__path__", "__version__"])


def _plot() -> ModuleType:
    from unrolled import plot  # imported on first use, because it needs matplotlib

    return plot


def _page() -> ModuleType:
    from unrolled import page

    return page


def _diagram() -> ModuleType:
    from unrolled import diagram

    return diagram


_moved_modules.register()
display.register("diagram", _diagram)
display.register("plot", _plot)
display.register("page", _page)
