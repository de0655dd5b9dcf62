"""Feature extractors for the evaluation of generators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from pipelines.errors import SpecError
from pipelines.models.bundle import Bundle, to_float
from pipelines.models.imagenet import ImageNetNetwork
from pipelines.models.network import Classifier
from pipelines.shape import ImageShape

BATCH = 1024
LARGE_BATCH = 32
"""Number of images per forward pass, at the size of the data and at that of ImageNet networks."""

Images = UInt8[np.ndarray, "n c h w"] | UInt8[Tensor, "n c h w"]
Extracted = tuple[Float32[Tensor, "n d"], Int64[Tensor, " n"] | None]


class FeatureExtractor(ABC):
    """A network without its last layer.

    Attributes:
        name: name in the spec, with the version of a registered model.
        digest: sha256 of its weights.
        classes: number of classes of the data set that it predicts; 0 if it was trained on another data set.
        class_names: names of these classes.
    """

    name: str
    digest: str
    classes: int
    class_names: tuple[str, ...] = ()

    @abstractmethod
    def require(self, image: ImageShape) -> None:
        """Require that the network supports images of this shape.

        Raises:
            SpecError: the network does not support images of this shape.
        """

    @abstractmethod
    def __call__(self, images: Images) -> Extracted:
        """Compute features of images, and predicted classes if the extractor has classes."""

    @property
    def identity(self) -> str:
        """Name and hash; metrics of different extractors are not comparable."""
        return f"{self.name} sha256:{self.digest[:16]}"


class ClassifierFeatures(FeatureExtractor):
    """Features of a registered classifier.

    Args:
        name: name and version of the registered model.
        bundle: bundle of the classifier.

    Raises:
        SpecError: the model is not a classifier.
    """

    def __init__(self, name: str, bundle: Bundle) -> None:
        if not isinstance(bundle.network, Classifier):
            article = "an" if bundle.kind == "encoder" else "a"
            raise SpecError(
                f"evaluation.reference: {name} is {article} {bundle.kind}", hint="name a classifier of such images"
            )
        self.class_names = bundle.classes
        self.name, self.digest, self.classes = name, bundle.digest(), len(bundle.classes)
        self.bundle, self._network = bundle, bundle.network

    def require(self, image: ImageShape) -> None:
        """See :meth:`FeatureExtractor.require`."""
        if self.bundle.image != image:
            raise SpecError(
                f"evaluation.reference: {self.name} reads images of {self.bundle.image.dims}, "
                f"received ones of {image.dims}",
                hint="train a classifier on the same data, with the same size and channels",
            )

    @torch.inference_mode()
    def __call__(self, images: Images) -> Extracted:
        """See :meth:`FeatureExtractor.__call__`."""
        device = next(self._network.parameters()).device
        features, labels = [], []
        for batch in torch.as_tensor(images).split(BATCH):
            pixels = to_float(batch.to(device))
            features.append(self._network.embed(pixels).float().cpu())
            labels.append(self._network(pixels).argmax(1).cpu())
        return torch.cat(features), torch.cat(labels)


@dataclass(frozen=True, eq=False)
class ImageNetFeatures(FeatureExtractor):
    """Features of a published network trained on ImageNet; supports grey and colour images of any size.

    Attributes:
        name: one of :data:`pipelines.spec.ImageNetName`.
        network: network with its weights.
        digest: sha256 of the file of the weights.
    """

    name: str
    network: ImageNetNetwork
    digest: str
    classes: int = 0

    def require(self, image: ImageShape) -> None:
        """See :meth:`FeatureExtractor.require`; all shapes are supported."""

    @torch.inference_mode()
    def __call__(self, images: Images) -> Extracted:
        """See :meth:`FeatureExtractor.__call__`."""
        device = next(self.network.parameters()).device
        batches = torch.as_tensor(images).split(LARGE_BATCH)
        return torch.cat([self.network.embed(self.network.prepare(b.to(device))).cpu() for b in batches]), None
