"""What an evaluation found."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Numbers and pictures.

    Attributes:
        metrics: numbers for the curves.
        pictures: (h, w) or (h, w, 3) uint8 images by name.
        tags: what is no number.
    """

    metrics: dict[str, float]
    pictures: dict[str, np.ndarray]
    tags: dict[str, str] = field(default_factory=dict)
