"""Instruction set extensions that this processor has, and those that a compiled library requires."""

from __future__ import annotations

import ctypes
import functools
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unrolled.engines.fork_safety import delay_forks

_CPUINFO = Path("/proc/cpuinfo")
_CPUINFO_KEYS = (
    "flags", "Features", "features", "isa", "cpu", "model name", "CPU implementer", "CPU part",
)  # fmt: skip
_SYSCTL = ("/usr/sbin/sysctl", "hw.optional", "machdep.cpu")
_WINDOWS_FEATURES = 128  # IsProcessorFeaturePresent knows fewer; it returns 0 for unknown numbers

# Macros that a compiler defines if it may use an extension, and Linux's name of the extension (for x86:
# arch/x86/include/asm/cpufeatures.h, for arm64: Documentation/arch/arm64/elf_hwcaps.rst). Extensions that a
# compiler doesn't use by itself (cryptography, operating system) are left out.
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
_VECTOR_EXTENSIONS = ("avx", "avx512f")  # include/vectors.h derives the vector width from these


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """Return what Linux reports of the first processor; reading all takes long on a large machine."""
    entries: dict[str, str] = {}
    try:
        with _CPUINFO.open() as lines:
            for line in lines:
                key, colon, value = (part.strip() for part in line.partition(":"))
                if not colon and entries:
                    break
                if key in _CPUINFO_KEYS:
                    entries[key] = value
    except OSError:
        return {}
    return entries


@functools.cache
def features() -> frozenset[str] | None:
    """Return the extensions of this processor by Linux's names, or None if the system doesn't list them."""
    entries = _cpuinfo()
    flags = entries.get("flags") or entries.get("Features")
    return frozenset(flags.split()) if flags else None


def usable_features() -> list[str]:
    """Return the extensions of this processor that compiled kernels may use."""
    available = features() or frozenset()
    return sorted(available.intersection(_INSTRUCTIONS.values()))


def name() -> str:
    """Return the name of the processor."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


@functools.cache
def identity() -> str:
    """Return a text with everything about this machine that affects code compiled for it.

    It distinguishes machines with different processors or C libraries that share a home directory.
    """
    libc = " ".join(platform.libc_ver())
    entries = "\n".join(f"{key}: {value}" for key, value in sorted(_cpuinfo().items()))
    # Both run a command, and Python 3.11's platform does so under the lock of a cached_property.
    with delay_forks():
        processor, features = platform.processor(), _features_elsewhere()
    return f"{system()} {libc} {processor}\n{entries}\n{features}"


def _features_elsewhere() -> str:
    """Return what macOS or Windows reports of the processor's extensions, in no particular format."""
    if sys.platform == "darwin":
        try:
            done = subprocess.run(_SYSCTL, stdin=subprocess.DEVNULL, capture_output=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.decode(errors="replace")
    kernel32: Any = getattr(ctypes, "windll", None) and ctypes.windll.kernel32  # type: ignore[attr-defined]
    if kernel32 is None:
        return ""
    return " ".join(str(k) for k in range(_WINDOWS_FEATURES) if kernel32.IsProcessorFeaturePresent(k))


def system() -> str:
    """Return the operating system and processor family that a library is compiled for."""
    return f"{sys.platform} {platform.machine()}"


def required(macros: str) -> list[str]:
    """Return the extensions that a compiler may use, by Linux's names.

    Args:
        macros: The macros that the compiler defines, as ``-dM -E`` prints them.
    """
    defined = set(re.findall(r"^#define (\w+)", macros, re.MULTILINE))
    return sorted(feature for macro, feature in _INSTRUCTIONS.items() if macro in defined)


def missing(required_features: Iterable[str]) -> list[str]:
    """Return the extensions that this processor doesn't have; empty if the system doesn't list them."""
    available = features()
    return [] if available is None else [name for name in required_features if name not in available]


def vector_extensions(required_features: Iterable[str]) -> tuple[str, ...]:
    """Return the extensions that decide a library's vector width; libraries must agree in them."""
    return tuple(feature for feature in _VECTOR_EXTENSIONS if feature in required_features)
