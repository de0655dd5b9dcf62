"""What reaches a worker in another process."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.settings import Settings


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
