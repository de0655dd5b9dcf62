"""Pictures: grids of samples, predictions with probabilities, weights, approximations."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np

MOST_NAMED = 30
"""Maximum number of classes for one curve per class, and for names and numbers in a confusion matrix."""

TILE = 56
"""Size in pixels of an image in a picture."""


def image_grid(images: np.ndarray, columns: int | None = None, border: int = 1, tile: int = 1) -> np.ndarray:
    """Arrange images in a grid.

    Args:
        images: images, (k, c, h, w) uint8 with c = 1 or 3.
        columns: number of images per row; by default the grid is nearly square.
        border: number of pixels between images.
        tile: smallest length of the longer side of an image, in pixels; smaller images are enlarged by an integer
            factor.

    Returns:
        Picture, (H, W) uint8 for grey images, (H, W, 3) for colour images.
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
    """Draw images with their predicted classes; wrong predictions are red, with the true class.

    Args:
        images: images, (k, c, h, w) uint8.
        probabilities: class probabilities, (k, classes).
        classes: names of the classes.
        labels: true classes, (k,), if known.

    Returns:
        Picture, (H, W, 3) uint8.
    """
    # Imported here because matplotlib is slow to import and only rank 0 draws.
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
        title = f"{classes[predicted]} {row[predicted]:.2f}"
        if labels is not None and wrong:
            title += f"\nfor {classes[labels[place]]}"
        axis.set_title(title, fontsize=9, color="crimson" if wrong else "black")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def confusion_figure(counts: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Draw a confusion matrix, shaded by the fraction of the true class; (H, W, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    many = len(classes)
    side = min(2.5 + 0.55 * many, 14)
    figure = Figure(figsize=(side, side), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axis = figure.subplots()
    fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axis.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    if many <= MOST_NAMED:
        axis.set_xticks(range(many), classes, rotation=90)
        axis.set_yticks(range(many), classes)
        for row, column in np.argwhere(counts > 0):
            shade = "white" if fractions[row, column] > 0.5 else "black"
            axis.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=8, color=shade)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def calibration_figure(table: np.ndarray, error: float) -> np.ndarray:
    """Draw accuracy against confidence, as bars shaded by the number of predictions; (H, W, 3) uint8.

    Args:
        table: mean confidence, accuracy and fraction of predictions of each bin, (bins, 3).
        error: expected calibration error, for the title.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 4.2), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axis = figure.subplots()
    bins = len(table)
    for place, (_, accuracy, fraction) in enumerate(table):
        shade = 0.25 + 0.75 * (fraction / table[:, 2].max()) ** 0.5 if fraction else 0.0
        axis.bar((place + 0.5) / bins, accuracy, 0.92 / bins, color="tab:blue", alpha=shade)
    axis.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle="--")
    axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    axis.set_title(f"calibration error {error:.3f}", fontsize=10)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def weights_figure(weights: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Draw the weights of a linear layer: one panel per class, or the difference for two classes; (H, W, 3) uint8.

    For two classes, only the difference of the logits matters. Bright pixels increase the logit where weights are red,
    and decrease it where they are blue. For colour images, the mean over channels is shown.

    Args:
        weights: weights, (classes, c, h, w).
        classes: names of the classes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels, titles = weights.mean(1), list(classes)
    if len(titles) == 2:
        panels, titles = panels[1:] - panels[:1], [f"{titles[1]} − {titles[0]}"]
    columns = min(len(panels), 5)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(max(1.7 * columns, 3.2), max(1.9 * rows, 3.2)), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis in axes:
        axis.axis("off")
    # The colour scale ignores outliers: pixels that are almost always dark may have large weights.
    largest = max(float(np.quantile(np.abs(panels), 0.995)), 1e-12)
    for axis, panel, title in zip(axes, panels, titles, strict=False):
        axis.imshow(panel, cmap="RdBu_r", vmin=-largest, vmax=largest)
        axis.set_title(title, fontsize=9)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def approximation_figure(rows: np.ndarray) -> np.ndarray:
    """Draw a function on the square next to its approximation by a network; (H, W, 3) uint8.

    Args:
        rows: two coordinates, value of the function and output of the network, (n, 4).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 3.6), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis, values, title in zip(axes, rows[:, 2:].T, ("function", "network"), strict=True):
        drawn = axis.scatter(*rows[:, :2].T, c=values, s=14, vmin=rows[:, 2].min(), vmax=rows[:, 2].max())
        axis.set(aspect="equal", title=title)
    figure.colorbar(drawn, ax=axes)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def encode_png(picture: np.ndarray) -> bytes:
    """Encode a picture, (h, w) or (h, w, 3) uint8, as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
