"""The Python part on Windows, simulated: without the modules and functions that only POSIX systems have."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from helpers import processes

SOURCE = Path(__file__).parents[2] / "src" / "unrolled"
MODULES = ("curses", "fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty")
SIMULATE_WINDOWS = f"""
import os, select, signal, sys
import filelock, importlib.metadata, numpy, platformdirs, rich.console, rich.progress
import safetensors.torch, torch, prompt_toolkit.input, matplotlib.figure

class Finder:
    def find_spec(self, name, *_):
        if name in {MODULES}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

for name in {MODULES}:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Finder())
for name in ("fork", "geteuid", "getuid", "getpgid", "killpg", "register_at_fork", "sched_getaffinity",
             "setsid", "sysconf", "uname"):
    delattr(os, name)
for name in ("SIGCONT", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGTSTP", "SIGWINCH"):
    delattr(signal, name)
sys.platform = "win32"
"""


def simulate(code: str, **variables: str) -> str:
    """Run code on a simulated Windows, and return what it prints."""
    done = processes.run("-c", SIMULATE_WINDOWS + code, env={**os.environ, "PATH": "", **variables})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_can_be_imported() -> None:
    names = [
        ".".join(("unrolled", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
        for path in SOURCE.rglob("*.py")
        if path.name != "__main__.py"
    ]
    assert len(names) > 100
    code = f"import importlib\nfor name in {names}:\n    importlib.import_module(name)\nprint('imported')"
    assert simulate(code).endswith("imported\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], "usage: unrolled"),
        (["show"], "RNN(2, 3"),
        (["bench", "--help"], "usage: unrolled bench"),
        (["doctor"], "Engine"),
    ],
)
def test_commands_run(arguments: list[str], expected: str) -> None:
    code = f"from unrolled.cli.main import main\ntry: main({arguments})\nexcept SystemExit: pass"
    assert expected in simulate(code)


def test_layers_run_on_the_reference_engine_without_a_compiler(tmp_path: Path) -> None:
    code = """
import warnings, unrolled as ur
warnings.simplefilter("ignore")
layer, x = ur.LSTM(3, 4), torch.randn(5, 2, 3)
with ur.engine("auto"):
    output, _ = layer(x)
output.sum().backward()
torch_layer = torch.nn.LSTM(3, 4)
torch_layer.load_state_dict(layer.state_dict())
print(torch.allclose(output, torch_layer(x)[0], atol=1e-6))
"""
    hidden = str(Path(__file__).parents[1] / "helpers" / "without_ziglang")
    assert simulate(code, PYTHONPATH=hidden, UNROLLED_CACHE=str(tmp_path)) == "True\n"


def test_modules_of_posix_are_imported_only_for_posix() -> None:
    """An import at the top of a module would keep the package from starting on Windows."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {*names} & {*MODULES}, path
