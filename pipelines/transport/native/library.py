"""Loads the build of the C++ solver for the best instruction set of this processor."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from pipelines.errors import TransportError

LEVELS = ("baseline", "avx2", "avx512")
"""Instruction sets, the best last. The baseline is the compiler's default: SSE2, or NEON on ARM."""

_VERSION = 4  # version of the interface to assignment.cpp


class Request(ctypes.Structure):
    """Mirrors ``Request`` in assignment.cpp."""

    _fields_ = (
        ("n", ctypes.c_int64),
        ("d", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("root", ctypes.c_int32),
        ("strict", ctypes.c_int32),
        ("unused", ctypes.c_int32),
        ("stop", ctypes.c_void_p),
        ("screen", ctypes.c_void_p),
        ("error", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("x_wide", ctypes.c_void_p),
        ("y_wide", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("rounding", ctypes.c_double),
        ("scale", ctypes.c_double),
        ("row", ctypes.c_void_p),
        ("column", ctypes.c_void_p),
        ("start", ctypes.c_void_p),
        ("budget", ctypes.c_int64),
        ("looks", ctypes.c_int64),
        ("f", ctypes.c_void_p),
        ("g", ctypes.c_void_p),
        ("matched", ctypes.c_void_p),
        ("assignment", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
    )


@cache
def _library(level: str) -> ctypes.CDLL | str:
    """Load the build for an instruction set, or return why it is not available."""
    folder = Path(__file__).parent
    path = next((p for suffix in EXTENSION_SUFFIXES if (p := folder / f"_assignment_{level}{suffix}").exists()), None)
    if path is None:
        return "not built: no C++ compiler was found at installation"
    try:
        library = ctypes.CDLL(str(path))
        library.monge_interface.restype = ctypes.c_int64
        if library.monge_interface() != _VERSION * 65536 + ctypes.sizeof(Request):
            return "built from other sources"
    except OSError:
        return "built for another machine"
    except AttributeError:
        return "built from other sources"
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    distances = (None, pointer, pointer, count, count, ctypes.c_float, ctypes.c_int32, pointer)
    prepare = (None, pointer, count, count, pointer, pointer, ctypes.c_double, ctypes.c_int32, *(pointer,) * 4)
    for name, result, *arguments in (
        ("assign", ctypes.c_int32, ctypes.POINTER(Request)),
        ("distances", *distances),
        ("distances_wide", *distances),
        ("summarise", ctypes.c_float, pointer, count, count, pointer),
        ("prepare", *prepare),
        ("prepare_wide", *prepare),
        ("processor", ctypes.c_int32),
    ):
        function = getattr(library, f"monge_{name}")
        function.restype, function.argtypes = result, arguments
    return library


@cache
def _processor() -> int:
    baseline = _library("baseline")
    return -1 if isinstance(baseline, str) else baseline.monge_processor()


def usable_levels() -> tuple[str, ...]:
    """Return the instruction sets that are built and that this processor supports; empty without a build."""
    # The processor is checked first: a build that it does not support is not loaded.
    return tuple(
        level for rank, level in enumerate(LEVELS) if rank <= _processor() and not isinstance(_library(level), str)
    )


def native_level() -> str | None:
    """Return the instruction set in use; None if the solver is not built or is disabled.

    Raises:
        TransportError: if ``MONGE_SIMD`` names an instruction set that this machine or build does not support.
    """
    return _level(os.environ.get("MONGE_SIMD", ""))


@cache
def _level(asked: str) -> str | None:
    levels = usable_levels()
    if asked == "off":
        return None
    if asked:
        if asked not in levels:
            raise TransportError(
                f"MONGE_SIMD: {asked!r} is not available",
                hint=f"choose one of {', '.join((*levels, 'off'))}, or unset it",
            )
        return asked
    return levels[-1] if levels else None


def native_available() -> bool:
    """Whether the native solver computes exact plans; otherwise lapx does."""
    return native_level() is not None


@dataclass(frozen=True)
class Implementation:
    """The implementation that computes exact plans in this process.

    Attributes:
        name: ``native`` or ``lapx``.
        level: instruction set of the native solver; None for lapx.
        reason: reason for the choice.
    """

    name: str
    level: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.name}{f' ({self.level})' if self.level else ''}: {self.reason}"


def implementation() -> Implementation:
    """Return which solver computes exact plans in this process, and why.

    Raises:
        TransportError: see :func:`native_level`.
    """
    asked, level = os.environ.get("MONGE_SIMD"), native_level()
    if asked:
        return Implementation("native" if level else "lapx", level, f"MONGE_SIMD is {asked}")
    if level is None:
        baseline = _library("baseline")
        return Implementation("lapx", None, f"the native solver is {baseline}")
    reason = f"the best for this processor of {', '.join(LEVELS)}"
    return Implementation("native", level, reason + ("; bfloat16 products" if has_bfloat16() else ""))


def has_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16 matrix products."""
    return _processor() >= 3


def loaded() -> ctypes.CDLL:
    level = native_level()
    library = _library(level) if level else "switched off by MONGE_SIMD" if usable_levels() else _library("baseline")
    if isinstance(library, str):
        raise TransportError(
            f"the native solver is {library}", hint="install a C++ compiler, then `pip install -e .` again"
        )
    return library
