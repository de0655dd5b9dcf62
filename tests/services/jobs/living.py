"""A separate platform for tests: its command, its processes, and small jobs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
from PIL import Image, ImageDraw

from benchmarks.faults import processes
from services.jobs.client import Jobs
from services.jobs.states import State
from services.platform.local import Platform
from services.settings import Settings

ROOT = Path(__file__).parents[3]
COUNT = 60
SIDE = 20

Monge = Callable[..., str]


def environment_of(home: Path) -> dict[str, str]:
    """Return the environment of commands of a home: that of this process without variables of other clusters."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MONGE_"))}
    return inherited | {"MONGE_HOME": str(home), "COLUMNS": "200", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}


@contextmanager
def platform(home: Path, environment: Mapping[str, str] | None = None) -> Iterator[Monge]:
    """Yield the command of a platform, and stop the platform at the end.

    Args:
        home: home folder of the platform.
        environment: additional environment variables of the command and the platform.
    """
    known = environment_of(home) | dict(environment or {})

    def run(*arguments: str, fails: bool = False, cwd: Path = ROOT, **settings: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "services.cli", *arguments],
            cwd=cwd, env=known | settings, capture_output=True, text=True, timeout=400,
        )  # fmt: skip
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stdout + done.stderr

    run("up", "--cpus", "2")
    try:
        yield run
    finally:
        run("down")
    assert not (home / "platform.json").exists()


def draw_shapes(folder: Path) -> Path:
    """Draw discs and squares of many sizes as colour PNGs, and write one invalid image file."""
    random = np.random.default_rng(0)
    for name in ("disc", "square"):
        (folder / name).mkdir()
        for index in range(COUNT):
            picture = Image.new("RGB", (SIDE + 4, SIDE), "navy")
            left, top = random.integers(1, 9, 2).tolist()
            size = int(random.integers(7, 11))
            draw = ImageDraw.Draw(picture)
            shape = draw.ellipse if name == "disc" else draw.rectangle
            shape((left, top, left + size, top + size), fill="white")
            picture.save(folder / name / f"{index}.png")
    (folder / "disc" / "not-an-image.png").write_text("words")
    return folder


def submitted(output: str) -> str:
    match = re.search(r"submitted (\S+)", output)
    assert match, output
    return match.group(1)


def classifier(name: str, source: Path | str, images: int, *more: str) -> list[str]:
    fields = [f"name={name}", f"data.source={source}", f"train.images={images}", *more]
    return ["submit", "configs/lenet.yaml", *(word for field in fields for word in ("--set", field))]


def adversary(name: str, source: Path, *more: str) -> list[str]:
    """Return the arguments of ``submit`` for a generator and its critic on two workers."""
    return _generator("gan", name, source, "objective.critic.width=4", *more)


def transported(name: str, source: Path, *more: str) -> list[str]:
    """Return the arguments of ``submit`` for a generator on two workers with a plan from the service at each step."""
    return _generator("transport-generator", name, source, *more)


def _generator(config: str, name: str, source: Path, *more: str) -> list[str]:
    fields = [
        f"name={name}", f"data.source={source}", "train.images=24000", "train.batch=64", "train.precision=float32",
        "train.channels_last=false", "train.checkpoint_every=2048", "train.log_every=512",
        "train.evaluate_every=9000", "model.width=4", "evaluation.samples=100", "workers.count=2", *more,
    ]  # fmt: skip
    return [f"configs/{config}.yaml", *(word for field in fields for word in ("--set", field))]


def checkpointed(home: Path, job: str) -> bool:
    # Seen on the disk: the command takes so long to start that all could be over when it has said how far training is.
    kept = home / "jobs" / job / "checkpoint_manager_snapshot.json"
    return kept.is_file() and '"images-' in kept.read_text()


def went_on(jobs: Jobs, job: str, times: int, beyond: int = 0) -> bool:
    """Whether a job has resumed from a checkpoint ``times`` times, and has trained on more than ``beyond`` images."""
    progress = jobs.get(job).progress
    resumed = sum("from image" in event.text for event in jobs.events(job))
    return resumed == times and progress is not None and progress.images > beyond


def family(home: Path) -> list[psutil.Process]:
    """Return all processes of this home's cluster."""
    ray = Platform.read(home).processes["ray"].process()
    assert ray is not None
    return ray.children(recursive=True)


def workers(home: Path, kind: str = "RayTrainWorker") -> list[psutil.Process]:
    """Return the Ray Train workers of this home's cluster, or its actors of another kind."""
    return processes(home, kind)


def ends(home: Path, job: str) -> str:
    """Wait until a job has succeeded; return its history."""
    with Jobs(Settings(home=home)) as jobs:
        ended = jobs.wait(job, timeout=400)
        story = "\n".join(event.text for event in jobs.events(job))
        assert ended.state is State.SUCCEEDED, f"{ended.reason}\n{story}"
        return story


def title(process: psutil.Process) -> str:
    """Return the name and the command line of a process; empty if it has ended."""
    try:
        return " ".join([*process.cmdline(), process.name()])
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
