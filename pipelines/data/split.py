"""Splitting of images by content, so that no image is in both the training and the test split."""

from __future__ import annotations

from typing import Literal

import numpy as np

SplitName = Literal["train", "test", "validation"]

TRAIN, TEST = 0, 1
DROPPED = 2
"""Value for images that are in no split."""
VALIDATION = 3

SIDES: dict[SplitName, int] = {"train": TRAIN, "test": TEST, "validation": VALIDATION}


def split_by_content(content: np.ndarray, labels: np.ndarray, test_fraction: float) -> np.ndarray:
    """Hold out a fraction of each class.

    Images with the same content are in the same split, for any names and labels. Contents are ordered by their hashes,
    which is effectively random and does not depend on a seed or on the order of the images.

    Args:
        content: hashes of the images, (n, 16) uint8.
        labels: labels, (n,) int64; a content with several labels belongs to the smallest of them.
        test_fraction: fraction of the distinct contents of each class that is held out, to the nearest image. A class
            with two or more contents has at least one in each split.

    Returns:
        Splits, (n,) uint8: 0 for train, 1 for test.
    """
    # Sorted by content and then by label: the first of each run speaks for its content, in hash order.
    keys = np.ascontiguousarray(content).view(">u8").astype(np.uint64)
    order = np.lexsort((labels, keys[:, 1], keys[:, 0]))
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (keys[order[1:]] != keys[order[:-1]]).any(1)
    classes = labels[order[is_first]]
    held_out = np.zeros(len(classes), dtype=np.uint8)
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        count = round(test_fraction * len(members))
        count = min(max(count, 1), len(members) - 1)
        held_out[members[:count]] = TEST
    split = np.empty(len(order), dtype=np.uint8)
    split[order] = held_out[np.cumsum(is_first) - 1]
    return split


def drop_test_twins(content: np.ndarray, split: np.ndarray) -> np.ndarray:
    """Drop the train images that are test images too, which a split that a source states may hold.

    Args:
        content: (n, 16) uint8 hashes of the images.
        split: (n,) uint8: 0 for train, 1 for test.

    Returns:
        (n,) uint8: as ``split``, with :data:`DROPPED` for train images whose content a test image has.
    """
    keys = np.ascontiguousarray(content).view("V16").ravel()
    twins = (split == TRAIN) & np.isin(keys, keys[split == TEST])
    return np.where(twins, np.uint8(DROPPED), split).astype(np.uint8)


def drop_repeats(content: np.ndarray, split: np.ndarray) -> np.ndarray:
    """Drop all but the first of the images of a side that have the same content.

    Args:
        content: (n, 16) uint8 hashes of the images.
        split: (n,) uint8: the side of each; those that are dropped already do not count.

    Returns:
        (n,) uint8: as ``split``, with :data:`DROPPED` for the repeats.
    """
    keys = np.concatenate([content, split[:, None]], axis=1).view("V17").ravel()
    first = np.zeros(len(split), dtype=bool)
    first[np.unique(keys, return_index=True)[1]] = True
    return np.where(first, split, np.uint8(DROPPED)).astype(np.uint8)


def set_apart(content: np.ndarray, labels: np.ndarray, split: np.ndarray, fraction: float) -> np.ndarray:
    """Move a fraction of each class's training images to the validation split, as :func:`split_by_content` does.

    Args:
        content: (n, 16) uint8 hashes of the images.
        labels: (n,) int64.
        split: (n,) uint8: the side of each image; all that are not train images stay where they are.
        fraction: fraction of the distinct contents of each class that is moved; 0 moves none.

    Returns:
        (n,) uint8.
    """
    if not fraction:
        return split
    train = np.flatnonzero(split == TRAIN)
    chosen = split_by_content(content[train], labels[train], fraction) == TEST
    moved = split.copy()
    moved[train[chosen]] = VALIDATION
    return moved
