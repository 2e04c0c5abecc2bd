"""Run call plans with compiled code, which reads and creates tensors without Python; see ``call_plan.cpp``.

The code is compiled in the background when the first plan is made. It needs functions that torch exports but
doesn't promise. Where one is missing, plans run in Python.
"""

from __future__ import annotations

import array
import ctypes
import functools
import sys
import sysconfig
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from unrolled.engines import log
from unrolled.engines._torch_private import TENSOR_FUNCTIONS, exported_function, tensor_layout
from unrolled.engines.call_plans.launches import BulkLaunch, KernelLaunch, Place, RecordedFunction
from unrolled.engines.errors import UnavailableError
from unrolled.engines.memory import LOW_ADDRESS
from unrolled.engines.native.toolchain import build, cpp_files
from unrolled.engines.threads import thread_count

PYTHON_FUNCTIONS = (
    "PyObject_CallNoArgs", "PyDict_GetItemWithError", "PyTuple_GetItem", "PyTuple_Size", "PyTuple_New",
    "PyTuple_SetItem", "Py_IncRef", "Py_DecRef", "PyErr_NoMemory", "PyErr_Clear", "PyEval_SaveThread",
    "PyEval_RestoreThread", "PyLong_AsVoidPtr",
)  # fmt: skip
_DTYPES = {torch.float32: "aoti_torch_dtype_float32", torch.float64: "aoti_torch_dtype_float64"}
_KERNEL, _BULK, _COPY, _ZEROS = range(4)
_METH_FASTCALL = 0x80
_failures: list[str] = []  # why the code couldn't be compiled
_MAX_SLOTS, _MAX_NUMBERS = 120, 1000  # somewhat below the limits of call_plan.cpp


Condition = tuple[Any, Any]  # a function, and the object that it must return
Item = tuple[dict[Any, Any] | None, Any, Any]  # a dictionary, a key, and the object that it must contain
MODULE: None = None  # in an Item: the dictionary of the module's attributes
MISSING = object()  # in an Item: the key must be missing


class _MethodDef(ctypes.Structure):
    """A PyMethodDef."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("text", ctypes.c_char_p),
    )


class _Library:
    """The compiled code.

    Attributes:
        dtypes: Torch's number of each dtype.
    """

    def __init__(self, library: ctypes.CDLL, interface: list[int]) -> None:
        self._library, self._interface = library, (ctypes.c_int64 * len(interface))(*interface)
        library.set_interface(ctypes.byref(self._interface))
        self.dtypes = {dtype: _number_of(dtype) for dtype in _DTYPES}
        self._methods = {
            name: _MethodDef(name.encode(), _address(library[name]), _METH_FASTCALL, None)
            for name in ("infer", "replay")
        }

    def function(self, name: str, numbers: array.array[int]) -> Callable[..., Any]:
        """Return a function of the compiled code as a function of Python.

        Args:
            name: ``"infer"`` or ``"replay"``.
            numbers: The plan. The caller must keep it alive.
        """
        new = ctypes.pythonapi["PyCFunction_NewEx"]
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p]
        address = numbers.buffer_info()[0]
        function: Callable[..., Any] = new(ctypes.addressof(self._methods[name]), address, None)
        return function


def new_replay(function: RecordedFunction) -> NativeReplay | None:
    """Return a recorded function in compiled code, or None if :func:`library` is None or it is too large."""
    code = library()
    return None if code is None or not fits(function) else NativeReplay(code, function)


def library() -> _Library | None:
    """Return the compiled code, or None if it isn't compiled yet, or can't be used here."""
    if interface() is None or _failures:
        return None
    try:
        code = build.load_if_ready(cpp_files.read("call_plan.cpp"))
    except UnavailableError as error:
        _failures.append(str(error))
        log.build.info("call plans run in Python: %s", error)
        return None
    return None if code is None else _with_interface(code)


@functools.cache
def _with_interface(code: ctypes.CDLL) -> _Library:
    numbers = interface()
    assert numbers is not None
    return _Library(code, numbers)


@functools.cache
def interface() -> list[int] | None:
    """Return the numbers of the struct ``Interface`` in ``call_plan.cpp``, or None if one is missing."""
    reason = ""
    if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        reason = "this interpreter has another object model"  # borrowed references need the GIL
    elif sys.maxsize < 2**63 - 1 or sys.byteorder != "little":
        reason = "this isn't a 64-bit system"
    elif torch.zeros(1, device="cpu").data_ptr() < LOW_ADDRESS:
        reason = "memory has unusually low addresses"
    layout = None if reason else tensor_layout()
    functions = [exported_function(name) for name in (*TENSOR_FUNCTIONS, *_DTYPES.values())]
    if not reason and (layout is None or None in functions):
        reason = "this version of torch doesn't export what they need"
    if reason or layout is None:
        log.build.info("call plans run in Python: %s", reason)
        return None
    return [
        *(_address(ctypes.pythonapi[name]) for name in PYTHON_FUNCTIONS),
        *(address or 0 for address in functions[: len(TENSOR_FUNCTIONS)]),
        *map(id, (None, tuple, Tensor, Parameter)),
        *layout[:2],
        *(_signed(keys) for keys in layout[2:]),
        LOW_ADDRESS,
    ]


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _number_of(dtype: torch.dtype) -> int:
    return int(ctypes.CFUNCTYPE(ctypes.c_int32)(exported_function(_DTYPES[dtype]) or 0)())


class NativeReplay:
    """A recorded function.

    Args:
        code: The compiled code.
        function: The function.

    Attributes:
        run: It takes all inputs and returns a tuple of results, or None if an input has another shape or
            dtype, isn't contiguous, or has no memory.
    """

    def __init__(self, code: _Library, function: RecordedFunction) -> None:
        self._function = function
        numbers = [len(function.inputs), code.dtypes[function.dtype]]
        for shape in function.inputs:
            numbers += _list(shape)
        self._numbers = array.array("q", [*numbers, *_results_and_launches(function)])
        self.run = code.function("replay", self._numbers)


class NativeInference:
    """A recorded function as a call of a module.

    Args:
        code: The compiled code.
        function: The function. Its inputs are the input, the initial states and the parameters.
        names: The names of the parameters.
        states: Number of states, which are its last results.
        stateful: Whether initial states are given.
        conditions: Functions and dictionaries that must return or contain certain objects.

    Attributes:
        run: It takes the attributes of the module, the input and the state. It returns what the module
            returns, or None if the call is another one.
    """

    def __init__(
        self,
        code: _Library,
        function: RecordedFunction,
        names: Sequence[str],
        states: int,
        stateful: bool,
        conditions: tuple[Sequence[Condition], Sequence[Item]],
    ) -> None:
        functions, items = conditions
        names, parameters = [sys.intern(name) for name in names], sys.intern("_parameters")
        self._alive = [function, conditions, names, parameters]
        numbers = [len(functions)]
        for condition, expected in functions:
            numbers += id(condition), id(expected)
        numbers.append(len(items))
        for dictionary, key, expected in items:
            numbers += 0 if dictionary is MODULE else id(dictionary), id(key)
            numbers.append(0 if expected is MISSING else id(expected))
        x, *shapes = function.inputs
        given = states if stateful else 0
        numbers += id(parameters), code.dtypes[function.dtype], *_list(x), given, states
        for shape in shapes[:given]:
            numbers += _list(shape)
        numbers += _list([id(name) for name in names])
        for shape in shapes[given:]:
            numbers += _list(shape)
        self._numbers = array.array("q", [*numbers, *_results_and_launches(function)])
        self.run = code.function("infer", self._numbers)


def fits(function: RecordedFunction) -> bool:
    """Return whether a function is within the limits of the compiled code."""
    numbers = max((len(_numbers(launch)[0]) for launch in function.launches.launches), default=0)
    return len(function.inputs) + len(function.results) <= _MAX_SLOTS and numbers <= _MAX_NUMBERS


def _list(numbers: Sequence[int]) -> list[int]:
    return [len(numbers), *numbers]


def _results_and_launches(function: RecordedFunction) -> list[int]:
    """Return the results and the launches of a function as ``run`` in ``call_plan.cpp`` reads them."""
    launches = function.launches
    flat = [len(function.results), *(number for shape in function.results for number in _list(shape))]
    flat += [launches.scratch, len(launches.launches)]
    for launch in launches.launches:
        if isinstance(launch, KernelLaunch):
            head = [_KERNEL, launch.run, ctypes.addressof(launch.arguments), 0]
        elif isinstance(launch, BulkLaunch):
            head = [_BULK, launch.run, len(launch.numbers) // 11, thread_count()]
        else:
            head = [_ZEROS if launch.source is None else _COPY, 0, launch.size, 0]
        numbers, places = _numbers(launch)
        flat += [*head, *_list(numbers)]
        flat += _list([n for place in places for n in (place.index, place.slot, place.offset)])
    return flat


def _numbers(launch: Any) -> tuple[Sequence[int], Sequence[Place]]:
    """Return the numbers of a launch, and those of them that are addresses."""
    if isinstance(launch, KernelLaunch):
        return [0] * len(launch.places), launch.places
    if isinstance(launch, BulkLaunch):
        return launch.numbers, launch.places
    places = [launch.target] if launch.source is None else [launch.target, launch.source]
    indexed = [Place(index, place.slot, place.offset) for index, place in enumerate(places)]
    return [0] * len(places), indexed
