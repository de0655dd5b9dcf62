"""Trained networks on disk, and inference with them."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from scipy import stats

from pipelines.errors import CheckpointError
from pipelines.models.build import build_model
from pipelines.models.bundle import CARD, WEIGHTS, Bundle, to_float, to_uint8, truncated
from pipelines.models.network import Encoder, Generator
from pipelines.shape import ImageShape
from pipelines.spec import ModelSpec

IMAGE = ImageShape(1, 12, 14)
CLASSES = ("ant", "bee", "fly")
SPECS: list[dict[str, Any]] = [
    {"kind": "perceptron"},
    {"kind": "mlp", "hidden": [5, 4], "dropout": 0.5},
    {"kind": "lenet"},
    {"kind": "autoencoder", "width": 4, "code": 6},
    {"kind": "conv-generator", "latent": 5, "width": 4},
    {"kind": "flow-unet", "width": 8, "steps": 2},
    {"kind": "conv-generator", "latent": 5, "width": 4, "conditional": True},
    {"kind": "biggan", "latent": 8, "width": 4},
]


def bundle(**document: Any) -> Bundle:
    torch.manual_seed(0)
    spec: ModelSpec = TypeAdapter(ModelSpec).validate_python(document)
    network = build_model(spec, IMAGE, len(CLASSES))
    for parameter in network.parameters():
        # Some layers start at zero, where any two networks agree.
        torch.nn.init.normal_(parameter, std=0.2)
    return Bundle(network.eval(), spec, IMAGE, CLASSES)


@pytest.mark.parametrize("document", SPECS, ids=lambda document: document["kind"])
def test_what_is_saved_is_loaded(tmp_path: Path, document: dict[str, Any]) -> None:
    saved = bundle(**document)
    folder = saved.save(tmp_path / "deep" / "folder")
    assert sorted(os.listdir(folder)) == [CARD, WEIGHTS]
    loaded = Bundle.load(folder)
    assert (loaded.spec, loaded.image, loaded.classes) == (saved.spec, saved.image, saved.classes)
    assert not loaded.network.training
    weights = saved.network.state_dict()
    assert loaded.network.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.network.state_dict().items())
    if isinstance(saved.network, Generator):
        assert np.array_equal(loaded.generate(3, seed=1), saved.generate(3, seed=1))
    elif isinstance(saved.network, Encoder):
        images = np.random.default_rng(0).integers(0, 256, (4, *IMAGE.dims), dtype=np.uint8)
        assert loaded.embed(images).shape == (4, 6)
        assert np.array_equal(loaded.embed(images), saved.embed(images))
    else:
        images = np.random.default_rng(0).integers(0, 256, (4, *IMAGE.dims), dtype=np.uint8)
        assert np.array_equal(loaded.predict(images), saved.predict(images))


def test_predictions_are_probabilities() -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, *IMAGE.dims), dtype=np.uint8)
    saved = bundle(kind="perceptron")
    probabilities = saved.predict(images)
    assert probabilities.shape == (4, 3)
    assert probabilities.dtype == np.float32
    weights, bias = (parameter.detach().numpy() for parameter in saved.network.parameters())
    logits = (images.reshape(4, -1) / 127.5 - 1) @ weights.T + bias
    odds = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(probabilities, odds / odds.sum(1, keepdims=True), rtol=1e-3, atol=1e-6)


def test_images_need_not_be_contiguous_nor_writable() -> None:
    saved = bundle(kind="perceptron")
    images = np.random.default_rng(0).integers(0, 256, (4, *IMAGE.dims), dtype=np.uint8)
    expected = saved.predict(images)
    assert np.array_equal(saved.predict(np.asfortranarray(images)), expected)
    assert np.array_equal(saved.predict(images[::-1]), expected[::-1])
    images.flags.writeable = False
    assert np.array_equal(saved.predict(images), expected)


@pytest.mark.parametrize("document", SPECS[4:], ids=lambda document: document["kind"])
def test_the_same_seed_gives_the_same_samples(document: dict[str, Any]) -> None:
    made = bundle(**document)
    torch.manual_seed(1)
    first = made.generate(4, seed=5)
    torch.manual_seed(2)
    assert first.shape == (4, *IMAGE.dims)
    assert first.dtype == np.uint8
    assert np.array_equal(first, made.generate(4, seed=5))
    assert not np.array_equal(first, made.generate(4, seed=6))
    assert len({image.tobytes() for image in first}) == 4


def test_a_path_leads_from_one_class_to_the_other() -> None:
    made = bundle(kind="flow-unet", width=8, steps=2, conditional=True)
    for parameter in made.network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    path = made.path(1, 0, steps=5, rows=2, seed=4).reshape(2, 5, *IMAGE.dims)
    assert np.array_equal(path[:, 0], made.generate(2, 4, label=1))
    assert np.array_equal(path[:, -1], made.generate(2, 4, label=0))
    assert len({image.tobytes() for image in path[0]}) == 5
    in_turn = made.generate(2, 4)
    assert np.array_equal(in_turn, np.stack([path[0, -1], path[1, 0]]))


def test_calls_of_the_other_kind_are_refused() -> None:
    for call in (lambda made: made.generate(1, 0, label=0), lambda made: made.path(0, 1, 2, 1, 0)):
        with pytest.raises(TypeError, match="not conditional"):
            call(bundle(**SPECS[4]))
    with pytest.raises(TypeError, match="a classifier cannot generate samples"):
        bundle(kind="perceptron").generate(1, seed=0)
    with pytest.raises(TypeError, match="a classifier cannot encode images"):
        bundle(kind="perceptron").embed(np.zeros((1, *IMAGE.dims), np.uint8))
    with pytest.raises(TypeError, match="an auto-encoder cannot generate samples"):
        bundle(**SPECS[3]).generate(1, seed=0)
    with pytest.raises(TypeError, match="a generator cannot predict classes"):
        bundle(**SPECS[4]).predict(np.zeros((1, *IMAGE.dims), np.uint8))


def test_pixels_survive_the_way_to_floats_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    floats = to_float(pixels)
    assert (float(floats[0]), float(floats[-1])) == (-1.0, 1.0)
    assert torch.equal(to_uint8(floats), pixels)
    assert to_uint8(torch.tensor([-7.0, -1.0, 0.004, 1.0, 7.0])).tolist() == [0, 0, 128, 255, 255]
    assert pixels.tolist() == list(range(256))


def rewrite_card(folder: Path, **changes: Any) -> None:
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps(card | changes))


def put_weights(folder: Path, blob: bytes) -> None:
    """Write other weights with a matching hash."""
    (folder / WEIGHTS).write_bytes(blob)
    rewrite_card(folder, sha256=hashlib.sha256(blob).hexdigest())


def flip_a_bit(folder: Path) -> None:
    blob = bytearray((folder / WEIGHTS).read_bytes())
    blob[-1] ^= 1
    (folder / WEIGHTS).write_bytes(blob)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "no card": lambda folder: (folder / CARD).unlink(),
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "one bit of the weights": flip_a_bit,
    "weights cut short": lambda folder: os.truncate(folder / WEIGHTS, 100),
    "weights cut short with their hash": lambda folder: put_weights(folder, (folder / WEIGHTS).read_bytes()[:100]),
    "no weights at all with their hash": lambda folder: put_weights(folder, b""),
    "card cut short": lambda folder: os.truncate(folder / CARD, 20),
    "card that is no text": lambda folder: (folder / CARD).write_bytes(b"\xff\xfe"),
    "card that is a list": lambda folder: (folder / CARD).write_text("[]"),
    "card without a hash": lambda folder: rewrite_card(folder, sha256=None),
    "card of no model": lambda folder: rewrite_card(folder, model={"kind": "resnet"}),
    "card of another model": lambda folder: rewrite_card(folder, model={"kind": "perceptron"}),
    "card of other sizes": lambda folder: rewrite_card(folder, model={"kind": "mlp", "hidden": [5, 3]}),
    "card of other classes": lambda folder: rewrite_card(folder, classes=["ant", "bee"]),
    "card of another image": lambda folder: rewrite_card(folder, image={"channels": 1, "height": 12, "width": 15}),
    "card of no image": lambda folder: rewrite_card(folder, image={"channels": 1, "height": -12, "width": 14}),
    "card of an image in words": lambda folder: rewrite_card(
        folder, image={"channels": 1, "height": "a", "width": 14}
    ),
    "card of an image over all numbers": lambda folder: rewrite_card(
        folder, model=SPECS[4], image={"channels": 1, "height": 10**400, "width": 14}
    ),
    "card of a network that is too small for its images": lambda folder: rewrite_card(
        folder, model={"kind": "lenet"}, image={"channels": 1, "height": 4, "width": 4}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_bundle_is_refused(tmp_path: Path, name: str) -> None:
    folder = bundle(kind="mlp", hidden=[5, 4]).save(tmp_path)
    Bundle.load(folder)
    DAMAGE[name](folder)
    with pytest.raises(CheckpointError, match="not a model bundle"):
        Bundle.load(folder)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    folder = bundle(kind="perceptron").save(tmp_path / "bundle")
    struck = tmp_path / "struck"
    for blob in (pickle.dumps(Bomb(struck)), pickle.dumps({"layers.1.weight": Bomb(struck)})):
        put_weights(folder, blob)
        with pytest.raises(CheckpointError):
            Bundle.load(folder)
    torch.save({"layers.1.weight": Bomb(struck)}, folder / WEIGHTS)
    put_weights(folder, (folder / WEIGHTS).read_bytes())
    with pytest.raises(CheckpointError):
        Bundle.load(folder)
    assert not struck.exists()
    pickle.loads(pickle.dumps(Bomb(struck)))
    assert struck.exists(), "the bomb was none"


@pytest.mark.parametrize("most", [0.05, 0.7, 2.0, 50.0])
def test_truncated_latents_have_the_truncated_normal_law(most: float) -> None:
    latents = torch.randn(2000, 10, generator=torch.Generator().manual_seed(0))
    found = truncated(latents, most)
    assert found.dtype == latents.dtype
    assert float(found.abs().max()) <= most
    assert bool((found.flatten()[latents.flatten().argsort()].diff() >= 0).all())
    law = stats.truncnorm(-most, most)
    assert stats.kstest(found.flatten().double().numpy(), law.cdf).pvalue > 1e-3
    if most == 50.0:
        torch.testing.assert_close(found, latents, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("document", SPECS[4:], ids=lambda document: document["kind"])
def test_truncated_samples_are_more_alike(document: dict[str, Any]) -> None:
    made = bundle(**document)
    label = 0 if made.network.conditions else None  # type: ignore[union-attr]
    spreads = [made.generate(16, 5, label, most).astype(float).std(0).mean() for most in (None, 1e-3)]
    assert spreads[1] < 0.1 * spreads[0]
    if made.network.conditions:  # type: ignore[union-attr]
        assert not np.array_equal(made.path(0, 1, 3, 1, 0), made.path(0, 1, 3, 1, 0, 0.5))
