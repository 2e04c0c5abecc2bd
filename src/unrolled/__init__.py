"""Recurrent layers you can open: every number visible, any equation, full speed."""

from unrolled import cells, io
from unrolled.cell import Cell, Param
from unrolled.conversion import convert, revert
from unrolled.drop_in import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from unrolled.engines import engine
from unrolled.frozen import frozen
from unrolled.layers import Recurrent
from unrolled.record import Record, record
from unrolled.stream import Stream
from unrolled.trace import Trace, trace
from unrolled.watch import Watch, watch

__version__ = "0.1.0"

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
    "frozen",
    "io",
    "record",
    "revert",
    "trace",
    "watch",
]
