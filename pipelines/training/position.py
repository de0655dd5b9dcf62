"""The current step and activity of this rank, for a monitoring thread."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Position:
    """What this rank is doing.

    Attributes:
        step: number of finished steps.
        doing: short description, for error messages.
    """

    step: int = 0
    doing: str = "starting"
