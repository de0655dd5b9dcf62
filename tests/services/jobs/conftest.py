"""A job service inside this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.jobs.store import JobStore
from tests.services.jobs.standin import JobService


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[JobService]:
    """With a store in a folder, and a cluster that is a stand-in."""
    service = JobService(tmp_path, JobStore(f"sqlite:///{tmp_path / 'jobs.db'}"))
    yield service
    service.close()
