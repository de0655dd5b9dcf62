"""What a worker makes of errors that the other ranks do not have."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.errors import ShardError, SpecError, StorageError
from services.settings import Settings
from services.training.worker import raised_on_one_rank


def test_a_damaged_shard_is_the_error_of_one_rank() -> None:
    with pytest.raises(StorageError, match=r"shard-00001: damaged(.|\n)*shard it anew") as caught, raised_on_one_rank():
        raise ShardError("shard-00001: damaged", cure="shard it anew")
    assert isinstance(caught.value.__cause__, ShardError)
    with pytest.raises(SpecError, match="as it was"), raised_on_one_rank():
        raise SpecError("as it was")


@pytest.mark.parametrize("shard_cache", [None, Path("local")])
def test_settings_reach_workers_in_another_folder(
    shard_cache: Path | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    settings = Settings(
        s3_endpoint_url="http://127.0.0.1:9", s3_path_style=True, shard_cache=shard_cache, shard_cache_gib=0.5
    )
    told = settings.for_workers()
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("elsewhere"))
        patched.setenv("MONGE_S3_ENDPOINT_URL", "http://127.0.0.1:8")
        there = Settings(**told)
        assert there.shards != Settings().shards
    assert there.shards == settings.shards
    assert (there.s3_endpoint_url, there.s3_path_style, there.shard_cache_gib) == ("http://127.0.0.1:9", True, 0.5)
