"""A job service inside this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.jobs.store import JobStore
from tests.services.jobs.standin import JobService


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[JobService]:
    """Create a job service with a store in a folder and a simulated cluster."""
    service = JobService(tmp_path, JobStore(f"sqlite:///{tmp_path / 'jobs.db'}"))
    yield service
    service.close()
