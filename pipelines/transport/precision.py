"""Transport computes in float32 or better, whatever the networks around it do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def without_autocast(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function that runs outside of any ``torch.autocast`` around it, which would round costs to bfloat16."""

    @functools.wraps(function)
    def outside(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **options)

    return outside


def wide(points: torch.Tensor) -> torch.Tensor:
    """Points in float32, or in float64 where they come so; differentiable."""
    return points if points.dtype == torch.float64 else points.float()
