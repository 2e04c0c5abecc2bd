"""Whether this machine compiles WebAssembly."""

from __future__ import annotations

import importlib.util
import shutil

import pytest

_HAS_ZIG = importlib.util.find_spec("ziglang") is not None or shutil.which("zig") is not None
_HAS_CLANG = shutil.which("clang") is not None and shutil.which("wasm-ld") is not None
NEEDS_WASM = pytest.mark.skipif(not (_HAS_ZIG or _HAS_CLANG), reason="needs ziglang, or clang and wasm-ld")
