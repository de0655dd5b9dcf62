"""Shape of one image, shared by data sets, networks and endpoints."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageShape:
    """Shape of one image: channels, height, width."""

    channels: int
    height: int
    width: int

    @property
    def dims(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.channels, self.height, self.width

    @property
    def pixels(self) -> int:
        """Number of values in one image."""
        return self.channels * self.height * self.width
