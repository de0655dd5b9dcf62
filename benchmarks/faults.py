"""Faults that kill processes of a platform; shared by the benchmarks ``recovery`` and ``soak``."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from pipelines.spec import JobSpec, load_spec
from services.platform import local
from services.platform.processes import Started, free_port, wait_until
from services.settings import Settings
from services.tracking.connection import connect
from services.tracking.run import find_run

CONFIG = Path(__file__).parents[1] / "configs" / "gan.yaml"
CHANGES = (
    "data.source=digits", "train.batch=64", "train.precision=float32", "train.channels_last=false",
    "train.evaluate_every=1000000000", "model.width=8", "objective.critic.width=8", "evaluation.samples=200",
    "workers.count=2",
)  # fmt: skip

Fault = Callable[[Path], None]
"""Kills a part of the platform in a home, and starts it again if nothing else does."""


def adversary(name: str, images: int, every: int, *changes: str) -> JobSpec:
    """Return the spec of a generator and its critic on two workers.

    Args:
        name: name of the job.
        images: number of images for training.
        every: number of images between two checkpoints.
        changes: further fields of the spec.
    """
    own = (f"name={name}", f"train.images={images}", f"train.checkpoint_every={every}", f"train.log_every={every // 4}")
    return load_spec(CONFIG, [*CHANGES, *own, *changes])


def processes(home: Path, kind: str) -> list[psutil.Process]:
    """Return the processes of the home's cluster whose command lines contain ``kind``."""
    head = local.Platform.read(home).processes["ray"].process()
    found = []
    for process in [] if head is None else head.children(recursive=True):
        with suppress(psutil.Error):
            if kind in " ".join(process.cmdline()):
                found.append(process)
    return found


def kill(process: psutil.Process) -> None:
    """Kill a process and all its children."""
    family = [process]
    with suppress(psutil.NoSuchProcess):
        family += process.children(recursive=True)
    known = [Started(one.pid, one.create_time()) for one in family if one.is_running()]
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    wait_until(lambda: not any(one.process() for one in known), timeout=30)


def bits(home: Path, job: str) -> str:
    """Return the name of a job's last checkpoint and the hash of its tensors: networks, their average, optimizers."""
    last = max((home / "jobs" / job).glob("images-*"))
    return f"{last.name} {json.loads((last / 'state.json').read_text())['sha256']}"


def curves(home: Path, job: str) -> dict[str, list[tuple[int, float]]]:
    """Return all points of a job's curves, except those of times."""
    uri = Settings(home=home).address("mlflow_uri")
    client, run_id = connect(uri), find_run(uri, job)
    assert run_id is not None
    names = [name for name in client.get_run(run_id).data.metrics if not name.startswith(("system/", "plan_"))]
    names.remove("images_per_second")
    return {name: [(one.step, one.value) for one in client.get_metric_history(run_id, name)] for name in names}


def up(home: Path) -> None:
    """Start all services that are not running, as ``monge up`` does."""
    local.up(home, lambda _: None, cpus=2)


def _one(kind: str) -> Fault:
    def fault(home: Path) -> None:
        if found := processes(home, kind):
            kill(random.choice(found))

    return fault


def _all(kind: str) -> Fault:
    def fault(home: Path) -> None:
        for process in processes(home, kind):
            kill(process)

    return fault


def _service(*names: str) -> Fault:
    def fault(home: Path) -> None:
        for name in names:
            if (process := local.Platform.read(home).processes[name].process()) is not None:
                kill(process)
        up(home)

    return fault


FAULTS: Mapping[str, Fault] = {
    "a worker": _one("RayTrainWorker"),
    "all workers": _all("RayTrainWorker"),
    "the controller of Ray Train": _one("TrainController"),
    "the driver": _one("services.jobs.driver"),
    "the transport service's actors": _all("TransportActor"),
    "the transport service's HTTP face": _service("transport"),
    "the job service": _service("jobs"),
    "MLflow": _service("mlflow"),
    "the Ray head with all its actors": _service("ray"),
    "the whole machine": _service("ray", "mlflow", "transport", "endpoint", "jobs"),
}
"""Faults by the name of the part that they kill."""

GOES_ON = frozenset(
    {"the transport service's actors", "the transport service's HTTP face", "the job service", "MLflow"}
)
"""Parts whose loss does not interrupt the training of a job."""


def left_over(home: Path, ports: Mapping[str, int]) -> list[str]:
    """Return what remains of a stopped platform: processes, temporary files, ports."""

    def ours() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("MONGE_HOME") == str(home) and process.pid != psutil.Process().pid:
                    found.append(process)
        return found

    wait_until(lambda: not ours(), timeout=30)
    left = [f"process {process.pid}" for process in ours()]
    left += [str(path) for path in (home / "jobs" / ".staging").glob("*")]
    return left + [f"port {port}" for port in ports.values() if free_port(port) != port]
