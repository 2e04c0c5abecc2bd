"""The arguments of a kernel, except for its pointers, as a C struct."""

from __future__ import annotations

import ctypes
from enum import IntEnum


class Strategy(IntEnum):
    """The enumeration ``Strategy`` of ``include/call.h``: how threads share the work of a call."""

    SHARE_COLUMNS = 0
    SHARE_ROWS = 1
    TAKE_TURNS = 2


class CallArguments(ctypes.Structure):
    """The struct ``CallArguments`` of ``include/call.h``, which describes the fields."""

    _fields_ = (
        ("steps", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("reverse", ctypes.c_int64),
        ("shift", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("block_steps", ctypes.c_int64),
        ("pack_per_step", ctypes.c_int64),
        ("packed", ctypes.c_int64),
        ("strategy", ctypes.c_int64),
        ("sizes", ctypes.c_void_p),
        ("products", ctypes.c_void_p),
    )
