"""How good a generator's images are, by the features of a network that sees them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipelines.data.loader import Split
from pipelines.evaluation.features import FeatureExtractor
from pipelines.evaluation.figures import TILE, image_grid
from pipelines.evaluation.generation import gaussian, sample
from pipelines.evaluation.scores import density_coverage, frechet_distance, kernel_distance, nearest, precision_recall
from pipelines.models.bundle import to_uint8
from pipelines.models.network import Generator
from pipelines.randomness import step_generator

SHOWN, NEIGHBOURS = 8, 6
SEARCHED = 12
"""Training images among which neighbours are looked for, times the samples: evenly spaced where there are more."""


class FeatureJudge:
    """Scores of samples against held-out images, beside those of real images and of a Gaussian.

    All sets have the same size, for a Fréchet distance between finite sets depends on it.

    Args:
        extractor: whose features.
        train: the training split.
        test: the held-out split.
        samples: images in a set; fewer where a split has fewer.
        seed: of all draws.
    """

    def __init__(self, extractor: FeatureExtractor, train: Split, test: Split, samples: int, seed: int) -> None:
        self.extractor = extractor
        self._train = train
        self._count = min(samples, len(train), len(test))
        self._seed = seed
        self._real, _ = extractor(self._draw(test, "judged held-out"))
        self._baselines: dict[str, float] | None = None
        self._training: tuple[np.ndarray, Tensor] | None = None

    def scores(self, generator: Generator, device: torch.device) -> dict[str, float]:
        """Scores by name, always of the same latent vectors.

        ``fid``, ``kid``, ``precision``, ``recall``, ``density``, ``coverage``, and each of them with ``_real`` behind
        it, of training images, and with ``_gaussian``, of a Gaussian fitted to their pixels. Where the extractor tells
        the classes apart, ``smallest_class_share``, of the class that it sees least often, times the number of
        classes: 1 where all are equal.
        """
        features, labels = self.extractor(to_uint8(sample(generator, self._count, self._seed, device)).cpu())
        if self._baselines is None:
            floor, _ = self.extractor(self._draw(self._train, "judged floor"))
            baseline, _ = self.extractor(to_uint8(gaussian(self._train, self._count, self._seed)))
            self._baselines = {f"{name}_real": value for name, value in self._between(floor).items()}
            self._baselines |= {f"{name}_gaussian": value for name, value in self._between(baseline).items()}
        found = self._between(features) | self._baselines
        if labels is not None:
            classes = self.extractor.classes
            found["smallest_class_share"] = (
                float(torch.bincount(labels, minlength=classes).min()) * classes / len(labels)
            )
        return found

    def _between(self, features: Tensor) -> dict[str, float]:
        """The scores of features against those of the held-out images."""
        precision, recall = precision_recall(self._real, features)
        density, coverage = density_coverage(self._real, features)
        return {
            "fid": frechet_distance(self._real, features),
            "kid": kernel_distance(self._real, features),
            "precision": precision,
            "recall": recall,
            "density": density,
            "coverage": coverage,
        }

    def neighbours(self, generator: Generator, device: torch.device) -> np.ndarray:
        """A picture: in each row a sample and the training images nearest to it. A copy would show as a twin."""
        if self._training is None:
            chosen = np.linspace(0, len(self._train) - 1, min(SEARCHED * self._count, len(self._train))).astype(
                np.int64
            )
            images, _ = self._train.take(chosen)
            self._training = images.numpy(), self.extractor(images)[0]
        training, features = self._training
        samples = to_uint8(sample(generator, SHOWN, self._seed, device)).cpu()
        found = nearest(self.extractor(samples)[0], features, min(NEIGHBOURS, len(training)))
        rows = [
            np.concatenate([shown[None], training[near]])
            for shown, near in zip(samples.numpy(), found.numpy(), strict=True)
        ]
        return image_grid(np.concatenate(rows), columns=len(rows[0]), tile=TILE)

    def _draw(self, split: Split, stream: str) -> Tensor:
        order = torch.randperm(len(split), generator=step_generator(self._seed, 0, stream))
        return split.take(order[: self._count].numpy())[0]
