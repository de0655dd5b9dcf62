"""Runs the commands and the script of the page on torchrun."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "pipelines" / "README.md").read_text()
IMAGES = "train.images=96000"
SETTINGS = [IMAGES, "train.checkpoint_every=9600", "train.log_every=9600", "train.evaluate_every=96000"]


def block(language: str, containing: str) -> str:
    blocks = re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    (found,) = [text for text in blocks if containing in text]
    return found


def shell(line: str, folder: Path) -> subprocess.Popen[str]:
    """Start a command of the page, with the programs of this environment."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": programs, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        ["bash", "-ec", line],
        cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a folder with the script of the page and the data from its first command."""
    folder = tmp_path_factory.mktemp("torchrun")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "train.py").write_text(block("python", "init_process_group"))
    sharding = shell(block("sh", "monge shard"), folder)
    output, _ = sharding.communicate(timeout=120)
    assert sharding.returncode == 0, output
    return folder


@contextmanager
def launched(folder: Path, name: str, processes: int) -> Iterator[subprocess.Popen[str]]:
    """Start a run with a separate folder for its checkpoints."""
    place = folder / name
    place.mkdir()
    for shared in ("configs", "train.py", "data"):
        (place / shared).symlink_to(folder / shared)
    line = block("sh", "torchrun").replace("--nproc-per-node 2", f"--nproc-per-node {processes}")
    run = shell(f"{line.strip()} {' '.join(SETTINGS)}", place)
    try:
        yield run
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def finished(run: subprocess.Popen[str]) -> dict[str, float]:
    """Wait for a run and return the last metrics that it printed."""
    output, _ = run.communicate(timeout=200)
    assert run.returncode == 0, output
    last = [line for line in output.splitlines() if re.match(r"\d+ \{", line)][-1]
    images, numbers = last.split(" ", 1)
    assert images == IMAGES.partition("=")[2]
    return dict(ast.literal_eval(numbers))


def newest(folder: Path) -> Path:
    return sorted((folder / "checkpoints").glob("[0-9]*"))[-1] / "state.safetensors"


def ranks_of(run: subprocess.Popen[str]) -> list[psutil.Process]:
    below = [(process, process.cmdline()) for process in psutil.Process(run.pid).children(recursive=True)]
    return [process for process, line in below if "train.py" in line and not any("torchrun" in part for part in line)]


@pytest.fixture(scope="module")
def judged(folder: Path) -> dict[str, float]:
    """Return the last metrics of two ranks without faults."""
    with launched(folder, "two", 2) as run:
        return finished(run)


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_ends_with_the_same_bits(folder: Path, judged: dict[str, float]) -> None:
    with launched(folder, "killed", 2) as run:
        while not list((folder / "killed" / "checkpoints").glob("[0-9]*")):
            assert run.poll() is None, run.communicate()[0]
            time.sleep(0.01)
        ranks = ranks_of(run)
        assert len(ranks) == 2
        ranks[1].kill()
        assert finished(run) == judged
    assert newest(folder / "killed").read_bytes() == newest(folder / "two").read_bytes()


@pytest.mark.slow
def test_one_process_and_two_take_the_same_steps(folder: Path, judged: dict[str, float]) -> None:
    with launched(folder, "one", 1) as run:
        assert finished(run) == pytest.approx(judged, abs=1e-3)
    one, two = (load_file(newest(folder / name)) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, values in one.items():
        assert abs(values - two[name]).max() < 1e-3, name
