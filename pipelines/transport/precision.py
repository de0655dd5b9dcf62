"""Full precision for transport computations, independent of the precision of the networks."""

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
"""Settings of ``fp32_precision`` in which the factors of float32 products keep their 24 bits."""

_lock = threading.Lock()
_inside = 0
_outside: tuple[str, list[str]] | None = None


def in_full_precision(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorator that disables ``torch.autocast`` and TF32, which would round costs to 8 or 11 bits."""

    @functools.wraps(function)
    def outside(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False), full_products():
            return function(*args, **options)

    return outside


@contextmanager
def full_products() -> Iterator[None]:
    """Compute products of float32 matrices in float32, on CUDA and with oneDNN, for any setting of the process.

    The setting is global to the process: it is restored when the last thread exits, and products of other threads are
    in full precision until then. A backward pass uses the setting outside of the block.
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
    """Whether the factors of float32 matrix products keep their 24 bits."""
    return _rounding() is None


def wide(points: torch.Tensor) -> torch.Tensor:
    """Convert points to float32 unless they are float64; differentiable."""
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
