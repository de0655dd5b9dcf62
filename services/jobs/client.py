"""Jobs: submit, list, follow, cancel; through Ray Jobs, so that they outlive whoever submitted them."""

from __future__ import annotations

import os
import secrets
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import ServiceError, SpecError
from pipelines.spec import FlowSpec, JobSpec, RecordedSpec
from services.cluster import ray_environment
from services.settings import Settings
from services.storage.objects import split_address

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Job:
    """A job as Ray knows it.

    Attributes:
        id: of the job.
        status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        started: when it was submitted.
        seconds: how long it has run.
        message: what Ray says of its status.
    """

    id: str
    status: str
    started: datetime
    seconds: float
    message: str

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self.status in ENDED


class Jobs:
    """The jobs of a cluster.

    Args:
        settings: where the cluster is.

    Raises:
        ServiceError: no cluster answers.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._address = settings.address("ray_dashboard")
        os.environ.update(ray_environment(settings))
        # Jobs are submitted to the address above and no other.
        os.environ.pop("RAY_ADDRESS", None)
        from ray.job_submission import JobSubmissionClient

        with self._asked():
            self._client: JobSubmissionClient = JobSubmissionClient(self._address)

    @property
    def here(self) -> bool:
        """Whether they run on this machine, by :func:`services.platform.local.up`, and see its disk."""
        return self._address == self._settings.platform.get("ray_dashboard")

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """What Ray's client raises where the cluster is away, refuses, or is none: by then another program may listen
        there and answer anything."""
        try:
            yield
        except (OSError, RuntimeError, LookupError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0][:200]
            raise ServiceError(
                f"no Ray cluster answers at {self._address}: {type(error).__name__}: {reason}",
                cure="see `monge status`; `monge up` starts one here",
            ) from error

    def submit(self, spec: JobSpec) -> str:
        """Submit a job; returns its id.

        Raises:
            ModelNotFoundError: the classifier that is to judge its generator is not registered.
            ServiceError: the cluster, or for such a classifier MLflow, cannot be reached.
        """
        if (reference := spec.evaluation.registered) is not None:
            from services.tracking.registry import resolve

            resolve(self._settings.address("mlflow_uri"), reference)
        job = f"{spec.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
        # A cluster's machines have a Python of their own; on this one it is the one that runs now.
        python = sys.executable if self.here else "python"
        settings = {"MONGE_HOME": str(self._settings.home.absolute())} if self.here else {}
        command = [
            "env",
            *(f"{name}={value}" for name, value in settings.items()),
            *(python, "-m", "services.jobs", "--job", job),
            *("--spec", spec.model_dump_json()),
        ]
        told = {"name": spec.name, "kind": spec.objective.kind}
        with self._asked():
            self._client.submit_job(entrypoint=shlex.join(command), submission_id=job, metadata=told)
        return job

    def list(self) -> list[Job]:
        """All jobs that the cluster remembers, newest first."""
        now = time.time()
        jobs = []
        with self._asked():
            known = self._client.list_jobs()
        for details in known:
            if details.submission_id is None:
                continue
            started = (details.start_time or now * 1e3) / 1e3
            ended = (details.end_time or now * 1e3) / 1e3
            jobs.append(
                Job(
                    id=details.submission_id,
                    status=str(details.status),
                    started=datetime.fromtimestamp(started, UTC),
                    seconds=max(0.0, ended - started),
                    message=details.message or "",
                )
            )
        return sorted(jobs, key=lambda job: job.started, reverse=True)

    def get(self, job: str) -> Job:
        """One job.

        Raises:
            ServiceError: the cluster knows none of that id.
        """
        jobs = self.list()
        for known in jobs:
            if known.id == job:
                return known
        names = ", ".join(known.id for known in jobs[:5]) or "none"
        raise ServiceError(f"no job {job!r}; the latest are: {names}", cure="see `monge jobs`")

    def logs(self, job: str, follow: bool = False) -> Iterator[str]:
        """The lines of a job's log; with ``follow``, until it ends.

        Raises:
            ServiceError: the cluster knows no such job.
        """
        read = 0
        while True:
            ended = self.get(job).ended
            with self._asked():
                text = self._client.get_job_logs(job)
            # The last line may still be being written.
            complete = len(text) if ended or not follow else text.rfind("\n") + 1
            yield from text[read:complete].splitlines()
            read = max(read, complete)
            if ended or not follow:
                return
            time.sleep(0.5)

    def wait(self, job: str, timeout: float) -> Job:
        """A job once it has ended.

        Raises:
            ServiceError: it goes on after ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while not (found := self.get(job)).ended:
            if time.monotonic() > deadline:
                raise ServiceError(f"job {job} is {found.status} after {timeout:g} s", cure=f"see `monge logs {job}`")
            time.sleep(0.3)
        return found

    def cancel(self, job: str) -> Job:
        """Stop a job and its workers, and mark its MLflow run KILLED. A job that has ended stays as it is.

        Raises:
            ServiceError: the cluster knows no such job, or it does not stop.
        """
        if not self.get(job).ended:
            with self._asked():
                self._client.stop_job(job)
        found = self.wait(job, timeout=60)
        if found.status == "STOPPED":
            from services.tracking.run import find_run, mark_killed

            uri = self._settings.address("mlflow_uri")
            if run_id := find_run(uri, job):
                mark_killed(uri, run_id)
        return found


def with_absolute_paths(spec: JobSpec) -> JobSpec:
    """The spec with what it names on this machine's disk named absolutely: the job runs in another folder.

    Raises:
        SpecError: a file is missing, or an address in S3 is none or has keys in it, which every log would then tell.
    """
    source = Path(spec.data.source).expanduser()
    if spec.data.source.startswith("s3://"):
        split_address(spec.data.source)
    elif source.exists():
        spec = spec.model_copy(update={"data": spec.data.model_copy(update={"source": str(source.absolute())})})
    if isinstance(spec.objective, FlowSpec) and isinstance(spec.objective.coupling, RecordedSpec):
        file = Path(spec.objective.coupling.file).expanduser().absolute()
        if not file.is_file():
            raise SpecError(f"objective.coupling.file: {file} does not exist", cure="write it with `monge couple`")
        coupling = spec.objective.coupling.model_copy(update={"file": str(file)})
        spec = spec.model_copy(update={"objective": spec.objective.model_copy(update={"coupling": coupling})})
    if spec.evaluation.weights is not None:
        file = Path(spec.evaluation.weights).expanduser().absolute()
        if not file.is_file():
            raise SpecError(f"evaluation.weights: {file} does not exist", cure="give a state dict of Inception-v3")
        spec = spec.model_copy(update={"evaluation": spec.evaluation.model_copy(update={"weights": str(file)})})
    return spec
