"""Small data sets, valid and invalid."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def encode(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    """Encode an (h, w) or (h, w, c) uint8 array as an image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(name="encode")
def _encode() -> Callable[..., bytes]:
    return encode


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Create a folder of two classes, with six distinct images of 8×8 each."""
    rng = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
            (tmp_path / "images" / name / f"{i}.png").write_bytes(encode(pixels))
    return tmp_path / "images"
