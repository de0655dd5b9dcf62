"""Storage of trained networks: weights as safetensors and a JSON card; loading executes no code."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from pipelines.errors import CheckpointError, SpecError
from pipelines.models.build import build_model
from pipelines.models.network import Classifier, Encoder, Generator
from pipelines.shape import ImageShape
from pipelines.spec import ModelSpec

WEIGHTS = "weights.safetensors"
CARD = "model.json"

_A = {"classifier": "a classifier", "encoder": "an auto-encoder", "generator": "a generator"}
_MODEL_SPEC: TypeAdapter[ModelSpec] = TypeAdapter(ModelSpec)


@dataclass(frozen=True, eq=False)
class Bundle:
    """A trained network with its spec, image shape and classes.

    Attributes:
        network: network in evaluation mode.
        spec: spec of the network.
        image: shape of its input or output images.
        classes: names of the classes, in the order of its outputs.
    """

    network: Classifier | Encoder | Generator
    spec: ModelSpec
    image: ImageShape
    classes: tuple[str, ...]

    def save(self, folder: str | Path) -> Path:
        """Write weights and card into a folder, which is created if it does not exist."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        blob = self._blob()
        (folder / WEIGHTS).write_bytes(blob)
        card = {
            "model": self.spec.model_dump(mode="json"),
            "image": asdict(self.image),
            "classes": self.classes,
            "sha256": hashlib.sha256(blob).hexdigest(),
        }
        (folder / CARD).write_text(json.dumps(card, indent=2) + "\n")
        return folder

    @property
    def kind(self) -> Literal["classifier", "encoder", "generator"]:
        """Kind of the network."""
        match self.network:
            case Classifier():
                return "classifier"
            case Encoder():
                return "encoder"
        return "generator"

    def digest(self) -> str:
        """sha256 of the file of weights that :meth:`save` writes."""
        return hashlib.sha256(self._blob()).hexdigest()

    def _blob(self) -> bytes:
        return save({name: tensor.detach().cpu().contiguous() for name, tensor in self.network.state_dict().items()})

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> Bundle:
        """Read a bundle.

        Raises:
            CheckpointError: a file is missing or damaged, or the weights do not fit the network.
        """
        folder = Path(folder)
        try:
            card = json.loads((folder / CARD).read_text())
            spec = _MODEL_SPEC.validate_python(card["model"])
            image = ImageShape(**card["image"])
            classes = tuple(str(name) for name in card["classes"])
            blob = (folder / WEIGHTS).read_bytes()
            if hashlib.sha256(blob).hexdigest() != card["sha256"]:
                raise ValueError("the weights do not match the card's hash")
            network = build_model(spec, image, len(classes))
            network.load_state_dict(load(blob))
        except (
            OSError,
            SpecError,
            ArithmeticError,
            ValueError,
            KeyError,
            TypeError,
            RuntimeError,
            SafetensorError,
            ValidationError,
        ) as error:
            raise CheckpointError(f"{folder}: not a model bundle: {error}") from error
        return cls(network.to(device).eval(), spec, image, classes)

    @torch.inference_mode()
    def predict(self, images: UInt8[np.ndarray, "b c h w"]) -> Float32[np.ndarray, "b classes"]:
        """Predict class probabilities.

        Args:
            images: images, (b, c, h, w) uint8.

        Returns:
            Probabilities, (b, classes) float32, whose rows sum to 1.

        Raises:
            TypeError: the network is not a classifier.
        """
        if not isinstance(self.network, Classifier):
            raise TypeError(f"{_A[self.kind]} cannot predict classes")
        pixels = torch.from_numpy(np.require(images, requirements=("C", "W"))).to(self._device)
        return self.network(to_float(pixels)).softmax(1).cpu().numpy()

    @torch.inference_mode()
    def embed(self, images: UInt8[np.ndarray, "b c h w"]) -> Float32[np.ndarray, "b code"]:
        """Encode images.

        Args:
            images: images, (b, c, h, w) uint8.

        Returns:
            Codes, (b, code) float32.

        Raises:
            TypeError: the network is not an encoder.
        """
        if not isinstance(self.network, Encoder):
            raise TypeError(f"{_A[self.kind]} cannot encode images")
        pixels = torch.from_numpy(np.require(images, requirements=("C", "W"))).to(self._device)
        return self.network.embed(to_float(pixels)).cpu().numpy()

    @torch.inference_mode()
    def generate(
        self, count: int, seed: int, label: int | None = None, truncation: float | None = None
    ) -> UInt8[np.ndarray, "{count} c h w"]:
        """Generate samples; the same seed gives the same samples.

        Args:
            count: number of samples.
            seed: seed of the latent vectors.
            label: class of the samples of a conditional generator; by default they cycle through the classes.
            truncation: threshold of :func:`truncated`; None: no truncation.

        Returns:
            Samples, (count, c, h, w) uint8.

        Raises:
            TypeError: the network is not a generator, or ``label`` is given and the generator is not conditional.
        """
        network = self._generator(conditional=label is not None)
        latents = _latents(count, network.latent, seed, truncation)
        conditions = network.in_turn(count, self._device)
        if label is not None:
            conditions = network.asked(torch.full((count,), label, device=self._device))
        return to_uint8(network(latents.to(self._device), conditions)).cpu().numpy()

    @torch.inference_mode()
    def path(
        self, start: int, end: int, steps: int, rows: int, seed: int, truncation: float | None = None
    ) -> UInt8[np.ndarray, "{rows}*{steps} c h w"]:
        """Generate paths from one class to another: the condition is interpolated linearly at a fixed latent vector.

        See Brock, Donahue & Simonyan (2019, fig. 8 and 9) and figure 2.3 of the article.

        Args:
            start, end: labels of the classes.
            steps: number of images on each path including both ends, ≥ 2.
            rows: number of paths, each with its own latent vector.
            seed: seed of the latent vectors.
            truncation: threshold of :func:`truncated`; None: no truncation.

        Returns:
            Images, (rows · steps, c, h, w) uint8, path by path.

        Raises:
            TypeError: the network is not a conditional generator.
        """
        network = self._generator(conditional=True)
        latents = _latents(rows, network.latent, seed, truncation)
        ends = network.asked(torch.tensor([start, end], device=self._device))
        assert ends is not None
        weights = torch.linspace(0, 1, steps, device=self._device)[:, None]
        conditions = torch.lerp(ends[:1], ends[1:], weights).repeat(rows, 1)
        return to_uint8(network(latents.repeat_interleave(steps, 0).to(self._device), conditions)).cpu().numpy()

    def _generator(self, conditional: bool) -> Generator:
        if not isinstance(self.network, Generator):
            raise TypeError(f"{_A[self.kind]} cannot generate samples")
        if conditional and not self.network.conditions:
            raise TypeError("this generator cannot generate a given class: its model is not conditional")
        return self.network

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device


def truncated(latents: Float[torch.Tensor, "b latent"], most: float) -> Float[torch.Tensor, "b latent"]:
    """Map standard normal numbers monotonically to the normal distribution truncated to [−most, most].

    The truncation trick of Brock, Donahue & Simonyan (2019, section 3.1): the lower the threshold, the more typical and
    the less varied the samples. The map preserves the order of the numbers, so for a fixed seed a lower threshold moves
    the same samples towards the mean.

    Args:
        latents: standard normal latent vectors, (b, latent).
        most: threshold, > 0.
    """
    least, greatest = (torch.special.ndtr(torch.tensor(side, dtype=torch.float64)) for side in (-most, most))
    ranks = torch.special.ndtr(latents.double())
    return torch.special.ndtri(least + ranks * (greatest - least)).clamp(-most, most).to(latents.dtype)


def _latents(count: int, width: int, seed: int, truncation: float | None) -> Float32[torch.Tensor, "b latent"]:
    latents = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return latents if truncation is None else truncated(latents, truncation)


def to_float(pixels: UInt8[torch.Tensor, "*shape"]) -> Float32[torch.Tensor, "*shape"]:
    """Convert uint8 pixels 0…255 to float32 in [−1, 1], the range of images in networks."""
    return pixels.float().div_(127.5).sub_(1)


def to_uint8(pixels: Float[torch.Tensor, "*shape"]) -> UInt8[torch.Tensor, "*shape"]:
    """Convert floats in [−1, 1] to uint8 pixels with rounding."""
    return pixels.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
