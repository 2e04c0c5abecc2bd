"""The programs of a launch of the stand-in for Triton: one after another, or at the same time."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MAX_WAIT = 60  # seconds without an arrival of another program


@dataclass
class Pointer:
    """The address of elements of a tensor, given by their index."""

    base: Tensor  # flat
    index: Any = 0

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.base, self.index + other)


class Program(threading.local):
    """The program that this thread runs."""

    number: int = 0
    part: int = 0
    runtime: Any = None
    waits: int = 0


program = Program()
arrivals = multiprocessing.Condition()  # programs that share columns wait for each other


def wait_for_change(pointer: Pointer) -> Tensor:
    """Wait a short time until another program has changed an element, and return it.

    Raises:
        AssertionError: If that took too long altogether.
    """
    seen = pointer.base[pointer.index].clone()
    if not arrivals.wait_for(lambda: bool(pointer.base[pointer.index] != seen), 0.01):
        program.waits += 1
        assert program.waits < _MAX_WAIT * 100, "a program waits for another one that doesn't arrive"
    return pointer.base[pointer.index].clone()


def run_in_threads(function: Callable[..., Any], number: int, parts: int, args: Any, constants: Any) -> None:
    """Run the programs of a tile of rows in threads."""
    runtime, errors = program.runtime, list[BaseException]()

    def run(part: int) -> None:
        program.number, program.part, program.runtime = number, part, runtime
        try:
            function(*args, **constants)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(part,)) for part in range(parts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def pointer_to(tensor: Tensor) -> Pointer:
    """Return a pointer to the first element."""
    assert tensor.is_contiguous(), f"a tensor with strides {tensor.stride()}"
    return Pointer(tensor.detach().view(-1))


def run_in_processes(function: Callable[..., Any], grid: tuple[int, ...], args: Any, constants: Any) -> None:
    """Run each program of a grid in a process of its own, all at the same time, on shared memory."""
    shared = [v.detach().clone().share_memory_() if isinstance(v, Tensor) else v for v in args]
    pointers = [pointer_to(value) if isinstance(value, Tensor) else value for value in shared]
    children = []
    for number, part in itertools.product(*map(range, grid)):
        child = os.fork()
        if child == 0:
            signal.alarm(_MAX_WAIT)
            code = 1
            try:
                torch.set_num_threads(1)
                program.number, program.part, program.runtime = number, part, None
                function(*pointers, **constants)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert not any(codes), f"programs ended with the codes {codes}"
    for value, copy in zip(args, shared, strict=True):
        if isinstance(value, Tensor):
            value.copy_(copy)
