"""Where a run stands on this rank, for who looks from another thread."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Position:
    """What a rank does now.

    Attributes:
        step: steps done.
        doing: in a few words.
    """

    step: int = 0
    doing: str = "starting"
