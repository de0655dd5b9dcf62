"""Assignment of images to ranks and steps, for any number of images, batch size, ranks and resume step."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.partition import batch_indices, rank_slice
from pipelines.data.shuffle import epoch_order

counts = st.integers(1, 60)
batches = st.integers(1, 150)
worlds = st.integers(1, 9)
steps = st.integers(0, 40)
seeds = st.integers(0, 2**31 - 1)


def stream(n: int, seed: int, batch: int, first: int, last: int) -> np.ndarray:
    """Return the sample stream of steps ``first … last − 1``."""
    parts = [batch_indices(n, seed, batch, step) for step in range(first, last)]
    return np.concatenate([np.empty(0, np.int64), *parts])


@given(n=st.integers(0, 200), seed=seeds, epoch=st.integers(0, 100))
def test_an_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    order = epoch_order(n, seed, epoch)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(n))
    assert np.array_equal(order, epoch_order(n, seed, epoch))


@given(n=counts, seed=seeds, batch=batches, epochs=st.integers(1, 4))
def test_each_image_is_seen_exactly_once_an_epoch(n: int, seed: int, batch: int, epochs: int) -> None:
    steps = -(-n * epochs // batch)
    seen = stream(n, seed, batch, 0, steps)
    assert len(seen) == steps * batch
    for epoch in range(epochs):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))


@given(n=counts, seed=seeds, batch=batches, world=worlds, step=steps)
def test_the_ranks_shares_make_the_batch(n: int, seed: int, batch: int, world: int, step: int) -> None:
    whole = batch_indices(n, seed, batch, step)
    shares = [whole[rank_slice(batch, rank, world)] for rank in range(world)]
    assert np.array_equal(np.concatenate(shares), whole)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@given(n=counts, seed=seeds, world=worlds, data=st.data())
def test_no_two_ranks_share_an_image_of_an_epoch(n: int, seed: int, world: int, data: st.DataObject) -> None:
    batch = data.draw(st.sampled_from([b for b in range(1, n + 1) if n % b == 0]), label="batch that divides n")
    epoch = data.draw(st.integers(0, 5), label="epoch")
    seen: list[int] = []
    for step in range(epoch * n // batch, (epoch + 1) * n // batch):
        whole = batch_indices(n, seed, batch, step)
        for rank in range(world):
            seen += whole[rank_slice(batch, rank, world)].tolist()
    assert sorted(seen) == list(range(n))


@given(n=counts, seed=seeds, batch=batches, at=st.integers(0, 6), before=worlds, after=worlds)
def test_a_run_resumes_at_any_step_on_any_number_of_ranks(
    n: int, seed: int, batch: int, at: int, before: int, after: int
) -> None:
    seen: list[int] = []
    for step in range(8):
        world = before if step < at else after
        whole = batch_indices(n, seed, batch, step)
        for rank in range(world):
            seen += whole[rank_slice(batch, rank, world)].tolist()
    assert seen == stream(n, seed, batch, 0, 8).tolist()


@given(n=st.integers(20, 60), seed=seeds)
def test_seeds_and_epochs_differ(n: int, seed: int) -> None:
    order = epoch_order(n, seed, 0)
    assert not np.array_equal(order, epoch_order(n, seed, 1))
    assert not np.array_equal(order, epoch_order(n, seed + 1, 0))


def test_the_order_never_changes() -> None:
    """A checkpoint of an older version resumes with the same stream."""
    assert epoch_order(8, seed=0, epoch=0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert batch_indices(5, seed=7, batch=4, step=1).tolist() == [1, 1, 3, 2]
