"""Features of images from frozen networks, for transport costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from pipelines.data.loader import Split
from pipelines.distributed import gather_parts, gather_rows
from pipelines.errors import SpecError
from pipelines.models.bundle import to_float
from pipelines.models.imagenet import ImageNetNetwork
from pipelines.models.network import Classifier, Encoder, Network
from pipelines.shape import ImageShape
from pipelines.spec import FeatureSpec
from pipelines.transport.precision import wide

FITTED = 4096
"""Largest number of training images, evenly spaced, from which the scales of features are computed."""

BLOCK = 256
"""Number of images embedded at once."""

LARGEST_POINT = 2**16
"""Largest dimension of a point."""

FITTED_NUMBERS = 2**26
"""Largest total number of values used to scale features; for large points, fewer images are used."""

KEPT_BYTES = 2**30
"""Largest memory, in bytes, in which the features of all training images are kept."""

Images = Float[Tensor, "k c h w"]
Points = Float[Tensor, "k d"]


class FeatureMap:
    """Maps images to points between which a transport cost is computed: (k, c, h, w) in [−1, 1] → (k, d).

    The features of several layers are concatenated. Each layer is scaled so that the mean squared distance between two
    training images is 1, and multiplied by its weight. The mean cost between two real images is therefore 1 for any
    choice of layers, and an epsilon has the same meaning for all of them.

    Args:
        specs: layers and their weights.
        networks: networks by the names in the specs; the map freezes them.
        train: training split, from which the scales are computed.
        image: shape of the images.
        device: device of networks and images.
        components: number of principal components that :meth:`reduced` keeps; None keeps all dimensions.

    Raises:
        SpecError: a network does not support such images, or has no such layer.
    """

    def __init__(
        self,
        specs: Sequence[FeatureSpec],
        networks: Mapping[str, Network],
        train: Split,
        image: ImageShape,
        device: torch.device,
        components: int | None = None,
    ) -> None:
        self.specs = specs
        self.networks = {name: network.to(device).eval().requires_grad_(False) for name, network in networks.items()}
        for place, spec in enumerate(specs):
            _require(f"objective.features.{place}", spec, self.networks.get(spec.network), image)
        self._device = device
        total = sum(spec.weight for spec in specs)
        factors, fitted = [], []
        width = self._width(image)
        count = min(len(train), FITTED, max(BLOCK, FITTED_NUMBERS // width))
        chosen = np.linspace(0, len(train) - 1, count).astype(np.int64)
        for spec, found in zip(specs, self._fitted(train, chosen), strict=True):
            # The mean squared distance of two points is twice the variance.
            apart = 2 * (found - found.mean(0)).square().sum(1).mean()
            factors.append((spec.weight / total / apart.clamp_min(1e-12)).sqrt())
            fitted.append(factors[-1] * found)
        self._factors = factors
        self._components = _principal(torch.cat(fitted, 1), components)

    def __call__(self, images: Images) -> Points:
        """Points of images, differentiable with respect to the images."""
        return torch.cat([factor * one for factor, one in zip(self._factors, self._layers(images), strict=True)], 1)

    def reduced(self, points: Points) -> Float[Tensor, "k e"]:
        """Project points to their principal components: distances are nearly the same, and plans are much cheaper."""
        return points if self._components is None else points @ self._components.to(points.dtype)

    @torch.no_grad()
    def _width(self, image: ImageShape) -> int:
        layers = [layer.shape[1] for layer in self._layers(torch.zeros(1, *image.dims, device=self._device))]
        if sum(layers) > LARGEST_POINT:
            largest = layers.index(max(layers))
            raise SpecError(
                f"objective.features.{largest}: {layers[largest]} numbers for an image, over the limit of "
                f"{LARGEST_POINT} for all features together",
                hint="average-pool its feature maps: set a smaller side, for example 7",
            )
        return sum(layers)

    @torch.no_grad()
    def _fitted(self, train: Split, chosen: np.ndarray) -> list[Points]:
        def make(part: slice) -> list[Points]:
            found = [self._layers(images) for images in _blocks(train, chosen[part], self._device)]
            return [torch.cat(layer) for layer in zip(*found, strict=True)]

        return gather_parts(len(chosen), BLOCK, make)

    def _layers(self, images: Images) -> list[Points]:
        """Unscaled features of each spec."""
        known: dict[str, list[Tensor]] = {"pixels": [images]}
        found = []
        for spec in self.specs:
            if spec.network not in known:
                known[spec.network] = _maps(self.networks[spec.network], images)
            layers = known[spec.network]
            layer = layers[-1 if spec.layer is None else spec.layer - 1]
            if spec.side is not None:
                layer = F.adaptive_avg_pool2d(layer, spec.side)
            found.append(wide(layer.flatten(1)))
        return found


class RealPoints:
    """Points of training images, full and :meth:`~FeatureMap.reduced`; cached if they fit in :data:`KEPT_BYTES`.

    Args:
        features: map from images to points.
        train: training split.
        device: device of the points.
    """

    def __init__(self, features: FeatureMap, train: Split, device: torch.device) -> None:
        self._features, self._train, self._device = features, train, device
        self._kept: Tensor | None = None
        self._reduced: Tensor | None = None
        first = self._embedded(np.zeros(1, np.int64))
        if (2 * first.shape[1] + 4 * features.reduced(first).shape[1]) * len(train) <= KEPT_BYTES:
            self._kept, *reduced = gather_parts(len(train), BLOCK, self._all)
            self._reduced = reduced[0] if reduced else None

    def take(self, indices: Tensor) -> tuple[Points, Float[Tensor, "k e"]]:
        """Full and reduced points of these images of the training split, (k,) → (k, d) and (k, e)."""
        if self._kept is None:
            points = self._embedded(indices.cpu().numpy())
            return points, self._features.reduced(points)
        places = indices.to(self._kept.device)
        points = self._kept[places].float()
        return points, points if self._reduced is None else self._reduced[places]

    def labels(self, indices: Tensor) -> Tensor:
        """Labels of these images, (k,) int64."""
        return torch.from_numpy(self._train.labels[indices.cpu().numpy()]).to(self._device)

    def __len__(self) -> int:
        return len(self._train)

    @torch.no_grad()
    def _embedded(self, indices: np.ndarray) -> Points:
        return torch.cat([self._features(images) for images in _blocks(self._train, indices, self._device)])

    @torch.no_grad()
    def _all(self, part: slice) -> list[Tensor]:
        kept: list[list[Tensor]] = []
        for images in _blocks(self._train, np.arange(part.start, part.stop), self._device):
            points = self._features(images)
            reduced = self._features.reduced(points)
            kept.append([points.half()] if reduced is points else [points.half(), reduced])
        return [torch.cat(rows) for rows in zip(*kept, strict=True)]


def _blocks(train: Split, indices: np.ndarray, device: torch.device) -> Iterator[Tensor]:
    """Yield these images of the training split in blocks, (k, c, h, w) in [−1, 1]."""
    for start in range(0, len(indices), BLOCK):
        yield to_float(train.take(indices[start : start + BLOCK])[0].to(device))


def _principal(points: Points, count: int | None) -> Float[Tensor, "d e"] | None:
    """Principal directions of points; None if all dimensions are kept."""
    if count is None or count >= min(points.shape):
        return None
    with torch.random.fork_rng([points.device] if points.is_cuda else []):
        torch.manual_seed(0)
        found = torch.pca_lowrank(points, q=count, niter=2)[2].contiguous()
    # All ranks use those of rank 0: another kind of processor may give a rotated basis.
    return gather_rows(found)[: len(found)]


def _maps(network: Network, images: Images) -> list[Tensor]:
    match network:
        case Encoder():
            return network.maps(images)
        case Classifier():
            return [network.embed(images)]
        case ImageNetNetwork():
            return [network.embed(network.prepare((images + 1) * 127.5))]
    raise TypeError(f"a {type(network).__name__} gives no features")


def _require(field: str, spec: FeatureSpec, network: Network | None, image: ImageShape) -> None:
    if spec.network == "pixels":
        return
    if isinstance(network, Encoder | Classifier) and network.image != image:
        raise SpecError(
            f"{field}: {spec.network} reads images of {network.image.dims}, received ones of {image.dims}",
            hint="train it on the same data, with the same size and channels",
        )
    if network is None:
        raise TypeError(f"{field}: the network {spec.network} was not given")
    if not isinstance(network, Encoder | Classifier | ImageNetNetwork):
        raise SpecError(f"{field}: {spec.network} is a generator", hint="use an auto-encoder or a classifier")
    layers = network.layers if isinstance(network, Encoder) else 1
    if spec.layer is not None and spec.layer > layers:
        raise SpecError(f"{field}: layer {spec.layer} of {spec.network}, which has {layers}", hint=f"1 to {layers}")
    if spec.side is not None and spec.layer == layers:
        raise SpecError(f"{field}: layer {spec.layer} of {spec.network} is not a feature map", hint="remove side")
