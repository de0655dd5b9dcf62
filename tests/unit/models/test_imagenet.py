"""Networks with ImageNet weights: shapes, names and sizes from the papers and the original implementations."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipelines.models.imagenet import (
    EFFICIENTNET_LITE0,
    MOBILENET_V2,
    TENSORFLOW,
    TORCH,
    ConvNorm,
    InvertedResiduals,
    efficientnet_lite0,
    mobilenet_v2,
)
from pipelines.models.inception import GRAPH_OUTPUTS, InceptionV3, inception_v3, resized_from_corners


def grey(count: int = 2, side: int = 28) -> torch.Tensor:
    return torch.randint(0, 256, (count, 1, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("stages", "convention", "parameters"),
    [(MOBILENET_V2, TORCH, 3_504_872), (EFFICIENTNET_LITE0, TENSORFLOW, 4_652_008)],
)
def test_inverted_residuals_have_the_published_size(stages, convention, parameters) -> None:  # type: ignore[no-untyped-def]
    network = InvertedResiduals(stages, convention).eval()
    assert network.parameter_count == parameters
    with torch.inference_mode():
        features = network.embed(network.prepare(grey()))
    assert features.shape == (2, network.features)
    # ReLU6 bounds what is averaged.
    assert 0 <= float(features.min()) <= float(features.max()) <= 6


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_tensorflow_pads_the_far_edges_where_padding_is_odd(kernel: int, stride: int) -> None:
    unit = ConvNorm(1, 1, kernel, stride, 1, TENSORFLOW).eval()
    torch.nn.init.ones_(unit.conv.weight)
    image = torch.zeros(1, 1, 8, 8)
    image[..., 0, 0] = 1
    with torch.inference_mode():
        seen = unit(image)[0, 0] > 0.5
    before = (kernel - stride) // 2
    # The first pixel is seen from the windows that start at most ``before`` in front of it.
    assert seen.shape == (8 // stride, 8 // stride)
    assert int(seen.sum()) == (before // stride + 1) ** 2


@pytest.mark.parametrize("build", [mobilenet_v2, efficientnet_lite0, inception_v3])
def test_weights_of_another_network_are_refused(build) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RuntimeError, match=r"Missing key.*\n.*Unexpected key.*other\.weight"):
        build({"other.weight": torch.zeros(1)})


@pytest.mark.parametrize(("outputs", "parameters"), [(1000, 23_834_568), (GRAPH_OUTPUTS, 23_850_960)])
def test_inception_has_the_published_size(outputs: int, parameters: int) -> None:
    network = InceptionV3(outputs).eval()
    assert network.parameter_count == parameters
    sides = []
    for name in ("Mixed_5d", "Mixed_6e", "Mixed_7c"):
        network.get_submodule(name).register_forward_hook(lambda _, __, found: sides.append(tuple(found.shape[1:])))
    with torch.inference_mode():
        assert network.embed(network.prepare(grey(1))).shape == (1, 2048)
    assert sides == [(288, 35, 35), (768, 17, 17), (2048, 8, 8)]


@pytest.mark.parametrize("outputs", [1000, GRAPH_OUTPUTS])
def test_inception_takes_weights_with_and_without_an_auxiliary_classifier(outputs: int) -> None:
    torch.manual_seed(1)
    weights = InceptionV3(outputs).state_dict()
    network = inception_v3(dict(weights) | {"AuxLogits.fc.weight": torch.zeros(1)})
    assert all(torch.equal(weights[name], kept) for name, kept in network.state_dict().items())
    assert not network.training
    assert network.parameter_count == 0  # nothing of it is trained
    with pytest.raises(RuntimeError, match=r"Missing key.*Mixed_7c\.branch_pool\.conv\.weight"):
        inception_v3({name: w for name, w in weights.items() if name != "Mixed_7c.branch_pool.conv.weight"})


def test_the_two_kinds_of_inception_differ_at_edges_and_in_the_last_pool() -> None:
    torch.manual_seed(1)
    ones = torch.ones(1, 192, 5, 5)
    graph, other = (InceptionV3(outputs).eval() for outputs in (GRAPH_OUTPUTS, 1000))
    block = other.get_submodule("Mixed_5b")
    other.get_submodule("Mixed_5b").load_state_dict(graph.get_submodule("Mixed_5b").state_dict())
    with torch.inference_mode():
        left, right = graph.get_submodule("Mixed_5b")(ones), block(ones)
    torch.testing.assert_close(left[..., 1:-1, 1:-1], right[..., 1:-1, 1:-1])
    # With the padding counted, averages at the edge are smaller than inside.
    pooled = block.out - 32
    assert not torch.allclose(left[:, pooled:, 0], right[:, pooled:, 0])
    assert torch.allclose(left[:, :pooled], right[:, :pooled])


@pytest.mark.parametrize("side", [7, 20, 45])
def test_resizing_from_corners_by_its_formula(side: int) -> None:
    image = torch.rand(1, 2, 13, 20, generator=torch.Generator().manual_seed(0))
    found = resized_from_corners(image, side)
    for y, x in np.random.default_rng(0).integers(0, side, (20, 2)):
        v, u = y * 13 / side, x * 20 / side
        rows = (int(v), 1 - v % 1), (min(int(v) + 1, 12), v % 1)
        columns = (int(u), 1 - u % 1), (min(int(u) + 1, 19), u % 1)
        expected = sum(image[0, :, i, j] * p * q for i, p in rows for j, q in columns)
        torch.testing.assert_close(found[0, :, y, x], expected, atol=1e-5, rtol=1e-4)


def test_small_grey_images_become_large_ones_in_colour() -> None:
    images = grey()
    for network in (InvertedResiduals(MOBILENET_V2, TORCH), InceptionV3(1000)):
        prepared = network.prepare(images)
        assert prepared.shape == (2, 3, network.side, network.side)
    back = (prepared[:, 0] + 1) * 127.5
    assert torch.equal(prepared[:, 0], prepared[:, 2])
    expected = F.interpolate(images.float(), (299, 299), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(back, expected, atol=1e-3, rtol=1e-4)
