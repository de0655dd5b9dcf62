"""What networks see in images: the features by which generators are judged."""

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
"""Images that a network reads at once: of the data's own size, and of ImageNet's."""

Images = UInt8[np.ndarray, "n c h w"] | UInt8[Tensor, "n c h w"]
Extracted = tuple[Float32[Tensor, "n d"], Int64[Tensor, " n"] | None]


class FeatureExtractor(ABC):
    """A network without its last layer.

    Attributes:
        name: by which the spec calls it, with its version if it is registered.
        digest: sha256 of its weights.
        classes: of the data set, that it tells apart; 0 where it was trained on another one.
        class_names: of these.
    """

    name: str
    digest: str
    classes: int
    class_names: tuple[str, ...] = ()

    @abstractmethod
    def require(self, image: ImageShape) -> None:
        """Refuse images that the network was not made for.

        Raises:
            SpecError: it reads images of another shape.
        """

    @abstractmethod
    def __call__(self, images: Images) -> Extracted:
        """Features of images, and the class that the network gives to each, if it tells classes apart."""

    @property
    def identity(self) -> str:
        """Name and hash: numbers of two extractors are not to be compared."""
        return f"{self.name} sha256:{self.digest[:16]}"


class ClassifierFeatures(FeatureExtractor):
    """A reference classifier that Monge trained and registered.

    Args:
        name: of the registered model, with its version.
        bundle: the classifier.

    Raises:
        SpecError: it is a generator.
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
    """A network that others trained on ImageNet: any image will do, grey or in colour, of any size.

    Attributes:
        name: of :data:`pipelines.spec.ImageNetName`.
        network: with its weights.
        digest: sha256 of the file that they came in.
    """

    name: str
    network: ImageNetNetwork
    digest: str
    classes: int = 0

    def require(self, image: ImageShape) -> None:
        """See :meth:`FeatureExtractor.require`; no image is refused."""

    @torch.inference_mode()
    def __call__(self, images: Images) -> Extracted:
        """See :meth:`FeatureExtractor.__call__`."""
        device = next(self.network.parameters()).device
        batches = torch.as_tensor(images).split(LARGE_BATCH)
        return torch.cat([self.network.embed(self.network.prepare(b.to(device))).cpu() for b in batches]), None
