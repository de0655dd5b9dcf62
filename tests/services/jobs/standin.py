"""A job service in this process: a store on disk, a simulated cluster, and the API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

from fastapi.testclient import TestClient

from pipelines.errors import ModelNotFoundError
from pipelines.spec import JobSpec, parse_spec
from services.jobs.admission import Admission
from services.jobs.api import ApiContext, build_app
from services.jobs.attempt_logs import AttemptLogs
from services.jobs.controller import Controller, Launch
from services.jobs.documents import Joining, NewToken, NodeUse, Submission, TokenRequest
from services.jobs.joining import make_home_id, versions
from services.jobs.nodes import Nodes, pick
from services.jobs.policy import Cluster, SchedulingLimits
from services.jobs.ray_jobs import EngineError, RayNode, RayStatus
from services.jobs.states import AttemptStatus
from services.jobs.store import JobStore, Untracked
from services.settings import Settings
from services.tokens import Role

RAY_TOKEN = "the-cluster's-own"


class OpenedJobs:
    """Replaces :class:`services.jobs.client.Jobs` in commands; subclasses define the responses."""

    def __init__(self, settings: Settings) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def spec_document(**fields: Any) -> dict[str, Any]:
    return {
        "name": "digits",
        "data": {"source": "digits"},
        "model": {"kind": "perceptron"},
        "objective": {"kind": "classification"},
        "train": {"images": 640},
        "workers": {"count": 2},
    } | fields


def job_spec(**fields: Any) -> JobSpec:
    return parse_spec(spec_document(**fields))


@dataclass
class Driver:
    """Driver of an attempt on the simulated cluster."""

    command: str
    status: AttemptStatus = AttemptStatus.PENDING
    message: str = ""
    log: str = ""


@dataclass
class StandIn:
    """A simulated Ray cluster of 2 CPUs, controlled by the test."""

    drivers: dict[str, Driver] = field(default_factory=dict)
    away: str | None = None
    loses_answers: bool = False
    stopped: list[str] = field(default_factory=list)

    async def look(self) -> tuple[Cluster, list[RayNode]]:
        if self.away:
            return Cluster(away=self.away), []
        return Cluster(cpus=2), [RayNode("n0de", "127.0.0.1", {"CPU": 2.0})]

    async def status(self, attempt: str) -> RayStatus:
        self._require()
        driver = self.drivers.get(attempt)
        return RayStatus(AttemptStatus.UNKNOWN) if driver is None else RayStatus(driver.status, driver.message)

    async def submit(self, attempt: str, entrypoint: str, metadata: Mapping[str, str]) -> None:
        self._require()
        assert attempt not in self.drivers, "submitted twice"
        self.drivers[attempt] = Driver(entrypoint)
        if self.loses_answers:
            raise EngineError("no answer in time")

    async def stop(self, attempt: str) -> None:
        self._require()
        self.stopped.append(attempt)
        driver = self.drivers[attempt]
        driver.status = driver.status if driver.status.ended else AttemptStatus.STOPPED

    async def log(self, attempt: str) -> str:
        self._require()
        return self.drivers[attempt].log

    async def tail(self, attempt: str) -> AsyncIterator[str]:
        sent = 0
        while True:
            self._require()
            driver = self.drivers[attempt]
            if len(driver.log) > sent:
                text, sent = driver.log[sent:], len(driver.log)
                yield text
            elif driver.status.ended:
                return
            await asyncio.sleep(0.001)

    async def close(self) -> None:
        pass

    def _require(self) -> None:
        if self.away:
            raise EngineError(self.away)


class StandInNodes:
    """A head and a node that accept all requests."""

    def all(self) -> list[NodeUse]:
        use = {"cpus": 2, "gpus": 0, "used_cpus": 1, "used_gpus": 0, "draining": False}
        return [
            NodeUse(id="aa01", address="10.0.0.1", head=True, **use),
            NodeUse(id="bb02", address="10.0.0.2", head=False, **use),
        ]

    def drain(self, name: str, by: str) -> NodeUse:
        return pick(self.all(), name).model_copy(update={"draining": True})


@dataclass
class JobService:
    """All parts of a job service; ``step`` runs one iteration of its controller."""

    folder: Path
    store: JobStore
    cluster: StandIn = field(default_factory=StandIn)
    tracked: list[Untracked] = field(default_factory=list)
    mlflow_away: bool = False
    models: dict[str, str] = field(default_factory=dict)
    """Registered models: ``NAME/VERSION`` by name."""

    def __post_init__(self) -> None:
        self.logs = AttemptLogs(self.folder / "logs")
        self.loop = asyncio.new_event_loop()
        self.restart()

    def restart(self) -> None:
        """Restart as after `kill -9`, without the state in memory."""
        self._end_tasks()
        self.controller = Controller(
            self.store, self.cluster, self.logs, Launch("python3", self.folder), SchedulingLimits(), self.track
        )

    def track(self, told: Untracked) -> None:
        if self.mlflow_away:
            raise ConnectionError("MLflow is away")
        self.tracked.append(told)

    def step(self, looks: int = 1) -> None:
        """Run iterations of the controller, and of the tasks that it started."""

        async def run() -> None:
            for _ in range(looks):
                await self.controller.step()
                await asyncio.sleep(0.02)

        self.loop.run_until_complete(run())

    def close(self) -> None:
        """Stop all parts."""
        self._end_tasks()
        self.loop.close()
        self.store.close()

    def _end_tasks(self) -> None:
        async def end() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self.loop.run_until_complete(end())

    def submit(self, owner: str = "ada", key: str | None = None, **fields: Any) -> str:
        asked = {name: fields.pop(name) for name in ("priority", "timeout", "labels") if name in fields}
        token = self.token(owner)
        job, _ = self.store.submit(job_spec(**fields), Submission(spec=spec_document(**fields), **asked), token, key)
        return job.id

    def token(self, name: str, role: Role = Role.SUBMIT) -> NewToken:
        made = {token.name: token for token in self.store.tokens()}
        if name in made:
            return NewToken(**dict(made[name]), secret="")
        return self.store.create_token(TokenRequest(name=name, role=role))

    def client(self, role: Role | None = Role.ADMIN, *, loopback: bool = True) -> TestClient:
        """Create a client of the API with a token of the given role, or without a token."""
        app = build_app(self.service(), loopback=loopback)
        headers = {"Authorization": f"Bearer {self.token(f'a-{role}', role).secret}"} if role else {}
        return TestClient(app, headers=headers, raise_server_exceptions=False)

    def joining(self) -> Joining:
        return Joining(
            ray_address="10.0.0.1:6379",
            ray_token=RAY_TOKEN,
            mlflow_uri="http://10.0.0.1:5000",
            transport_url="http://10.0.0.1:8100",
            home=str(self.folder),
            home_id=make_home_id(self.folder),
            versions=versions(),
        )

    def service(self) -> ApiContext:
        def version(model: str) -> str:
            if model not in self.models:
                raise ModelNotFoundError(f"no model {model!r} is registered")
            return self.models[model]

        return ApiContext(
            self.store,
            self.logs,
            Admission(Settings(home=self.folder), version),
            seen=lambda: (self.controller.seen, self.controller.looked),
            poke=lambda: None,
            mlflow=lambda: "http://127.0.0.1:5000",
            joining=self.joining,
            nodes=cast(Nodes, StandInNodes()),
        )
