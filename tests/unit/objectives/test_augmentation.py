"""Augmentations, image by image."""

import math

import pytest
import torch

from pipelines.models.classifiers import Perceptron
from pipelines.objectives.augmentation import Mixture, augmented, cut_out, mixed, shifted
from pipelines.objectives.classification import Classification, classification_loss
from pipelines.objectives.phase import Step
from pipelines.shape import ImageShape
from pipelines.spec import ClassificationSpec

BATCH = 200


def step(index: int = 0, share: slice = slice(0, BATCH)) -> Step:
    images = torch.rand(BATCH, 2, 7, 9, generator=torch.Generator().manual_seed(1)) + 0.1
    return Step(index, images[share], torch.zeros(BATCH).long()[share], torch.arange(BATCH)[share], BATCH, share, 3)


def spec(**fields: object) -> ClassificationSpec:
    return ClassificationSpec.model_validate({"kind": "classification"} | fields)


def moved(image: torch.Tensor, down: int, across: int) -> torch.Tensor:
    """Shift an image by the definition: a pixel has the value of its source, or is black."""
    found = torch.full_like(image, -1.0)
    _, height, width = image.shape
    for row in range(height):
        for column in range(width):
            if 0 <= row + down < height and 0 <= column + across < width:
                found[:, row, column] = image[:, row + down, column + across]
    return found


def test_an_image_is_moved_whole_and_every_shift_occurs() -> None:
    found = shifted(step().images, step(), 2)
    seen = set()
    for image, original in zip(found, step().images, strict=True):
        (shift,) = [
            (down, across)
            for down in range(-2, 3)
            for across in range(-2, 3)
            if torch.equal(image, moved(original, down, across))
        ]
        seen.add(shift)
    assert len(seen) == 25


def test_a_square_is_blanked_and_nothing_else() -> None:
    found = cut_out(step().images, step(), 3)
    areas = set()
    for image, original in zip(found, step().images, strict=True):
        blank = (image == 0).all(0)
        assert torch.equal(image[:, ~blank], original[:, ~blank])
        rows, columns = blank.any(1).sum().item(), blank.any(0).sum().item()
        assert blank.sum() == rows * columns
        areas.add((rows, columns))
    # Whole squares inside, parts of them at the borders.
    assert areas == {(rows, columns) for rows in (2, 3) for columns in (2, 3)}


@pytest.mark.parametrize(
    "fields", [{"flip": True}, {"shift": 2}, {"cutout": 3}, {"flip": True, "shift": 1, "cutout": 2}]
)
def test_a_change_is_of_the_step_and_the_place(fields: dict[str, object]) -> None:
    whole = augmented(step(), spec(**fields))
    assert not torch.equal(whole, step().images)
    assert torch.equal(whole, augmented(step(), spec(**fields)))
    assert not torch.equal(whole, augmented(step(index=1), spec(**fields)))
    parts = [augmented(step(share=share), spec(**fields)) for share in (slice(0, 70), slice(70, 200))]
    assert torch.equal(torch.cat(parts), whole)


def test_nothing_is_changed_unasked() -> None:
    assert torch.equal(augmented(step(), spec()), step().images)


@pytest.mark.parametrize("loss", ["cross-entropy", "least-squares"])
def test_smoothed_labels_by_hand(loss: str) -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 3, 1, 2, 2])
    targets = torch.eye(4)[labels] * 0.8 + 0.05
    p = logits.softmax(1)
    expected = -(targets * p.log()).sum(1) if loss == "cross-entropy" else (p - targets).square().sum(1)
    torch.testing.assert_close(classification_loss(logits, labels, loss, 0.2), expected)


def labelled(index: int = 0) -> Step:
    """Create a batch with a unique class for each image, which identifies partners."""
    at = step(index)
    return Step(index, at.images, torch.arange(BATCH), at.indices, BATCH, at.share, at.seed)


def mixture(index: int = 0, **fields: object) -> Mixture:
    return mixed(labelled(index).images, labelled(index), spec(**fields))


@pytest.mark.parametrize("fields", [{"mixup": 0.3}, {"cutmix": 1.0}], ids=str)
def test_each_image_is_mixed_with_one_other(fields: dict[str, object]) -> None:
    found = mixture(**fields)
    assert sorted(found.labels.tolist()) == list(range(BATCH))
    assert bool(((found.weights >= 0) & (found.weights <= 1)).all())
    assert torch.equal(found.images, mixture(**fields).images)
    assert not torch.equal(found.labels, mixture(index=1, **fields).labels)
    assert not torch.equal(found.weights, mixture(index=1, **fields).weights)


def test_blended_images_by_hand() -> None:
    found, images = mixture(mixup=0.3), labelled().images
    for place in range(BATCH):
        share, partner = float(found.weights[place]), int(found.labels[place])
        expected = share * images[place] + (1 - share) * images[partner]
        torch.testing.assert_close(found.images[place], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 5.0])
def test_shares_are_drawn_from_a_beta_distribution(alpha: float) -> None:
    shares = torch.cat([mixture(index, mixup=alpha).weights for index in range(20)]).double()
    variance = 1 / (4 * (2 * alpha + 1))
    # Of 4,000 draws: five standard errors of the mean, and of the variance of what is bounded by ½.
    assert abs(float(shares.mean()) - 0.5) < 5 * math.sqrt(variance / 4000)
    assert abs(float(shares.var()) - variance) < 5 * math.sqrt(variance / 4 / 4000)


def test_a_rectangle_of_the_partner_is_pasted_and_its_area_counts() -> None:
    found, images = mixture(cutmix=1.0), labelled().images
    sizes = set()
    for place in range(BATCH):
        partner = images[int(found.labels[place])]
        own = (found.images[place] == images[place]).all(0)
        other = (found.images[place] == partner).all(0)
        assert bool((own | other).all())
        if int(found.labels[place]) == place:
            continue
        assert float(found.weights[place]) == pytest.approx(float(own.float().mean()), abs=1e-6)
        rows, columns = int(other.any(1).sum()), int(other.any(0).sum())
        assert int(other.sum()) == rows * columns
        sizes.add((rows, columns))
    assert len(sizes) > 10


@pytest.mark.parametrize("loss", ["cross-entropy", "least-squares"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_gradient_is_that_of_mixed_labels(loss: str, smoothing: float) -> None:
    torch.manual_seed(0)
    network = Perceptron(ImageShape(2, 7, 9), BATCH)
    fields = {"mixup": 1.0, "loss": loss, "label_smoothing": smoothing}
    objective = Classification(spec(**fields), network)
    objective.phases[0].loss(labelled()).total.backward()
    found = [weights.grad.clone() for weights in network.parameters()]
    network.zero_grad()
    mixes, one_hot = mixture(mixup=1.0), torch.eye(BATCH)
    targets = mixes.weights[:, None] * one_hot + (1 - mixes.weights)[:, None] * one_hot[mixes.labels]
    targets = targets * (1 - smoothing) + smoothing / BATCH
    p = network(mixes.images).softmax(1)
    by_hand = -(targets * p.log()).sum() if loss == "cross-entropy" else (p - targets).square().sum()
    (by_hand / BATCH).backward()
    for gradient, weights in zip(found, network.parameters(), strict=True):
        torch.testing.assert_close(gradient, weights.grad, rtol=1e-4, atol=1e-6)
