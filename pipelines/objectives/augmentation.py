"""Label-preserving augmentation of training images, on the worker's device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from pipelines.distributed import gather_rows
from pipelines.objectives.phase import Step
from pipelines.randomness import derived_seed, step_generator
from pipelines.spec import ClassificationSpec

Images = Float[Tensor, "b c h w"]


def augmented(step: Step, spec: ClassificationSpec) -> Images:
    """Augment the images of a step as the spec requests; a function of the job's seed, the step and the place."""
    images = step.images
    if spec.flip:
        images = mirrored(images, step)
    if spec.shift:
        images = shifted(images, step, spec.shift)
    if spec.cutout:
        images = cut_out(images, step, spec.cutout)
    return images


def mirrored(images: Images, step: Step) -> Images:
    """Mirror each image left to right with probability 1/2."""
    return torch.where((step.uniform("mirror") < 0.5)[:, None, None, None], images.flip(3), images)


def shifted(images: Images, step: Step, most: int) -> Images:
    """Shift each image by up to ``most`` pixels across and down, with black borders.

    The random crop of a padded image (Krizhevsky et al. 2012, section 4.1; with padding, He et al. 2016, section 4.2).
    """
    _, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, [most] * 4, value=-1.0)
    down, across = (_integers(step.uniform(name), 2 * most + 1) for name in ("shift down", "shift across"))
    rows = down[:, None] + torch.arange(height, device=images.device)
    columns = across[:, None] + torch.arange(width, device=images.device)
    chosen = torch.arange(len(images), device=images.device)[:, None, None]
    # Advanced indices on both sides of the channels move the channels to the last axis.
    return padded[chosen, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cut_out(images: Images, step: Step, side: int) -> Images:
    """Mask a square of this side at a random centre in each image (DeVries & Taylor 2017)."""
    sides = torch.full((len(images),), side, device=images.device)
    inside = _rectangles(images, step, "cut", sides, sides)
    return torch.where(inside[:, None], torch.zeros_like(images), images)


@dataclass(frozen=True, eq=False)
class Mixture:
    """Images mixed with other images.

    Attributes:
        images: mixed images, (k, c, h, w).
        labels: classes of the images that were mixed in, (k,).
        weights: weights of the images' own classes in [0, 1], (k,); ``labels`` have the rest.
    """

    images: Images
    labels: Int64[Tensor, " k"]
    weights: Float[Tensor, " k"]


def mixed(images: Images, step: Step, spec: ClassificationSpec) -> Mixture:
    """Mix each image of a step with another one of the *global* batch.

    Partners and weights are drawn for the whole batch, and ranks exchange their images, so the mixtures do not depend
    on the number of ranks. An image that is its own partner does not change.

    Args:
        images: images of this rank's share, (k, c, h, w), augmented or not.
        step: step with the whole share of this rank.
        spec: ``mixup`` (Zhang et al. 2018, eq. 1) or ``cutmix`` (Yun et al. 2019, eqs. 1 and 2).
    """
    drawn = torch.randperm(step.batch, generator=step_generator(step.seed, step.index, "partners"))
    partners = drawn[step.share].to(images.device)
    others, labels = gather_rows(images)[partners], gather_rows(step.labels)[partners]
    if spec.mixup:
        weights = _beta(step, spec.mixup).to(images)
        own = weights[:, None, None, None]
        return Mixture(own * images + (1 - own) * others, labels, weights)
    _, _, height, width = images.shape
    pasted = (1 - _beta(step, spec.cutmix)).sqrt()
    heights, widths = ((size * pasted).long().to(images.device) for size in (height, width))
    inside = _rectangles(images, step, "paste", heights, widths)
    # Rectangles are cut at the borders; the weight is that of the remaining area.
    weights = 1 - inside.to(images.dtype).mean((1, 2))
    return Mixture(torch.where(inside[:, None], others, images), labels, weights)


def _beta(step: Step, alpha: float) -> Float[Tensor, " b"]:
    """Draw from Beta(α, α) for this rank's share, in float64."""
    generator = np.random.default_rng(derived_seed(step.seed, step.index, "shares"))
    return torch.from_numpy(generator.beta(alpha, alpha, step.batch)[step.share])


def _rectangles(images: Images, step: Step, stream: str, heights: Tensor, widths: Tensor) -> Bool[Tensor, "b h w"]:
    """Mask of the pixels in a rectangle at a random centre with sides ``heights`` and ``widths``, (b,)."""
    within = []
    for axis, size, sides in (("down", images.shape[2], heights), ("across", images.shape[3], widths)):
        first = (_integers(step.uniform(f"{stream} {axis}"), size) - sides // 2)[:, None]
        places = torch.arange(size, device=images.device)[None]
        within.append((places >= first) & (places < first + sides[:, None]))
    rows, columns = within
    return rows[:, :, None] & columns[:, None]


def _integers(uniform: Float[Tensor, " b"], count: int) -> Tensor:
    # The product of a uniform number just below 1 may round up to the count.
    return (uniform * count).long().clamp_max(count - 1)
