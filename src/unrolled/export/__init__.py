"""Export trained modules to C and WebAssembly."""

from unrolled.export.library import CLibrary, c
from unrolled.export.wasm import WebAssembly, wasm

__all__ = ["CLibrary", "WebAssembly", "c", "wasm"]
