"""Transport computes in float32 or better, whatever the networks around it do."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

FULL = ("ieee", "none")
"""Settings of ``fp32_precision`` under which the factors of a product of float32 keep their 24 bits."""

_lock = threading.Lock()
_inside = 0
_outside: tuple[str, list[str]] | None = None


def in_full_precision(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function that runs outside of ``torch.autocast`` and of TF32, which would round costs to 8 or 11 bits."""

    @functools.wraps(function)
    def outside(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False), full_products():
            return function(*args, **options)

    return outside


@contextmanager
def full_products() -> Iterator[None]:
    """Products of float32 matrices in float32, on CUDA and by oneDNN, whatever the process is set to.

    The setting is the process's, not the thread's: it is brought back when the last thread leaves, and products of
    other threads are in full precision until then. A backward pass follows the setting outside.
    """
    global _inside, _outside
    with _lock:
        _inside += 1
        if _inside == 1:
            _outside = _rounding()
            if _outside is not None:
                # The older interface sets both backends and itself. The newer one alone would leave the two at odds,
                # and PyTorch refuses to read a setting on which they differ.
                torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0 and _outside is not None:
                older, newer = _outside
                _outside = None
                torch.set_float32_matmul_precision(older)
                for backend, precision in zip(_backends(), newer, strict=True):
                    backend.fp32_precision = precision


def products_are_full() -> bool:
    """Whether products of float32 matrices keep the 24 bits of their factors."""
    return _rounding() is None


def wide(points: torch.Tensor) -> torch.Tensor:
    """Points in float32, or in float64 where they come so; differentiable."""
    return points if points.dtype == torch.float64 else points.float()


def _backends() -> list[Any]:
    """Those that have the newer interface; none before PyTorch 2.9."""
    matmuls = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    return [matmul for matmul in matmuls if getattr(matmul, "fp32_precision", None) is not None]


def _rounding() -> tuple[str, list[str]] | None:
    """The settings by the older and the newer interface; None where no product is rounded."""
    newer = [str(backend.fp32_precision) for backend in _backends()]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the newer interface, so that the older one is at its default
        older = "highest"
    full = all(precision in FULL for precision in newer) if newer else older == "highest"
    return None if full else (older, newer)
