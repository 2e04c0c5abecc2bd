"""The files around an exported source: an example, the choice of instruction set, and the build."""

from __future__ import annotations

import re

from unrolled._version import __version__
from unrolled.export.c_source import CSource
from unrolled.export.templates import fill, template

_LEVELS = ("v1", "v3", "v4")  # of x86-64: baseline, AVX2 with FMA, AVX-512
_INT8_LEVEL = "vnni"  # AVX-512 with products of int8


def project_files(code: CSource) -> dict[str, str]:
    """Return the files around a source, by name."""
    version = re.match(r"[\d.]*\d", __version__)
    names = {"name": code.name, "NAME": code.name.upper(), "version": version[0] if version else "0"}
    return {
        "CMakeLists.txt": fill(template("CMakeLists.txt"), levels=" ".join(_levels(code)), **names),
        f"{code.name}.pc.in": fill(template("model.pc.in"), **names),
        f"{code.name}_dispatch.c": _dispatch(code),
        "example.c": _example(code),
    }


def _example(code: CSource) -> str:
    """Return a program that uses the code."""
    is_index = code.program.lookup is not None
    names = {"name": code.name, "NAME": code.name.upper(), "x": code.x_type()}
    names["value"] = "t % 2" if is_index else "(float)(t % 10) / 10"
    start = template("load.c" if code.in_file else "place.c")
    use = template("use_run.c" if code.program.bidirectional else "use_step.c")
    return fill(template("example.c"), **names, start=fill(start, **names), use=fill(use, **names))


def _levels(code: CSource) -> tuple[str, ...]:
    """Return the names of the instruction sets that the code is compiled for on x86-64."""
    return (*_LEVELS, _INT8_LEVEL) if code.has_int8 else _LEVELS


def _dispatch(code: CSource) -> str:
    """Return the source that chooses an instruction set of x86-64 at run time."""
    widest = '(__builtin_cpu_supports("avx512vnni") ? 3 : 2)' if code.has_int8 else "2"
    text = fill(template("dispatch.c"), name=code.name, widest=widest)
    for function, declaration in code.declarations().items():
        arguments = ", ".join(re.findall(r"(\w+)[,)]", declaration))
        returns, end = ("", " return;") if declaration.startswith("void") else ("return ", "")
        variants = [f"{function}_{level}" for level in _levels(code)]
        text += "".join(f"{declaration.replace(f'{function}(', f'{one}(')};\n" for one in variants)
        calls = [f"{returns}{one}({arguments});{end}" for one in variants]
        cases = [f"    case {number}: {call}\n" for number, call in enumerate(calls) if number]
        text += (
            f"{declaration} {{\n  switch (level()) {{\n{''.join(cases)}    default: {calls[0]}\n  }}\n}}\n\n"
        )
    return text
