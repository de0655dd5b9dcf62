"""Client of the job service: submit, list, follow and cancel jobs from any machine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self, TypeVar

import httpx
from pydantic import BaseModel

from pipelines.errors import BusyError, ServiceError
from services.error_documents import read_error
from services.jobs.documents import (
    ClusterView,
    DryRun,
    Event,
    EventPage,
    Job,
    JobDetails,
    JobPage,
    JobProgress,
    Joining,
    LogPage,
    NewToken,
    NodeList,
    NodeUse,
    Submission,
    TokenList,
    TokenRequest,
)
from services.settings import Settings
from services.tokens import Role, Token, authorization

if TYPE_CHECKING:
    from pipelines.spec import JobSpec

SECONDS = 30.0
"""Timeout of a request in seconds."""

PLAN_SECONDS = 300.0
"""Timeout of a plan in seconds; a plan lists all images of a folder."""

DRAIN_SECONDS = 90.0
"""Timeout of draining a node in seconds; the service runs a Ray command for it."""

AWAY = 60.0
"""Seconds for which a follower retries while the service is unreachable."""

Answer = TypeVar("Answer", bound=BaseModel)


class Jobs:
    """Client of a job service.

    Args:
        settings: settings with the URL of the service and the token.
        transport: httpx transport, for a service in this process.

    Raises:
        ServiceError: the URL of the service is not known.
    """

    def __init__(self, settings: Settings, transport: httpx.BaseTransport | None = None) -> None:
        self._url = settings.address("jobs_url").rstrip("/")
        headers = authorization(settings.secret)
        self._client = httpx.Client(
            base_url=self._url, headers=headers, timeout=SECONDS, trust_env=False, transport=transport
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def submit(
        self,
        spec: JobSpec,
        *,
        priority: int = 0,
        timeout: float | None = None,
        labels: Mapping[str, str] | None = None,
        wait: bool = False,
        key: str | None = None,
        origin: str | None = None,
    ) -> Job:
        """Submit a job.

        Args:
            spec: spec of the job; its paths must exist on the cluster.
            priority: jobs with higher priority start first.
            timeout: time limit in seconds, from the first start.
            labels: labels to find the job by.
            wait: queue the job even if the cluster is too small for it now.
            key: idempotency key: a second submission with the same key returns the same job, so that a request can be
                repeated if its response was lost.
            origin: job to continue from, ``JOB`` or ``JOB@IMAGES``.

        Raises:
            MongeError: the service rejects the job.
        """
        asked = Submission(
            spec=spec.model_dump(mode="json"),
            priority=priority,
            timeout=timeout,
            labels=dict(labels or {}),
            wait=wait,
            origin=origin,
        )
        headers = {"Idempotency-Key": key} if key else {}
        return self._ask(Job, "POST", "/v1/jobs", json=asked.model_dump(), headers=headers)

    def plan(self, spec: JobSpec, *, wait: bool = False, origin: str | None = None) -> DryRun:
        """Return a summary of the job without submitting it: its data, its network, and its workers.

        Raises:
            MongeError: the service rejects the job.
        """
        asked = Submission(spec=spec.model_dump(mode="json"), wait=wait, origin=origin)
        return self._ask(DryRun, "POST", "/v1/plans", json=asked.model_dump(), timeout=PLAN_SECONDS)

    def find(self, limit: int = 100, **filters: Any) -> list[Job]:
        """Return jobs, newest first.

        Args:
            limit: maximum number of jobs; 0 for all.
            filters: ``state``, ``owner``, ``name``, ``label``, the query parameters of ``GET /v1/jobs``.
        """
        found: list[Job] = []
        before: int | None = None
        while True:
            query = filters | {"limit": min(500, limit - len(found)) if limit else 500}
            page = self._ask(JobPage, "GET", "/v1/jobs", params=query | ({"before": before} if before else {}))
            found += page.jobs
            before = page.next
            if before is None or (limit and len(found) >= limit):
                return found

    def get(self, job: str) -> JobDetails:
        """Return a job.

        Raises:
            JobNotFoundError: no job has this id.
        """
        return self._ask(JobDetails, "GET", f"/v1/jobs/{_segment(job)}")

    def events(self, job: str) -> list[Event]:
        """Return the history of a job, oldest first.

        Raises:
            JobNotFoundError: no job has this id.
        """
        found: list[Event] = []
        while page := self._ask(
            EventPage, "GET", f"/v1/jobs/{_segment(job)}/events", params={"after": found[-1].id if found else 0}
        ).events:
            found += page
        return found

    def logs(self, job: str, follow: bool = False) -> Iterator[str]:
        """Yield the lines of the log of a job; with ``follow``, until the job ends.

        Raises:
            JobNotFoundError: no job has this id.
        """
        path = f"/v1/jobs/{_segment(job)}/logs"
        if follow:
            for kind, data in self._stream(f"{path}/stream"):
                if kind == "lines":
                    yield from data
            return
        offset = 0
        while page := self._ask(LogPage, "GET", path, params={"offset": offset}):
            yield from page.lines
            if page.ended or not page.lines:
                return
            offset = page.next

    def follow(self, job: str) -> Iterator[Event | JobProgress]:
        """Yield the events and the progress of a job until it ends.

        Raises:
            JobNotFoundError: no job has this id.
            ServiceError: the service is unreachable for a minute.
        """
        for kind, data in self._stream(f"/v1/jobs/{_segment(job)}/events/stream"):
            if kind == "event":
                yield Event.model_validate(data)
            elif kind == "progress":
                yield JobProgress.model_validate(data)

    def wait(self, job: str, timeout: float) -> Job:
        """Wait until a job has ended, and return it.

        Raises:
            ServiceError: the job has not ended after ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while not (found := self.get(job)).state.final:
            if time.monotonic() > deadline:
                raise ServiceError(f"job {job} is {found.state} after {timeout:g} s", hint=f"see `monge jobs {job}`")
            time.sleep(0.3)
        return found

    def cancel(self, job: str) -> Job:
        """Cancel a job and stop its workers. A job that has ended is not changed.

        Raises:
            JobNotFoundError: no job has this id.
        """
        return self._ask(JobDetails, "DELETE", f"/v1/jobs/{_segment(job)}")

    def retry(self, job: str) -> Job:
        """Queue a failed or cancelled job again; it resumes from its last checkpoint.

        Raises:
            JobNotFoundError: no job has this id.
            ConflictError: the job has not ended, or has succeeded.
        """
        return self._ask(JobDetails, "POST", f"/v1/jobs/{_segment(job)}/retry")

    def cluster(self) -> ClusterView:
        """Return the state of the cluster, the jobs that hold workers, and the jobs that wait."""
        return self._ask(ClusterView, "GET", "/v1/cluster")

    def nodes(self) -> list[NodeUse]:
        """Return the nodes of the cluster, the head first."""
        return self._ask(NodeList, "GET", "/v1/nodes").nodes

    def drain_node(self, node: str) -> NodeUse:
        """Drain a node.

        Args:
            node: address of the node, or a prefix of its id.

        Raises:
            SpecError: no node matches, or several do.
            ConflictError: the node is the head, or Ray refuses to drain it.
        """
        return self._ask(NodeUse, "PUT", f"/v1/nodes/{_segment(node)}/drain", timeout=DRAIN_SECONDS)

    def joining(self) -> Joining:
        """Return what a machine needs to join the cluster.

        Raises:
            ConflictError: the cluster listens on loopback only.
        """
        return self._ask(Joining, "GET", "/v1/cluster/join")

    def drain(self, end: bool = False) -> ClusterView:
        """Stop all jobs with a checkpoint and start no others; or, with ``end``, start jobs again."""
        return self._ask(ClusterView, "DELETE" if end else "PUT", "/v1/drain")

    def create_token(self, name: str, role: Role) -> NewToken:
        """Create a token.

        Raises:
            ConflictError: a token with this name exists.
        """
        return self._ask(NewToken, "POST", "/v1/tokens", json=TokenRequest(name=name, role=role).model_dump())

    def tokens(self) -> list[Token]:
        """Return all tokens."""
        return self._ask(TokenList, "GET", "/v1/tokens").tokens

    def revoke_token(self, name: str) -> Token:
        """Revoke a token."""
        return self._ask(Token, "DELETE", f"/v1/tokens/{_segment(name)}")

    def _ask(self, kind: type[Answer], method: str, path: str, **request: Any) -> Answer:
        for last in (False, False, True):
            with self._reached():
                answer = self._client.request(method, path, **request)
            if answer.is_success:
                break
            error = read_error(answer.content, answer.status_code, "the job service")
            if last or not isinstance(error, BusyError) or error.retry_after > 5:
                raise error
            time.sleep(error.retry_after)
        try:
            return kind.model_validate_json(answer.content)
        except ValueError as error:
            raise ServiceError(
                f"{self._url} is not a job service: it sent {answer.content[:80]!r}", hint="check `monge status`"
            ) from error

    def _stream(self, path: str) -> Iterator[tuple[str, Any]]:
        """Yield server-sent events; reconnect and continue after a lost connection."""
        last, since = "", time.monotonic()
        while True:
            headers = {"Last-Event-ID": last} if last else {}
            try:
                with self._reached(), self._client.stream("GET", path, headers=headers) as answer:
                    if not answer.is_success:
                        raise read_error(answer.read(), answer.status_code, "the job service")
                    for event in _events(answer.iter_lines()):
                        since = time.monotonic()
                        last = event.get("id", last)
                        if event.get("event") == "end":
                            return
                        yield event.get("event", ""), json.loads(event.get("data", "null"))
            except ServiceError as error:
                if not isinstance(error.__cause__, httpx.TransportError) or time.monotonic() - since > AWAY:
                    raise
                time.sleep(1)

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise ServiceError(
                f"the job service at {self._url} is unreachable: {reason}",
                hint="check `monge status`, or start the services with `monge up`",
            ) from error


def _events(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    """Yield the fields of each server-sent event."""
    fields: dict[str, str] = {}
    for line in lines:
        if not line:
            if fields:
                yield fields
            fields = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            fields[name] = f"{fields[name]}\n{value}" if name == "data" and name in fields else value


def _segment(text: str) -> str:
    """Quote a segment of a URL path."""
    return httpx.URL(path=f"/{text}").raw_path.decode()[1:].replace("/", "%2F")
