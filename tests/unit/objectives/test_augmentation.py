"""Changed images, one by one."""

import pytest
import torch

from pipelines.objectives.augmentation import augmented, cut_out, shifted
from pipelines.objectives.classification import classification_loss
from pipelines.objectives.phase import Step
from pipelines.spec import ClassificationSpec

BATCH = 200


def step(index: int = 0, share: slice = slice(0, BATCH)) -> Step:
    images = torch.rand(BATCH, 2, 7, 9, generator=torch.Generator().manual_seed(1)) + 0.1
    return Step(index, images[share], torch.zeros(BATCH).long()[share], torch.arange(BATCH)[share], BATCH, share, 3)


def spec(**fields: object) -> ClassificationSpec:
    return ClassificationSpec.model_validate({"kind": "classification"} | fields)


def moved(image: torch.Tensor, down: int, across: int) -> torch.Tensor:
    """By the definition: a pixel comes from where it was, or is black."""
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
