"""What this machine's processor can do, and what a compiled library asks of one."""

from __future__ import annotations

import functools
import platform
import re
import sys
from collections.abc import Iterable
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_TELLS = ("flags", "Features", "model name", "CPU implementer", "CPU part")

# What a compiler defines where it may use instructions, and what Linux calls them: for x86
# arch/x86/include/asm/cpufeatures.h, for arm64 Documentation/arch/arm64/elf_hwcaps.rst. Those that a
# compiler does not choose by itself (of cryptography, of the system) are left out.
_INSTRUCTIONS = {
    "__SSE3__": "pni", "__SSSE3__": "ssse3", "__SSE4_1__": "sse4_1", "__SSE4_2__": "sse4_2",
    "__SSE4A__": "sse4a", "__POPCNT__": "popcnt", "__LZCNT__": "abm", "__MOVBE__": "movbe",
    "__ADX__": "adx", "__TBM__": "tbm", "__XOP__": "xop", "__FMA4__": "fma4",
    "__AVX__": "avx", "__AVX2__": "avx2", "__FMA__": "fma", "__F16C__": "f16c", "__BMI__": "bmi1",
    "__BMI2__": "bmi2", "__GFNI__": "gfni", "__VAES__": "vaes", "__VPCLMULQDQ__": "vpclmulqdq",
    "__AVXVNNI__": "avx_vnni", "__AVXIFMA__": "avx_ifma", "__AMX_TILE__": "amx_tile",
    "__AVX512F__": "avx512f", "__AVX512BW__": "avx512bw", "__AVX512CD__": "avx512cd",
    "__AVX512DQ__": "avx512dq", "__AVX512VL__": "avx512vl", "__AVX512ER__": "avx512er",
    "__AVX512IFMA__": "avx512ifma", "__AVX512VBMI__": "avx512vbmi", "__AVX512VBMI2__": "avx512_vbmi2",
    "__AVX512VNNI__": "avx512_vnni", "__AVX512BITALG__": "avx512_bitalg", "__AVX512BF16__": "avx512_bf16",
    "__AVX512FP16__": "avx512_fp16", "__AVX512VPOPCNTDQ__": "avx512_vpopcntdq",
    "__AVX512VP2INTERSECT__": "avx512_vp2intersect", "__APX_F__": "apx",
    "__ARM_FEATURE_ATOMICS": "atomics", "__ARM_FEATURE_QRDMX": "asimdrdm", "__ARM_FEATURE_CRC32": "crc32",
    "__ARM_FEATURE_DOTPROD": "asimddp", "__ARM_FEATURE_COMPLEX": "fcma", "__ARM_FEATURE_JCVT": "jscvt",
    "__ARM_FEATURE_FP16_VECTOR_ARITHMETIC": "asimdhp", "__ARM_FEATURE_BF16": "bf16",
    "__ARM_FEATURE_MATMUL_INT8": "i8mm", "__ARM_FEATURE_RCPC": "lrcpc", "__ARM_FEATURE_SVE": "sve",
    "__ARM_FEATURE_SVE2": "sve2",
}  # fmt: skip
_VECTORS = ("avx", "avx512f")  # by these include/vectors.h chooses how wide a vector is


@functools.cache
def _told() -> dict[str, str]:
    """What Linux says of the first processor: reading all of them takes long on a large machine."""
    found: dict[str, str] = {}
    try:
        with _CPUINFO.open() as lines:
            for line in lines:
                name, colon, value = (part.strip() for part in line.partition(":"))
                if not colon and found:
                    break
                if name in _TELLS:
                    found[name] = value
    except OSError:
        return {}
    return found


@functools.cache
def features() -> frozenset[str] | None:
    """The instructions of this processor by Linux's names; None where the system doesn't tell them."""
    told = _told()
    listed = told.get("flags") or told.get("Features")
    return frozenset(listed.split()) if listed else None


def known() -> list[str]:
    """Of the instructions of this processor those that compiled kernels may use."""
    here = features() or frozenset()
    return sorted(here.intersection(_INSTRUCTIONS.values()))


def name() -> str:
    """What the processor is called."""
    return _told().get("model name") or platform.processor() or platform.machine()


@functools.cache
def identity() -> str:
    """All that the code which a compiler writes for this very machine may depend on.

    A home folder may be shared by machines with different processors and C libraries.
    """
    libc = " ".join(platform.libc_ver())
    told = "\n".join(f"{key}: {value}" for key, value in sorted(_told().items()))
    return f"{system()} {libc} {platform.processor()}\n{told}"


def system() -> str:
    """The operating system and the family of processors that a library is for."""
    return f"{sys.platform} {platform.machine()}"


def required(macros: str) -> list[str]:
    """The instructions that a compiler may use, by Linux's names.

    Args:
        macros: what the compiler defines, as ``-dM -E`` prints it.
    """
    defined = set(re.findall(r"^#define (\w+)", macros, re.MULTILINE))
    return sorted(feature for macro, feature in _INSTRUCTIONS.items() if macro in defined)


def lacking(needs: Iterable[str]) -> list[str]:
    """Which of these instructions this processor doesn't have; none where the system doesn't tell."""
    here = features()
    return [] if here is None else [feature for feature in needs if feature not in here]


def vectors(needs: Iterable[str]) -> tuple[str, ...]:
    """What decides the width of a library's vectors: libraries that differ in it can't work together."""
    return tuple(feature for feature in _VECTORS if feature in needs)
