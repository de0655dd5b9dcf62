"""The error of a run whose points are not finite."""

from __future__ import annotations

from pipelines.errors import DivergedError


def diverged(step: int, what: str, reason: str) -> DivergedError:
    """The error to raise if no transport problem can be built from generated points.

    Args:
        step: index of the step.
        what: description of the points.
        reason: reason why the problem is not valid.
    """
    return DivergedError(
        f"at step {step}, no transport problem can be built from {what}: {reason}",
        hint="lower optimizer.learning_rate",
    )
