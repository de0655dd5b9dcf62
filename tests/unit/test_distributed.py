"""Distribution of rows over ranks, and agreement in a single process."""

from __future__ import annotations

import pytest

from pipelines import distributed
from pipelines.distributed import agree, block_share
from pipelines.errors import ShardError


@pytest.mark.parametrize("count", [0, 1, 5, 256, 257, 1000, 10_000])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_blocks_are_shared_out(monkeypatch: pytest.MonkeyPatch, count: int, world: int) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(block_share(count, 256))
    assert [i for share in shares for i in range(count)[share]] == list(range(count))
    if count >= 256 * world:
        assert all(share.start % 256 == 0 for share in shares)
    if count >= world * world:
        assert all(range(count)[share] for share in shares), "no rank is idle"


def test_alone_an_error_stays_what_it_is() -> None:
    error = ShardError("shard-00001: damaged")
    with pytest.raises(ShardError) as caught, agree("opening the data"):
        raise error
    assert caught.value is error
    with agree("opening the data"):
        pass
