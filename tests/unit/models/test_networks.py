"""Shapes and parameter counts of the networks."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError
from pydantic import TypeAdapter
from torch import nn

from pipelines.errors import SpecError
from pipelines.models.build import build_model
from pipelines.models.network import Classifier, Generator
from pipelines.models.upsampling import FilteredConvTranspose, upsampled
from pipelines.shape import ImageShape
from pipelines.spec import ModelSpec

GREY = ImageShape(1, 28, 28)
COLOUR = ImageShape(3, 12, 20)


def big_gan_count(classes: int) -> int:
    """Parameter count for 12 latents in parts of 4 and 28×28 grey pixels: 7×7 in 16 channels, then 8, then 4."""

    def block(i: int, o: int) -> int:
        told = (32 + 4) * 2 * (i + o)
        return told + (i * o * 9 + o) + (o * o * 9 + o) + (i * o + o)

    return 32 * classes + (4 * 16 * 49 + 16 * 49) + block(16, 8) + block(8, 4) + 2 * 4 + (4 * 9 + 1)


def build(image: ImageShape = GREY, classes: int = 2, **spec: object) -> Classifier | Generator:
    torch.manual_seed(0)
    model: ModelSpec = TypeAdapter(ModelSpec).validate_python(spec)
    return build_model(model, image, classes)


def inputs_of(network: Classifier | Generator, count: int) -> list[torch.Tensor | None]:
    if isinstance(network, Generator):
        return [torch.randn(count, network.latent), network.in_turn(count, torch.device("cpu"))]
    return [torch.randn(count, *GREY.dims)]


CLASSIFIERS = [
    {"kind": "perceptron"},
    {"kind": "mlp", "hidden": [5, 6]},
    {"kind": "lenet"},
    {"kind": "alexnet", "hidden": 8},
    {"kind": "resnet", "depth": 10, "width": 4},
    {"kind": "resnet", "depth": 50, "width": 2},
]
WITH_DROPOUT = [spec for spec in CLASSIFIERS if spec["kind"] in ("mlp", "lenet", "alexnet")]
GENERATORS = [
    {"kind": "conv-generator", "latent": 5, "width": 4},
    {"kind": "conv-generator", "latent": 5, "width": 4, "upsampling": "transposed", "normalisation": "batch"},
    {"kind": "conv-generator", "latent": 5, "width": 4, "upsampling": "filtered"},
    {"kind": "flow-unet", "width": 8, "steps": 2},
    {"kind": "conv-generator", "latent": 5, "width": 4, "conditional": True},
    {"kind": "biggan", "latent": 8, "width": 4},
]


@pytest.mark.parametrize("image", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize("spec", CLASSIFIERS, ids=lambda spec: spec["kind"])
@pytest.mark.parametrize("classes", [2, 10])
def test_a_classifier_gives_one_logit_for_each_class(spec: dict, image: ImageShape, classes: int) -> None:
    network = build(image, classes, **spec)
    assert isinstance(network, Classifier)
    assert (network.image, network.classes) == (image, classes)
    for batch in (1, 3):
        assert network(torch.zeros(batch, *image.dims)).shape == (batch, classes)


@pytest.mark.parametrize("dims", [(1, 28, 28), (3, 32, 32), (1, 9, 14), (3, 5, 4), (1, 4, 40)])
@pytest.mark.parametrize("spec", GENERATORS, ids=lambda spec: spec["kind"])
def test_a_generator_makes_images_of_any_size(spec: dict, dims: tuple[int, int, int]) -> None:
    network = build(ImageShape(*dims), **spec)
    assert isinstance(network, Generator)
    images = network(10 * torch.randn(3, network.latent), network.in_turn(3, torch.device("cpu"))).detach()
    assert images.shape == (3, *dims)
    assert float(images.abs().max()) <= 1


def lenet_count(channels: int, flat: int, classes: int) -> int:
    convolutions = (channels * 25 * 6 + 6) + (6 * 25 * 16 + 16)
    return convolutions + (flat * 120 + 120) + (120 * 84 + 84) + (84 * classes + classes)


def flow_count(width: int, folded: int) -> int:
    """Parameter count of a U-Net with two resolutions on 4·channels folded pixels, and 64 time features."""

    def conv(i: int, o: int, side: int = 3) -> int:
        return i * o * side**2 + o

    def block(i: int, o: int) -> int:
        by_time = 2 * width * 2 * o + 2 * o
        return 2 * i + conv(i, o) + by_time + conv(o, o) + (0 if i == o else conv(i, o, 1))

    wide = 2 * width
    time = (64 * wide + wide) + (wide * wide + wide)
    down = conv(folded, width) + 2 * block(width, width) + conv(width, wide) + 2 * block(wide, wide)
    up = conv(wide, width) + block(wide, width) + block(width, width) + 2 * width + conv(width, folded)
    return time + down + up


@pytest.mark.parametrize(
    ("spec", "image", "classes", "count"),
    [
        ({"kind": "perceptron"}, GREY, 2, 784 * 2 + 2),
        ({"kind": "perceptron"}, COLOUR, 10, 720 * 10 + 10),
        ({"kind": "mlp", "hidden": [256]}, GREY, 2, (784 * 256 + 256) + (256 * 2 + 2)),
        ({"kind": "mlp", "hidden": [5, 6]}, COLOUR, 3, (720 * 5 + 5) + (5 * 6 + 6) + (6 * 3 + 3)),
        # 28 → 14 → 10 → 5, and 12×20 → 6×10 → 2×6 → 1×3, in 16 channels.
        ({"kind": "lenet"}, GREY, 10, lenet_count(1, 16 * 5 * 5, 10)),
        ({"kind": "lenet"}, COLOUR, 2, lenet_count(3, 16 * 1 * 3, 2)),
        # Maps of 7×7 in 64 channels, doubled twice: 64 → 32 → 16; a scale and a shift for each normalised channel.
        (
            {"kind": "conv-generator", "latent": 64, "width": 16},
            GREY,
            2,
            (64 * 64 * 49 + 64 * 49 + 2 * 64)
            + (64 * 32 * 9 + 32 + 2 * 32)
            + (32 * 16 * 9 + 16 + 2 * 16)
            + (16 * 1 * 9 + 1),
        ),
        ({"kind": "biggan", "latent": 12, "width": 4}, GREY, 3, big_gan_count(3)),
        ({"kind": "flow-unet", "width": 16}, GREY, 2, flow_count(16, 4)),
        ({"kind": "flow-unet", "width": 8}, COLOUR, 2, flow_count(8, 12)),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else None,
)
def test_parameters_are_as_many_as_by_hand(spec: dict, image: ImageShape, classes: int, count: int) -> None:
    assert build(image, classes, **spec).parameter_count == count


def test_parameters_that_are_not_trained_are_not_counted() -> None:
    network = build(kind="mlp", hidden=[3])
    frozen = next(network.parameters()).requires_grad_(False)
    assert network.parameter_count == 784 * 3 + 3 + 3 * 2 + 2 - frozen.numel()


@pytest.mark.parametrize("dims", [(1, 11, 28), (1, 28, 11), (3, 4, 4)])
def test_lenet_refuses_images_that_vanish(dims: tuple[int, int, int]) -> None:
    with pytest.raises(
        SpecError, match=rf"lenet: images of {dims[1]}×{dims[2]} pixels are too small.*\n.*data.size to 12"
    ):
        build(ImageShape(*dims), kind="lenet")
    assert build(ImageShape(1, 12, 12), kind="lenet")(torch.zeros(1, 1, 12, 12)).shape == (1, 2)


def test_a_perceptron_is_linear_and_layers_of_it_are_not() -> None:
    u, v = torch.randn(2, 1, 1, 28, 28)
    for spec, linear in (({"kind": "perceptron"}, True), ({"kind": "mlp", "hidden": [8]}, False)):
        network = build(**spec).eval()
        middle = (network(u) + network(v)) / 2
        assert torch.allclose(network((u + v) / 2), middle, atol=1e-5) is linear


@pytest.mark.parametrize("spec", WITH_DROPOUT, ids=lambda spec: spec["kind"])
def test_dropout_is_of_training_alone(spec: dict) -> None:
    network = build(**spec | {"dropout": 0.5})
    images = torch.randn(4, *GREY.dims)
    assert not torch.equal(network(images), network(images))
    network.eval()
    assert torch.equal(network(images), network(images))
    assert {layer.p for layer in network.modules() if isinstance(layer, nn.Dropout)} == {0.5}


@pytest.mark.parametrize("spec", [*CLASSIFIERS, *GENERATORS], ids=lambda spec: spec["kind"])
def test_an_output_does_not_depend_on_those_beside_it(spec: dict) -> None:
    network = build(**spec).eval()
    inputs = inputs_of(network, 3)
    alone = [values if values is None else values[1:2] for values in inputs]
    torch.testing.assert_close(network(*inputs)[1:2], network(*alone))


@pytest.mark.parametrize("spec", [*CLASSIFIERS, GENERATORS[0], GENERATORS[-1]], ids=lambda spec: spec["kind"])
def test_every_parameter_has_a_gradient(spec: dict) -> None:
    network = build(**spec)
    network(*inputs_of(network, 8)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert math.isfinite(float(parameter.grad.abs().sum())), name
        assert float(parameter.grad.abs().sum()) > 0, name


def test_images_of_another_shape_are_refused() -> None:
    """Shapes are checked in tests; without the check, a perceptron accepts any image with the same number of pixels."""
    with pytest.raises(TypeCheckError, match="image"):
        build(kind="perceptron")(torch.zeros(2, 1, 14, 56))


@pytest.mark.parametrize(
    ("spec", "side", "count"),
    [
        ({"kind": "alexnet"}, 227, 61_100_840),
        ({"kind": "alexnet"}, 224, 61_100_840),
        ({"kind": "resnet", "depth": 18}, 224, 11_689_512),
        ({"kind": "resnet", "depth": 34}, 224, 21_797_672),
        ({"kind": "resnet", "depth": 50}, 224, 25_557_032),
    ],
)
def test_published_counts_of_parameters(spec: dict, side: int, count: int) -> None:
    assert build(ImageShape(3, side, side), 1000, **spec).parameter_count == count


@pytest.mark.parametrize("spec", [{"kind": "alexnet"}, {"kind": "resnet", "depth": 18}], ids=lambda spec: spec["kind"])
def test_a_step_at_full_size(spec: dict) -> None:
    network = build(ImageShape(3, 227, 227), 1000, **spec)
    loss = nn.functional.cross_entropy(network(torch.randn(2, 3, 227, 227)), torch.tensor([3, 999]))
    loss.backward()
    assert all(bool(weights.grad.isfinite().all()) for weights in network.parameters())


@pytest.mark.parametrize("side", [8, 16, 28, 32, 63, 64, 100])
def test_alexnet_at_many_sizes(side: int) -> None:
    assert build(ImageShape(1, side, side), 5, kind="alexnet", hidden=8)(torch.zeros(2, 1, side, side)).shape == (2, 5)


def test_alexnet_of_tiny_images_is_refused() -> None:
    with pytest.raises(SpecError, match="images of 7×7 pixels are too small"):
        build(ImageShape(1, 7, 7), 5, kind="alexnet")


def test_a_residual_block_adds_to_its_input() -> None:
    network = build(GREY, 3, kind="resnet", depth=10, width=4)
    block = network.body[3]
    nn.init.zeros_(block.branch[-1].weight)
    maps = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(block(maps), maps.relu())


@pytest.mark.parametrize("kind", ["nearest", "filtered"])
def test_upsampling_of_a_constant_map_has_no_checkerboard(kind: str) -> None:
    torch.manual_seed(0)
    found = nn.Sequential(*upsampled(kind, 3, 5))(torch.ones(2, 3, 6, 6))
    assert found.shape == (2, 5, 12, 12)
    inside = found[..., 2:-2, 2:-2]
    torch.testing.assert_close(inside, inside[..., :1, :1].expand_as(inside))


def test_a_filtered_transposed_convolution_is_one_followed_by_sums_of_neighbours() -> None:
    torch.manual_seed(0)
    layer = FilteredConvTranspose(3, 5)
    maps = torch.randn(2, 3, 6, 7)
    enlarged = nn.functional.conv_transpose2d(maps, layer.weight, stride=2)
    summed = 4 * nn.functional.avg_pool2d(enlarged, 2, stride=1)
    torch.testing.assert_close(layer(maps), summed / 2 + layer.bias[:, None, None])
