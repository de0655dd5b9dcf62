"""Runs the Python blocks of every README, those of one file in sequence in a separate process and folder."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from PIL import Image

from services.settings import Settings
from services.tracking.registry import register
from services.tracking.run import Run
from services.transport.app import build_app
from services.transport.backend import LocalBackend
from services.transport.engine import Engine
from tests.services.tracking.stores import job_spec, make_bundle

ROOT = Path(__file__).parents[2]
HIDDEN = {"node_modules", "site-packages"}

BY_THEMSELVES = [
    "pipelines/transport/README.md",
    "services/sharding/README.md",
    "services/storage/README.md",
    "services/training/README.md",
]
WITH_TRANSPORT = ["services/transport/README.md"]
# In this order: tracking reads the run of the job that the first submits.
WITH_PLATFORM = [
    "services/jobs/README.md",
    "services/tracking/README.md",
    "services/serving/README.md",
    "services/tuning/README.md",
]
WITH_TORCHRUN = ["pipelines/README.md"]  # run by tests/distributed/test_torchrun.py


def python_of(readme: Path) -> str:
    """Return all ``python`` blocks of a file; later blocks use the names of earlier ones."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", readme.read_text(), flags=re.DOTALL | re.MULTILINE))


def environment(**settings: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MONGE_"))}
    return {**inherited, "PYTHONPATH": str(ROOT), **settings}


def execute(readme: str, folder: Path, timeout: float = 120, **settings: str) -> None:
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "example.py").write_text(python_of(ROOT / readme))
    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=folder, env=environment(**settings), capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


def test_no_readme_is_left_out() -> None:
    readmes = [path.relative_to(ROOT) for path in ROOT.rglob("README.md")]
    seen = [path for path in readmes if not any(part.startswith(".") or part in HIDDEN for part in path.parts)]
    with_python = {path.as_posix() for path in seen if python_of(ROOT / path)}
    assert with_python == {*BY_THEMSELVES, *WITH_TRANSPORT, *WITH_PLATFORM, *WITH_TORCHRUN}


@pytest.mark.slow
@pytest.mark.parametrize("readme", BY_THEMSELVES)
def test_examples_run_by_themselves(readme: str, tmp_path: Path) -> None:
    execute(readme, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("readme", WITH_TRANSPORT)
def test_examples_run_beside_the_transport_service(readme: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(build_app(LocalBackend(Engine())), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            execute(readme, tmp_path, MONGE_TRANSPORT_URL=url)
        finally:
            server.should_exit = True
            thread.join(20)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Create the home of a platform after `monge demo`, with held-out images and a registered classifier."""
    home = tmp_path_factory.mktemp("home")

    def monge(command: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "services.cli", command],
            cwd=ROOT, env=environment(MONGE_HOME=str(home)), capture_output=True, text=True, timeout=400,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    try:
        monge("up")
        held_out = home / "demo" / "held-out"
        held_out.mkdir(parents=True)
        for index in range(4):
            Image.fromarray(np.full((16, 16), index, np.uint8)).save(held_out / f"{index}.png")
        run = Run.open(Settings(home=home).address("mlflow_uri"), "demo", job_spec())
        register(run, make_bundle().save(home / "bundle"), "cats-and-dogs-lenet")
        run.close()
        yield home
    finally:
        monge("down")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_examples_run_beside_a_platform(home: Path, tmp_path: Path) -> None:
    # One test: each example needs what the ones before it have made.
    for readme in WITH_PLATFORM:
        folder = tmp_path / Path(readme).parent.name
        folder.mkdir()
        execute(readme, folder, timeout=400, MONGE_HOME=str(home))
