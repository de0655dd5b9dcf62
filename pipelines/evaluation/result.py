"""Result of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Metrics, pictures and tags.

    Attributes:
        metrics: values for the curves, by name.
        pictures: pictures, (h, w) or (h, w, 3) uint8, by name.
        tags: results that are not numbers, by name.
    """

    metrics: dict[str, float]
    pictures: dict[str, np.ndarray]
    tags: dict[str, str] = field(default_factory=dict)
