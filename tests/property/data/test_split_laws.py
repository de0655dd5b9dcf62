"""No image is in both the training and the test split."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.split import DROPPED, TEST, TRAIN, VALIDATION, drop_repeats, set_apart, split_by_content


@st.composite
def labelled_contents(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Draw hashes with many duplicates, some of them with two labels."""
    n = draw(st.integers(1, 80))
    kinds = draw(st.lists(st.integers(0, 30), min_size=n, max_size=n))
    hashes = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, (31, 16), dtype=np.uint8)
    hashes[:, :8] //= draw(st.sampled_from([1, 255]))  # also hashes that agree in all of their first half
    labels = [kind % 3 if draw(st.booleans()) else draw(st.integers(0, 2)) for kind in kinds]
    return hashes[kinds], np.array(labels, dtype=np.int64)


@given(data=labelled_contents(), fraction=st.floats(0.01, 0.99))
def test_twins_stay_together(data: tuple[np.ndarray, np.ndarray], fraction: float) -> None:
    content, labels = data
    split = split_by_content(content, labels, fraction)
    sides: dict[bytes, int] = {}
    for row, side in zip(content, split, strict=True):
        assert sides.setdefault(row.tobytes(), int(side)) == side


@given(data=labelled_contents(), fraction=st.floats(0.01, 0.99))
def test_each_class_gives_its_share(data: tuple[np.ndarray, np.ndarray], fraction: float) -> None:
    content, labels = data
    split = split_by_content(content, labels, fraction)
    owner: dict[bytes, int] = {}
    for row, label in zip(content, labels.tolist(), strict=True):
        owner[row.tobytes()] = min(label, owner.get(row.tobytes(), label))
    side = {row.tobytes(): int(s) for row, s in zip(content, split, strict=True)}
    for label in set(owner.values()):
        sides = [side[key] for key, owned in owner.items() if owned == label]
        if len(sides) > 1:
            assert {TRAIN, TEST} == set(sides)
            wanted = min(max(round(fraction * len(sides)), 1), len(sides) - 1)
            assert sides.count(TEST) == wanted
        else:
            assert sides == [TRAIN]


@given(data=labelled_contents(), fraction=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_the_order_of_the_images_does_not_matter(
    data: tuple[np.ndarray, np.ndarray], fraction: float, seed: int
) -> None:
    content, labels = data
    order = np.random.default_rng(seed).permutation(len(labels))
    split = split_by_content(content, labels, fraction)
    assert np.array_equal(split_by_content(content[order], labels[order], fraction), split[order])


@given(data=labelled_contents(), fraction=st.floats(0.01, 0.99), share=st.floats(0, 0.99))
def test_a_validation_split_is_of_train_images_alone(
    data: tuple[np.ndarray, np.ndarray], fraction: float, share: float
) -> None:
    content, labels = data
    split = split_by_content(content, labels, fraction)
    moved = set_apart(content, labels, split, share)
    changed = moved != split
    assert (split[changed] == TRAIN).all()
    assert (moved[changed] == VALIDATION).all()
    assert changed.any() <= (share > 0)
    sides: dict[bytes, int] = {}
    for row, side in zip(content, moved, strict=True):
        assert sides.setdefault(row.tobytes(), int(side)) == side


@given(data=labelled_contents(), fraction=st.floats(0.01, 0.99))
def test_of_repeats_the_first_is_kept(data: tuple[np.ndarray, np.ndarray], fraction: float) -> None:
    content, labels = data
    split = split_by_content(content, labels, fraction)
    kept = drop_repeats(content, split)
    seen: set[bytes] = set()
    for row, side, before in zip(content, kept, split, strict=True):
        assert side == (DROPPED if row.tobytes() in seen else before)
        seen.add(row.tobytes())
