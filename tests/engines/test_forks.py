"""Children that fork while another thread of their parent compiles, records or imports."""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import threading
from pathlib import Path
from typing import Any

import pytest

import unrolled as ur
from helpers.forks import exit_code_of_child
from helpers.layer_pairs import NEEDS_SYSTEM_COMPILER
from helpers.toolchain import counting_compiler, run_python
from unrolled.engines import fork_safety

pytestmark = [
    pytest.mark.usefixtures("cache_folder"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]

# Starts work() in a thread, forks once the compiler has started COUNT times, and prints the exit code of a
# child that calls check(). SIGALRM ends a child that waits for a thread that it doesn't have.
PROGRAM = """
import os, signal, threading, time
from pathlib import Path
import torch
import unrolled as ur

torch.set_num_threads(1)
calls = Path({calls!r})


def check_forward(layer, x):
    with torch.no_grad():
        with ur.engine("native"):
            output = layer(x)[0]
        with ur.engine("reference"):
            assert torch.allclose(output, layer(x)[0], atol=1e-5)


def check_gradients(layer, x):
    gradients = []
    for engine in ("native", "reference"):
        with ur.engine(engine):
            loss = layer(x)[0].square().sum()
        gradients.append(torch.autograd.grad(loss, list(layer.parameters())))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*gradients))


def exit_code_of_child(function):
    child = os.fork()
    if child == 0:
        signal.alarm(90)
        function()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


{setup}

thread = threading.Thread(target=work)
thread.start()
while len(calls.read_text().splitlines() if calls.exists() else ()) < {count}:
    assert thread.is_alive()
    time.sleep(0.01)
print(exit_code_of_child(check))
thread.join()
check()
"""

LAYER = "layer, x = ur.GRU(5, 7, num_layers=2), torch.randn(6, 3, 5)\n"
SITUATIONS = {
    "the first forward pass": (3, "def work(): check_forward(layer, x)\ncheck = work"),
    "the first training step": (4, "def work(): check_gradients(layer, x)\ncheck = work"),
    "the first call of a stream": (
        3,
        """
def work(): ur.Stream(layer)(x)
def check():
    output = ur.Stream(layer)(x)
    assert torch.allclose(output, layer(x)[0], atol=1e-5)
    check_forward(layer, x)
""",
    ),
    "a bidirectional layer with packed input": (
        4,
        """
layer = ur.LSTM(5, 7, bidirectional=True)
def work():
    output = layer(x, lengths=[6, 2, 4])[0]
    output.sum().backward()
    assert not output[4:, 2].any()
check = work
""",
    ),
    "a layer inside torch.compile": (
        4,
        """
compiled = torch.compile(layer, backend="eager", fullgraph=True)
def work(): compiled(x)[0].sum().backward()
def check():
    check_gradients(layer, x)
    check_gradients(compiled, x)
""",
    ),
    "a layer inside record": (
        3,
        """
model = torch.nn.Sequential(layer)
def work():
    with ur.record(model) as rec:
        model(x)
    assert list(rec) == ["0"]
def check():
    assert not layer._forward_hooks or threading.current_thread() is not threading.main_thread()
    work()
    assert not layer._forward_hooks
    check_forward(layer, x)
""",
    ),
    "a child's child": (
        3,
        """
def work(): check_forward(layer, x)
def check():
    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.5)
    assert exit_code_of_child(work) == 0
    thread.join()
    work()
""",
    ),
    "the workers of a data loader": (
        3,
        """
class Features(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, k):
        check_forward(layer, x)
        return k
def work(): check_forward(layer, x)
def check():
    options = {"num_workers": 2, "multiprocessing_context": "fork", "timeout": 60}
    loader = torch.utils.data.DataLoader(Features(), **options)
    assert sum(int(batch) for batch in loader) == 6
""",
    ),
}


@pytest.mark.slow
@NEEDS_SYSTEM_COMPILER
@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_child_forks_while_a_thread_compiles(situation: str, tmp_path: Path) -> None:
    count, setup = SITUATIONS[situation]
    cxx, _ = counting_compiler(tmp_path, before="sleep 2")
    code = PROGRAM.format(calls=str(tmp_path / "calls"), setup=LAYER + setup, count=count)
    done = run_python(code, CXX=cxx, PYTHONWARNINGS="ignore", timeout=300)
    assert done.stdout == "0\n", done.stdout + done.stderr


# Starts work() in a thread, forks when the event is set, and prints the exit code of a child.
EVENT_PROGRAM = """
import os, signal, sys, threading, time
import torch
import unrolled as ur
from unrolled.engines import fork_safety

torch.set_num_threads(1)
parent, reached = os.getpid(), threading.Event()
x = torch.randn(6, 3, 5)

def work():
    with torch.no_grad(), ur.engine("native"):
        layer(x)

{setup}

thread = threading.Thread(target=work)
thread.start()
reached.wait()
child = os.fork()
if child == 0:
    signal.alarm(90)
    check()
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
end()
thread.join()
"""


def run_event_program(setup: str, *prefix: str) -> None:
    code = EVENT_PROGRAM.format(setup=setup)
    done = run_python(code, prefix=prefix, PYTHONWARNINGS="ignore", UNROLLED_CACHE=None, timeout=300)
    assert done.stdout == "0\n", done.stdout + done.stderr


@pytest.mark.slow
@NEEDS_SYSTEM_COMPILER
@pytest.mark.parametrize("package", ["sympy", "torch._dynamo", "filelock", "platformdirs"])
def test_a_fork_waits_for_an_import(package: str) -> None:
    """The first forward pass imports these packages. A new process, because others have them already."""
    setup = f"""
class SlowFinder:
    def find_spec(self, name, *_):
        if name == {package!r} and os.getpid() == parent:
            reached.set()
            time.sleep(1)

sys.meta_path.insert(0, SlowFinder())
layer, check, end = ur.GRU(5, 7), work, int
"""
    run_event_program(setup, "env")


CELL_THAT_STOPS = """
class Stopping(ur.Cell):
    state = ("h",)
    weight = ur.Param("hidden", "input + hidden")

    def step(self, x, h):
        if os.getpid() == parent and {condition}:
            reached.set()
            {stop}
        return torch.tanh(torch.nn.functional.linear(torch.cat((x, h), -1), self.weight))

layer = ur.Recurrent(Stopping, 5, 7)
compiled = torch.compile(layer, backend="eager", fullgraph=True)
"""


@pytest.mark.slow
@NEEDS_SYSTEM_COMPILER
def test_a_fork_waits_for_the_capture_of_a_step() -> None:
    """While torch traces, it patches its own modules and sets flags. A child must not inherit them."""
    condition = "torch.fx._symbolic_trace._is_fx_tracing_flag"
    setup = CELL_THAT_STOPS.format(condition=condition, stop="time.sleep(1)")
    run_event_program(f"""{setup}
def check():
    with torch.no_grad():
        assert torch.allclose(compiled(x)[0], layer(x)[0], atol=1e-5)
end = int
""")


@pytest.mark.slow
@NEEDS_SYSTEM_COMPILER
def test_a_fork_does_not_wait_forever_for_a_step() -> None:
    """A step may itself wait for the thread that forks."""
    setup = CELL_THAT_STOPS.format(condition="not forked.is_set()", stop="forked.wait()")
    run_event_program(f"""
forked = threading.Event()
fork_safety._LONGEST_DELAY = 0.5
{setup}
check, end = work, forked.set
""")


MODULES = [
    importlib.import_module(module.name)
    for module in pkgutil.walk_packages(ur.__path__, "unrolled.")
    if not module.name.startswith(("unrolled.cli", "unrolled.__main__", "unrolled.page.widget"))
]
LOCK_TYPES = (type(threading.Lock()), type(threading.RLock()))


def module_locks() -> dict[str, Any]:
    """The locks of all modules, by name."""
    return {
        f"{module.__name__}.{name}": value
        for module in MODULES
        for name, value in vars(module).items()
        if isinstance(value, LOCK_TYPES)
    }


def test_a_child_can_take_every_lock_that_another_thread_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_safety, "_LONGEST_DELAY", 0.1)
    assert len(module_locks()) >= 6

    class HoldAll:
        def __enter__(self) -> None:
            for lock in module_locks().values():
                lock.acquire()

        def __exit__(self, *_: object) -> None:
            for lock in module_locks().values():
                lock.release()

    def take_all() -> None:
        for name, lock in module_locks().items():
            assert lock.acquire(blocking=False), name

    assert exit_code_of_child(HoldAll(), take_all) == 0


def test_no_attribute_is_computed_under_a_lock() -> None:
    """Python 3.11's cached_property holds a lock while it computes, which a child can't release."""
    found = [
        f"{cls.__qualname__}.{name}"
        for module in MODULES
        for cls in vars(module).values()
        if isinstance(cls, type)
        for name, value in vars(cls).items()
        if isinstance(value, functools.cached_property) and cls.__module__.startswith("unrolled.")
    ]
    assert not found
