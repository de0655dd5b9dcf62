"""An attempt that was replaced no longer writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.errors import SupersededError
from services.settings import Settings
from services.training.fencing import Fence


def test_the_latest_attempt_alone_may_write(tmp_path: Path) -> None:
    first, second = Fence(str(tmp_path), "job-1", 9, Settings()), Fence(str(tmp_path), "job-1", 10, Settings())
    first.require()
    first.claim()
    first.claim()  # its own workers start again
    first.require()
    second.claim()
    second.require()
    for denied in (first.require, first.claim):
        with pytest.raises(SupersededError, match="attempt 9 was superseded by attempt 10"):
            denied()
    assert not first.holds()
    assert second.holds()
    Fence(str(tmp_path), "job-2", 1, Settings()).claim()


def test_what_has_no_attempts_is_never_given_up(tmp_path: Path) -> None:
    Fence(str(tmp_path), "trial-1", 0, Settings()).require()
