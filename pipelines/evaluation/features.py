"""What a trained classifier sees in images: the features by which generators are judged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from pipelines.errors import SpecError
from pipelines.models.bundle import Bundle, to_float
from pipelines.models.network import Classifier
from pipelines.shape import ImageShape

BATCH = 1024


@dataclass(frozen=True, eq=False)
class FeatureExtractor:
    """A reference classifier without its last layer.

    Attributes:
        name: of the registered model, with its version.
        bundle: the classifier.
    """

    name: str
    bundle: Bundle

    def __post_init__(self) -> None:
        if not isinstance(self.bundle.network, Classifier):
            raise SpecError(
                f"evaluation.reference: {self.name} is a generator", cure="name a classifier of such images"
            )

    def require(self, image: ImageShape) -> None:
        """Refuse images that the classifier was not made for.

        Raises:
            SpecError: it reads images of another shape.
        """
        if self.bundle.image != image:
            raise SpecError(
                f"evaluation.reference: {self.name} reads images of {self.bundle.image.dims}, "
                f"received ones of {image.dims}",
                cure="train a classifier on the same data, with the same size and channels",
            )

    @property
    def identity(self) -> str:
        """Name and hash: numbers of two extractors are not to be compared."""
        return f"{self.name} sha256:{self.bundle.digest()[:16]}"

    @torch.inference_mode()
    def __call__(
        self, images: UInt8[np.ndarray, "n c h w"] | UInt8[Tensor, "n c h w"]
    ) -> tuple[Float32[Tensor, "n d"], Int64[Tensor, " n"]]:
        """Features of images, and the class that the classifier gives to each."""
        network = self.bundle.network
        assert isinstance(network, Classifier)
        device = next(network.parameters()).device
        features, labels = [], []
        for batch in torch.as_tensor(images).split(BATCH):
            pixels = to_float(batch.to(device))
            features.append(network.embed(pixels).float().cpu())
            labels.append(network(pixels).argmax(1).cpu())
        return torch.cat(features), torch.cat(labels)
