"""Children that fork while another thread of their parent compiles, records or imports."""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import threading
import time
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

# On a busy machine, even what doesn't hang takes long.
SECONDS = 300
UNLIMITED = f"""
from unrolled.engines import fork_safety
from unrolled.engines.native.toolchain import cache
fork_safety._LONGEST_DELAY = cache._LOCK_TIMEOUT = 2 * {SECONDS}
"""

# Starts work() in a thread, forks once the compiler has started COUNT times, and prints the exit code of a
# child that calls check(). SIGALRM ends a child that waits for a thread that it doesn't have, or for the lock
# of a library that its parent can't finish. Without UNLIMITED, it would go on without it after 120 s.
PROGRAM = """
import os, signal, threading, time
from pathlib import Path
import torch
import unrolled as ur
{unlimited}

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
        signal.alarm({seconds})
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
    options = {"num_workers": 2, "multiprocessing_context": "fork", "timeout": 200}
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
    code = PROGRAM.format(
        calls=str(tmp_path / "calls"), setup=LAYER + setup, count=count, unlimited=UNLIMITED, seconds=SECONDS
    )
    done = run_python(code, CXX=cxx, PYTHONWARNINGS="ignore")
    assert done.stdout == "0\n", done.stdout + done.stderr


# Starts work() in a thread, forks when the event is set, and prints the exit code of a child.
EVENT_PROGRAM = """
import os, signal, sys, threading, time
import torch
import unrolled as ur
{unlimited}

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
    signal.alarm({seconds})
    check()
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
end()
thread.join()
"""


def run_event_program(setup: str, *prefix: str, cache_folder: Path | None = None) -> None:
    code = EVENT_PROGRAM.format(setup=setup, unlimited=UNLIMITED, seconds=SECONDS)
    folder = None if cache_folder is None else str(cache_folder)
    done = run_python(code, prefix=prefix, PYTHONWARNINGS="ignore", UNROLLED_CACHE=folder)
    assert done.stdout == "0\n", done.stdout + done.stderr


@pytest.mark.slow
@NEEDS_SYSTEM_COMPILER
@pytest.mark.parametrize("package", ["sympy", "torch._dynamo", "platformdirs"])
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


@pytest.mark.slow
@NEEDS_SYSTEM_COMPILER
def test_no_package_that_is_imported_late_runs_code_before_forks() -> None:
    """Such code would run before ours. filelock waits for the end of a fork, even in its own import."""
    done = run_python(
        """
    import os
    import torch
    import unrolled as ur
    late, register = [], os.register_at_fork
    os.register_at_fork = lambda **hooks: late.append(hooks) if "before" in hooks else register(**hooks)
    with ur.engine("native"):
        ur.GRU(5, 7)(torch.randn(6, 3, 5))[0].sum().backward()
    print(late)
    """,
        prefix=("env",),
        UNROLLED_CACHE=None,
    )
    assert done.stdout == "[]\n", done.stdout + done.stderr


@pytest.mark.slow
@NEEDS_SYSTEM_COMPILER
def test_a_fork_waits_for_the_start_of_a_compiler(cache_folder: Path) -> None:
    """If a child had copies of the pipes, the thread would wait for the child and hold the library's lock."""
    run_event_program(
        """
from unrolled.engines.native.toolchain.compiler import compilers
next(iter(compilers()))
pipe = os.pipe

def slow_pipe():
    ends = pipe()
    if os.getpid() == parent:
        reached.set()
        time.sleep(1)
    return ends

os.pipe = slow_pipe
layer, check, end = ur.GRU(5, 7), work, int
""",
        cache_folder=cache_folder,
    )


def test_threads_delay_a_fork_at_the_same_time() -> None:
    """A compiler can start while another thread captures a step, and the fork waits for both."""
    both, ended = threading.Barrier(3), []

    def delay(seconds: float) -> None:
        with fork_safety.delay_forks(), fork_safety.delay_forks():
            both.wait(60)
            time.sleep(seconds)
            ended.append(seconds)

    threads = [threading.Thread(target=delay, args=(seconds,)) for seconds in (0.2, 0.4)]
    for thread in threads:
        thread.start()
    both.wait(60)
    with fork_safety.delay_forks():  # a block of this thread doesn't count
        child = os.fork()
        if child == 0:
            os._exit(len(ended))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    for thread in threads:
        thread.join()


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
LOCK_TYPES = (type(threading.Lock()), type(threading.RLock()), threading.Condition)


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
