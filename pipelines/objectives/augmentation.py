"""Training images changed in ways that leave their class: on the worker's device, by the step's own randomness."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from pipelines.objectives.phase import Step
from pipelines.spec import ClassificationSpec

Images = Float[Tensor, "b c h w"]


def augmented(step: Step, spec: ClassificationSpec) -> Images:
    """The images of a step as the spec would have them; a function of the job's seed, the step and the place."""
    images = step.images
    if spec.flip:
        images = mirrored(images, step)
    if spec.shift:
        images = shifted(images, step, spec.shift)
    if spec.cutout:
        images = cut_out(images, step, spec.cutout)
    return images


def mirrored(images: Images, step: Step) -> Images:
    """Half of the images left to right."""
    return torch.where((step.uniform("mirror") < 0.5)[:, None, None, None], images.flip(3), images)


def shifted(images: Images, step: Step, most: int) -> Images:
    """Each image moved by up to so many pixels across and down; what comes in is black.

    The random crop of a padded image (Krizhevsky et al. 2012, section 4.1; with padding, He et al. 2016, section 4.2).
    """
    _, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, [most] * 4, value=-1.0)
    down, across = (_integers(step.uniform(name), 2 * most + 1) for name in ("shift down", "shift across"))
    rows = down[:, None] + torch.arange(height, device=images.device)
    columns = across[:, None] + torch.arange(width, device=images.device)
    chosen = torch.arange(len(images), device=images.device)[:, None, None]
    # Indexing on both sides of the channels brings the channels last.
    return padded[chosen, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cut_out(images: Images, step: Step, side: int) -> Images:
    """A square of that side blanked in each image, its centre anywhere (DeVries & Taylor 2017)."""
    _, _, height, width = images.shape
    top, left = (
        _integers(step.uniform(name), size)[:, None] - side // 2
        for name, size in (("cut down", height), ("cut across", width))
    )
    rows, columns = (torch.arange(size, device=images.device)[None] for size in (height, width))
    inside = ((rows >= top) & (rows < top + side))[:, :, None] & ((columns >= left) & (columns < left + side))[:, None]
    return torch.where(inside[:, None], torch.zeros_like(images), images)


def _integers(uniform: Float[Tensor, " b"], count: int) -> Tensor:
    # A uniform number just under 1 may round to the count itself.
    return (uniform * count).long().clamp_max(count - 1)
