"""Evaluation of generators by features of a reference network."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pipelines.data.loader import Split
from pipelines.distributed import gather_parts, rank, sum_over_ranks, world_size
from pipelines.evaluation.features import Extracted, FeatureExtractor
from pipelines.evaluation.figures import TILE, image_grid
from pipelines.evaluation.generation import BATCH, gaussian, sample
from pipelines.evaluation.scores import (
    DENSITY_NEIGHBOURS,
    PRECISION_NEIGHBOURS,
    Neighbourhoods,
    frechet_distance,
    kernel_distance,
    nearest,
    neighbourhood_scores,
)
from pipelines.models.bundle import to_uint8
from pipelines.models.network import Generator
from pipelines.randomness import step_generator

CPU = torch.device("cpu")

SHOWN, NEIGHBOURS = 8, 6
SEARCHED = 12
"""Largest number of training images searched for neighbours, per sample; evenly spaced if there are more."""


class FeatureJudge:
    """Computes scores of samples against held-out images, with those of real images and of a Gaussian for comparison.

    Collective: every rank creates a judge, calls it, and computes a part of the scores. All sets have the same size,
    because a Fréchet distance between finite sets depends on it.

    Args:
        extractor: feature extractor.
        train: training split.
        test: held-out split.
        samples: number of images in a set; fewer if a split has fewer.
        seed: seed of all draws.
        device: device of generators and of communication between ranks.
        classes: names of the classes of the data, in order; by default those of the extractor.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        train: Split,
        test: Split,
        samples: int,
        seed: int,
        device: torch.device = CPU,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        self.extractor = extractor
        self._same_classes = classes is None or classes == extractor.class_names
        self._train = train
        self._count = min(samples, len(train), len(test))
        self._seed = seed
        self._device = device
        real, _ = self._seen(self._count, lambda part: self._draw(test, "judged held-out", part))
        self._real = Neighbourhoods.of(real, PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS)
        self._baselines: dict[str, float] | None = None
        self._training: tuple[np.ndarray, Tensor] | None = None

    def scores(self, generator: Generator) -> dict[str, float]:
        """Compute scores by name, always for the same latent vectors. Collective; all ranks return the same.

        The scores are ``fid``, ``kid``, ``precision``, ``recall``, ``density`` and ``coverage``; with suffix ``_real``
        for training images, and with suffix ``_gaussian`` for a Gaussian fitted to their pixels. If the extractor
        predicts the classes, ``smallest_class_share`` is the fraction of the least frequent predicted class times the
        number of classes, which is 1 if all are equally frequent; with suffix ``_real`` for training images. For a
        conditional generator, ``asked_class_share`` is the fraction of samples predicted to be of the requested class.
        """
        count, seed, device = self._count, self._seed, self._device
        features, labels = self._seen(count, lambda part: to_uint8(sample(generator, count, seed, device, part)).cpu())
        sets = {"": features}
        if self._baselines is None:
            sets["_real"], real = self._seen(count, lambda part: self._draw(self._train, "judged floor", part))
            sets["_gaussian"], _ = self._seen(count, lambda part: to_uint8(gaussian(self._train, count, seed, part)))
        found = self._between(sets)
        if self._baselines is None:
            self._baselines = {name: value for name, value in found.items() if name.endswith(("_real", "_gaussian"))}
            if real is not None:
                self._baselines["smallest_class_share_real"] = _smallest_share(real, self.extractor.classes)
        found |= self._baselines
        if labels is not None:
            classes = self.extractor.classes
            found["smallest_class_share"] = _smallest_share(labels, classes)
            if generator.conditions == classes and self._same_classes:
                asked = torch.arange(count, device=labels.device) % classes
                found["asked_class_share"] = float((labels == asked).double().mean())
        return found

    def _seen(self, count: int, images: Callable[[slice], Tensor]) -> Extracted:
        """Features of a set of images; each rank computes a part."""

        def see(part: slice) -> list[Tensor]:
            return [found.to(self._device) for found in self.extractor(images(part)) if found is not None]

        features, *labels = gather_parts(count, BATCH, see)
        return features, labels[0] if labels else None

    def _between(self, sets: dict[str, Tensor]) -> dict[str, float]:
        """Scores of each set of features against those of the held-out images."""
        scores: dict[str, float] = {}
        distances = torch.zeros(len(sets), dtype=torch.float64, device=self._device)
        for turn, (behind, features) in enumerate(sets.items()):
            if turn % world_size() == rank():
                distances[turn] = frechet_distance(self._real.rows, features)
            scores[f"kid{behind}"] = kernel_distance(self._real.rows, features)
            scores |= {f"{name}{behind}": value for name, value in neighbourhood_scores(self._real, features).items()}
        fids = dict(zip([f"fid{behind}" for behind in sets], sum_over_ranks(distances).tolist(), strict=True))
        return fids | scores

    def neighbours(self, generator: Generator) -> np.ndarray:
        """Draw samples next to their nearest training images, one sample per row, to reveal copies."""
        if self._training is None:
            chosen = np.linspace(0, len(self._train) - 1, min(SEARCHED * self._count, len(self._train))).astype(
                np.int64
            )
            features, _ = self._seen(len(chosen), lambda part: self._train.take(chosen[part])[0])
            self._training = chosen, features
        training, features = self._training
        samples = to_uint8(sample(generator, SHOWN, self._seed, self._device)).cpu()
        shown_features = self.extractor(samples)[0].to(self._device)
        found = nearest(shown_features, features, min(NEIGHBOURS, len(training))).cpu()
        rows = [
            np.concatenate([shown[None], self._train.take(training[near])[0].numpy()])
            for shown, near in zip(samples.numpy(), found.numpy(), strict=True)
        ]
        return image_grid(np.concatenate(rows), columns=len(rows[0]), tile=TILE)

    def _draw(self, split: Split, stream: str, part: slice) -> Tensor:
        order = torch.randperm(len(split), generator=step_generator(self._seed, 0, stream))
        return split.take(order[: self._count][part].numpy())[0]


def _smallest_share(labels: Tensor, classes: int) -> float:
    return float(torch.bincount(labels, minlength=classes).min()) * classes / len(labels)
