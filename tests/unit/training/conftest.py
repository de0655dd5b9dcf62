"""One small data set for all runs."""

import pytest
from runs import stripes

from pipelines.data.loader import ShardedDataset


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> ShardedDataset:
    return stripes(tmp_path_factory.mktemp("stripes"))
