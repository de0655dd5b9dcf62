"""A trained network on disk: weights as safetensors beside a small JSON card; nothing that executes on loading."""

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
    """A network with what is needed to call it.

    Attributes:
        network: the network, in evaluation mode.
        spec: which network it is.
        image: shape of the images it reads or makes.
        classes: the names of the classes, in the order of its outputs.
    """

    network: Classifier | Encoder | Generator
    spec: ModelSpec
    image: ImageShape
    classes: tuple[str, ...]

    def save(self, folder: str | Path) -> Path:
        """Write weights and card into a folder, which is made if need be."""
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
        """What the network does."""
        match self.network:
            case Classifier():
                return "classifier"
            case Encoder():
                return "encoder"
        return "generator"

    def digest(self) -> str:
        """sha256 of the weights as :meth:`save` writes them."""
        return hashlib.sha256(self._blob()).hexdigest()

    def _blob(self) -> bytes:
        return save({name: tensor.detach().cpu().contiguous() for name, tensor in self.network.state_dict().items()})

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> Bundle:
        """Read a bundle.

        Raises:
            CheckpointError: a file is missing or damaged, or the weights are of another network.
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
        """Class probabilities.

        Args:
            images: (b, c, h, w) uint8.

        Returns:
            (b, classes) float32, rows summing to 1.

        Raises:
            TypeError: the bundle holds no classifier.
        """
        if not isinstance(self.network, Classifier):
            raise TypeError(f"{_A[self.kind]} has no classes to predict")
        pixels = torch.from_numpy(np.require(images, requirements=("C", "W"))).to(self._device)
        return self.network(to_float(pixels)).softmax(1).cpu().numpy()

    @torch.inference_mode()
    def embed(self, images: UInt8[np.ndarray, "b c h w"]) -> Float32[np.ndarray, "b code"]:
        """Codes of images.

        Args:
            images: (b, c, h, w) uint8.

        Returns:
            (b, code) float32.

        Raises:
            TypeError: the bundle holds no encoder.
        """
        if not isinstance(self.network, Encoder):
            raise TypeError(f"{_A[self.kind]} has no codes of images")
        pixels = torch.from_numpy(np.require(images, requirements=("C", "W"))).to(self._device)
        return self.network.embed(to_float(pixels)).cpu().numpy()

    @torch.inference_mode()
    def generate(
        self, count: int, seed: int, label: int | None = None, truncation: float | None = None
    ) -> UInt8[np.ndarray, "{count} c h w"]:
        """Samples; the same seed gives the same samples.

        Args:
            count: how many.
            seed: of the latent vectors.
            label: the class that a conditional generator is asked for; one after the other by default.
            truncation: see :func:`truncated`; None leaves the latent vectors as they are.

        Returns:
            (count, c, h, w) uint8.

        Raises:
            TypeError: the bundle holds no generator, or one that no class can be asked of.
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
        """Images on the way from one class to another: the latent vector stays, the condition moves in even steps.

        The paths of Brock, Donahue & Simonyan (2019, fig. 8 and 9), and the article's figure 2.3.

        Args:
            start, end: labels.
            steps: images on each path, both ends included, ≥ 2.
            rows: paths, each of a latent vector of its own.
            seed: of the latent vectors.
            truncation: see :func:`truncated`; None leaves the latent vectors as they are.

        Returns:
            (rows · steps, c, h, w) uint8, path after path.

        Raises:
            TypeError: the bundle holds no generator of which a class can be asked.
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
            raise TypeError(f"{_A[self.kind]} has no samples to generate")
        if conditional and not self.network.conditions:
            raise TypeError("no class can be asked of this generator: its model is not conditional")
        return self.network

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device


def truncated(latents: Float[torch.Tensor, "b latent"], most: float) -> Float[torch.Tensor, "b latent"]:
    """Standard normal numbers moved into [−most, most], where they have the truncated normal law.

    The truncation trick of Brock, Donahue & Simonyan (2019, section 3.1): the lower the threshold, the more typical the
    samples, and the less they differ. Numbers keep their ranks, so that one seed shows the same samples, nearer and
    nearer to the mean.

    Args:
        latents: (b, latent), standard normal.
        most: > 0.
    """
    least, greatest = (torch.special.ndtr(torch.tensor(side, dtype=torch.float64)) for side in (-most, most))
    ranks = torch.special.ndtr(latents.double())
    return torch.special.ndtri(least + ranks * (greatest - least)).clamp(-most, most).to(latents.dtype)


def _latents(count: int, width: int, seed: int, truncation: float | None) -> Float32[torch.Tensor, "b latent"]:
    latents = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return latents if truncation is None else truncated(latents, truncation)


def to_float(pixels: UInt8[torch.Tensor, "*shape"]) -> Float32[torch.Tensor, "*shape"]:
    """uint8 pixels 0…255 as float32 in [−1, 1], the range in which networks see images."""
    return pixels.float().div_(127.5).sub_(1)


def to_uint8(pixels: Float[torch.Tensor, "*shape"]) -> UInt8[torch.Tensor, "*shape"]:
    """Floats in [−1, 1] as uint8 pixels, rounded."""
    return pixels.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
