"""The client of the job service: submit, list, follow, cancel, from any machine."""

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
"""Seconds for an answer."""

PLAN_SECONDS = 300.0
"""Seconds for a plan, which lists all images of a folder."""

DRAIN_SECONDS = 90.0
"""Seconds for draining a node, for which the service starts a process."""

AWAY = 60.0
"""Seconds for which a follower tries to reach a service that has gone away."""

Answer = TypeVar("Answer", bound=BaseModel)


class Jobs:
    """The jobs of a job service.

    Args:
        settings: where it is, and the token.
        transport: of httpx, for a service inside this process.

    Raises:
        ServiceError: no address is known.
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
            spec: what it does, with paths that the cluster sees.
            priority: higher ones start first.
            timeout: seconds that it may take from its first start on.
            labels: to find it again.
            wait: accept it even if the cluster has too few nodes today.
            key: a second submission with the same key gives the same job, so that it may be sent again after a lost
                answer.
            origin: the job that it continues, ``JOB`` or ``JOB@IMAGES``.

        Raises:
            MongeError: what the service finds wrong.
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
        """What a job would work on, and on what.

        Raises:
            MongeError: what the service finds wrong.
        """
        asked = Submission(spec=spec.model_dump(mode="json"), wait=wait, origin=origin)
        return self._ask(DryRun, "POST", "/v1/plans", json=asked.model_dump(), timeout=PLAN_SECONDS)

    def find(self, limit: int = 100, **filters: Any) -> list[Job]:
        """Jobs, newest first.

        Args:
            limit: so many at most; all of them where 0.
            filters: ``state``, ``owner``, ``name``, ``label``, as ``GET /v1/jobs`` takes them.
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
        """One job.

        Raises:
            JobNotFoundError: there is none of that id.
        """
        return self._ask(JobDetails, "GET", f"/v1/jobs/{_segment(job)}")

    def events(self, job: str) -> list[Event]:
        """The history of a job, oldest first.

        Raises:
            JobNotFoundError: there is none of that id.
        """
        found: list[Event] = []
        while page := self._ask(
            EventPage, "GET", f"/v1/jobs/{_segment(job)}/events", params={"after": found[-1].id if found else 0}
        ).events:
            found += page
        return found

    def logs(self, job: str, follow: bool = False) -> Iterator[str]:
        """The lines of a job's log; with ``follow``, until it ends.

        Raises:
            JobNotFoundError: there is none of that id.
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
        """What happens to a job, as it happens, until it ends.

        Raises:
            JobNotFoundError: there is none of that id.
            ServiceError: the service is away for a minute.
        """
        for kind, data in self._stream(f"/v1/jobs/{_segment(job)}/events/stream"):
            if kind == "event":
                yield Event.model_validate(data)
            elif kind == "progress":
                yield JobProgress.model_validate(data)

    def wait(self, job: str, timeout: float) -> Job:
        """A job once it is over.

        Raises:
            ServiceError: it goes on after ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while not (found := self.get(job)).state.final:
            if time.monotonic() > deadline:
                raise ServiceError(f"job {job} is {found.state} after {timeout:g} s", hint=f"see `monge jobs {job}`")
            time.sleep(0.3)
        return found

    def cancel(self, job: str) -> Job:
        """Ask for the end of a job and its workers. A job that is over stays as it is.

        Raises:
            JobNotFoundError: there is none of that id.
        """
        return self._ask(JobDetails, "DELETE", f"/v1/jobs/{_segment(job)}")

    def retry(self, job: str) -> Job:
        """Queue a failed or cancelled job again; it goes on from its last checkpoint.

        Raises:
            JobNotFoundError: there is none of that id.
            ConflictError: it is not over, or has succeeded.
        """
        return self._ask(JobDetails, "POST", f"/v1/jobs/{_segment(job)}/retry")

    def cluster(self) -> ClusterView:
        """The cluster, who holds what, and who waits for what."""
        return self._ask(ClusterView, "GET", "/v1/cluster")

    def nodes(self) -> list[NodeUse]:
        """The nodes of the cluster, the head first."""
        return self._ask(NodeList, "GET", "/v1/nodes").nodes

    def drain_node(self, node: str) -> NodeUse:
        """Take a node out of the cluster.

        Args:
            node: its address, or the beginning of its id.

        Raises:
            SpecError: there is no such node, or several.
            ConflictError: it is the head, or Ray refuses.
        """
        return self._ask(NodeUse, "PUT", f"/v1/nodes/{_segment(node)}/drain", timeout=DRAIN_SECONDS)

    def joining(self) -> Joining:
        """What a machine needs to join the cluster.

        Raises:
            ConflictError: no other machine reaches it.
        """
        return self._ask(Joining, "GET", "/v1/cluster/join")

    def drain(self, end: bool = False) -> ClusterView:
        """Stop what runs until later and start nothing; or end that."""
        return self._ask(ClusterView, "DELETE" if end else "PUT", "/v1/drain")

    def create_token(self, name: str, role: Role) -> NewToken:
        """Make a token.

        Raises:
            ConflictError: there is one of that name.
        """
        return self._ask(NewToken, "POST", "/v1/tokens", json=TokenRequest(name=name, role=role).model_dump())

    def tokens(self) -> list[Token]:
        """All tokens."""
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
                f"what answers at {self._url} is no job service: {answer.content[:80]!r}", hint="see `monge status`"
            ) from error

    def _stream(self, path: str) -> Iterator[tuple[str, Any]]:
        """Server-sent events; goes on where it was cut off."""
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
                f"no job service answers at {self._url}: {reason}",
                hint="see `monge status`; `monge up` starts one here",
            ) from error


def _events(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    """Each server-sent event as its fields."""
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
    """A part of a path: whatever is in it."""
    return httpx.URL(path=f"/{text}").raw_path.decode()[1:].replace("/", "%2F")
