"""Pictures: grids of samples, and predictions with their probabilities."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np

TILE = 56
"""Pixels of an image in a picture that is looked at."""


def image_grid(images: np.ndarray, columns: int | None = None, border: int = 1, tile: int = 1) -> np.ndarray:
    """Images side by side.

    Args:
        images: (k, c, h, w) uint8, c of 1 or 3.
        columns: images in a row; as square as can be by default.
        border: pixels between images.
        tile: pixels that the longer side of an image has at least: smaller images are enlarged by a whole factor, so
            that each of their pixels stays a square.

    Returns:
        (H, W) uint8 for grey images, (H, W, 3) for colour.
    """
    factor = math.ceil(tile / max(images.shape[2:]))
    images = images.repeat(factor, axis=2).repeat(factor, axis=3)
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = np.full((rows * (height + border) + border, columns * (width + border) + border, channels), 255, np.uint8)
    for place, image in enumerate(images):
        top = border + place // columns * (height + border)
        left = border + place % columns * (width + border)
        canvas[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return canvas[..., 0] if channels == 1 else canvas


def predictions_figure(
    images: np.ndarray, probabilities: np.ndarray, classes: Sequence[str], labels: np.ndarray | None = None
) -> np.ndarray:
    """Images with the class predicted for each, wrong ones in red.

    Args:
        images: (k, c, h, w) uint8.
        probabilities: (k, classes).
        classes: their names.
        labels: (k,) the true classes, where known.

    Returns:
        (H, W, 3) uint8.
    """
    # matplotlib is slow to import, and only the ranks that draw need it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(images), 8)
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(1.5 * columns, 1.8 * rows), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis in axes:
        axis.axis("off")
    for place, (axis, image, row) in enumerate(zip(axes, images, probabilities, strict=False)):
        axis.imshow(image.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=255)
        predicted = int(row.argmax())
        wrong = labels is not None and predicted != labels[place]
        axis.set_title(f"{classes[predicted]} {row[predicted]:.2f}", fontsize=9, color="crimson" if wrong else "black")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def encode_png(picture: np.ndarray) -> bytes:
    """A (h, w) or (h, w, 3) uint8 picture as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
