"""A small Ray cluster for all tests of services, on loopback, with its files in a separate folder."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Ray reads these at import.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # otherwise its servers listen on all interfaces
os.environ["RAY_AUTH_MODE"] = "disabled"  # otherwise it stores a token in the home folder
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Run a cluster of 2 CPUs in this process, with resources for 4 actors of the transport service."""
    import ray

    folder = tempfile.mkdtemp(prefix="ray-")  # short, because paths of sockets are limited to 107 bytes
    ray.init(
        num_cpus=2,
        resources={"transport": 4},
        object_store_memory=128 * 2**20,
        include_dashboard=False,
        namespace="monge",
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=folder,
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a folder with discs and squares, and with one invalid image file."""
    from tests.services.jobs.living import draw_shapes

    return draw_shapes(tmp_path_factory.mktemp("shapes"))
