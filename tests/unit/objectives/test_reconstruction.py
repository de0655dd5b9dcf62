"""Auto-encoders that reconstruct hidden patches."""

import pytest
import torch
from runs import CPU, go_on, job, start, stripes

from pipelines.data.loader import ShardedDataset
from pipelines.data.patches import hide, patch_count
from pipelines.errors import SpecError
from pipelines.evaluation.build import Evaluator
from pipelines.models.autoencoder import AutoEncoder
from pipelines.shape import ImageShape
from pipelines.transport.planner import LocalPlanner


@pytest.fixture(scope="module")
def striped(tmp_path_factory: pytest.TempPathFactory) -> ShardedDataset:
    return stripes(tmp_path_factory.mktemp("reconstruction"))


@pytest.mark.parametrize("side", [1, 3, 5, 20])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.75])
def test_the_share_of_hidden_patches_is_that_asked_for(side: int, share: float) -> None:
    image = ImageShape(2, 10, 13)
    count = patch_count(image, side)
    draws = torch.randn(50, count, generator=torch.Generator().manual_seed(1))
    shown = hide(torch.ones(50, *image.dims), draws, share, side)
    assert shown.shape == (50, *image.dims)
    assert torch.equal(shown[:, 0], shown[:, 1])
    patches = shown[:, 0, ::side, ::side].flatten(1)
    assert patches.shape == (50, count)
    assert set((patches == 0).sum(1).tolist()) == {round(share * count)}
    # Whole patches, and not always the same ones.
    assert torch.equal(shown[:, 0], patches.view(50, 1, -(-10 // side), -1).repeat_interleave(side, 2)
                       .repeat_interleave(side, 3)[:, 0, :10, :13])  # fmt: skip
    assert share * count < 1 or len({tuple(row.tolist()) for row in patches}) > 1 or count == 1


def test_what_is_learned_fills_in_what_is_hidden(striped: ShardedDataset) -> None:
    spec = job("reconstruction", images=6400)
    objective, state = start(spec, striped)
    evaluate = Evaluator(spec, striped, LocalPlanner(), CPU)
    before = evaluate(state.judged).metrics
    go_on(spec, striped, objective, state)
    found = evaluate(state.judged)
    assert found.metrics.keys() == {"test_reconstruction_error", "test_hidden_error"}
    assert found.metrics["test_hidden_error"] < 0.5 * before["test_hidden_error"]
    assert found.metrics["test_reconstruction_error"] < 0.5 * before["test_reconstruction_error"]
    # Three rows: what is shown, what is made of it, the image.
    height, width = found.pictures["reconstructions"].shape
    assert width > height
    again = evaluate(state.judged)
    assert again.metrics == found.metrics


@pytest.mark.parametrize(("patch", "hidden", "count"), [(16, 0.5, "0 of the 1"), (16, 0.6, "1 of the 1")])
def test_patches_that_hide_nothing_or_all_are_refused(
    striped: ShardedDataset, patch: int, hidden: float, count: str
) -> None:
    spec = job("reconstruction")
    objective = spec.objective.model_copy(update={"patch": patch, "hidden": hidden})
    with pytest.raises(SpecError, match=f"objective.patch: {count} patches of 16 pixels a side would be hidden"):
        start(spec.model_copy(update={"objective": objective}), striped)
    start(spec.model_copy(update={"objective": objective.model_copy(update={"hidden": 0.0})}), striped)


@pytest.mark.parametrize("dims", [(1, 28, 28), (3, 64, 64), (1, 9, 14), (3, 5, 4), (1, 4, 40)])
def test_an_autoencoder_reads_images_of_any_size(dims: tuple[int, int, int]) -> None:
    network = AutoEncoder(ImageShape(*dims), 4, 6)
    images = torch.randn(3, *dims)
    maps = network.maps(images)
    assert len(maps) == network.layers
    assert maps[-1].shape == (3, 6)
    assert maps[-2].shape[2:] == network.sizes[-1]
    assert max(network.sizes[-1]) <= 8
    assert torch.equal(network.embed(images), maps[-1])
    assert network(images).shape == images.shape
