"""Regression targets, compared with hand computation."""

import math

import pytest
import torch

from pipelines.data.targets import halves, target


def picture(u: float, v: float, width: int) -> torch.Tensor:
    """Create a colour image with different brightness on the left and on the right."""
    image = torch.full((1, 3, 4, width), v)
    image[..., : width // 2] = u
    return image


@pytest.mark.parametrize("width", [4, 5])
@pytest.mark.parametrize(("u", "v"), [(0.5, 0.25), (-0.5, 0.25), (0.0, 1.0), (-1.0, -1.0)])
def test_functions_of_the_halves(u: float, v: float, width: int) -> None:
    image = picture(u, v, width)
    assert halves(image)[0].tolist() == pytest.approx([u, v])
    assert float(target(image, "waves")) == pytest.approx(math.sin(math.pi * u) * math.sin(math.pi * v), abs=1e-6)
    assert float(target(image, "cone")) == pytest.approx(math.hypot(u, v))
