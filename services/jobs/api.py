"""The job service over HTTP: jobs, their events and logs, the cluster, and tokens."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import yaml
from fastapi import Depends, FastAPI, Header, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ValidationError

from pipelines.errors import ForbiddenError, SpecError
from services.error_documents import STATUS
from services.gate import Access
from services.http import protect
from services.jobs import policy
from services.jobs.access import AdminToken, AnyToken, ReadToken, SubmitToken
from services.jobs.admission import Admission
from services.jobs.attempt_logs import AttemptLogs
from services.jobs.controller import Snapshot
from services.jobs.documents import (
    ClusterView,
    DryRun,
    EventPage,
    Holder,
    Job,
    JobDetails,
    JobPage,
    Joining,
    LogPage,
    NewToken,
    Node,
    Submission,
    TokenList,
    TokenRequest,
    Waiting,
)
from services.jobs.metrics import JobMetrics
from services.jobs.node_routes import add_node_routes
from services.jobs.nodes import Nodes
from services.jobs.states import State
from services.jobs.store import JobStore
from services.tokens import Role, Token

MAX_BODY = 2**20
"""Bytes of a request at most: a spec has some thousands."""

FOLLOWING = 0.3
"""Seconds between two looks of those that follow a job."""

STALE = 30.0
"""Seconds without a look at the cluster after which the service is not ready."""

audit = logging.getLogger("monge.audit")


class ApiContext:
    """What the routes share.

    Args:
        store: what is remembered.
        logs: of the jobs.
        admission: checks what is submitted.
        seen: the controller's latest look at the cluster, and when it was.
        poke: lets the controller look at once.
        mlflow: gives the URL of the MLflow UI, for links.
        joining: gives what another machine needs to join the cluster.
        nodes: of the cluster.
    """

    def __init__(
        self,
        store: JobStore,
        logs: AttemptLogs,
        admission: Admission,
        seen: Callable[[], tuple[Snapshot, float]],
        poke: Callable[[], None],
        mlflow: Callable[[], str],
        joining: Callable[[], Joining],
        nodes: Nodes,
    ) -> None:
        self.store, self.logs, self.admission, self.seen, self.poke = store, logs, admission, seen, poke
        self.metrics = JobMetrics(store)
        self.joining, self.nodes = joining, nodes
        self._mlflow = mlflow

    def changed(self, request: Request, what: str, **details: Any) -> None:
        """Write an audit line, and let the controller look."""
        address = request.client.host if request.client else ""
        line = {"who": request.state.token.name, "what": what, "from": address, "request": request.state.request_id}
        audit.info("audit %s", json.dumps(line | details))
        self.poke()

    def linked(self, job: Job) -> dict[str, Any]:
        """A job with the whole link to its run."""
        return {"run_url": self._mlflow() + job.run_url} if job.run_url else {}


async def _asked(request: Request, token: SubmitToken) -> Submission:
    # In this order: a stranger's body is not read.
    return read_submission(await request.body(), request.headers.get("content-type", ""), request)


Asked = Annotated[Submission, Depends(_asked)]
"""What a request of a token that may submit asks for."""


def build_app(service: ApiContext, *, loopback: bool = True, close: Callable[[], None] = lambda: None) -> FastAPI:
    """The ASGI application.

    Args:
        service: what its routes share.
        loopback: whether it listens there alone; requests of foreign pages are then refused.
        close: called at the end.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(close)

    app = FastAPIOffline(
        title="Monge: jobs",
        description="Submit, queue, watch and cancel training jobs.\n\nEvery request carries a token: "
        "`Authorization: Bearer …`. Errors are `{error, message, hint, field?, request_id}`.",
        version="1",
        lifespan=lifespan,
        responses={status: {"description": kind.__doc__ or ""} for kind, status in STATUS.items() if status != 413},
    )
    store = service.store
    app.state.access = Access()
    app.state.authenticated, app.state.authenticate = store.authenticated, store.authenticate

    def details(job: str) -> JobDetails:
        found = store.job(job)
        return found.model_copy(update=service.linked(found))

    def log_page(job: str, offset: int) -> LogPage:
        return service.logs.page(job, offset, store.state(job).final)

    def require_owner(job: str, token: Token) -> None:
        owner = store.job(job).owner
        if token.role is not Role.ADMIN and owner != token.name:
            raise ForbiddenError(f"job {job} is {owner}'s", hint="its owner or an administrator can")

    @app.post("/v1/jobs", status_code=201, summary="Submit a job", openapi_extra=_SUBMISSION)
    def submit(
        request: Request,
        response: Response,
        asked: Asked,
        idempotency_key: Annotated[str | None, Header(max_length=128)] = None,
    ) -> Job:
        """Queue a job. The same `Idempotency-Key` of the same token gives the same job, and the status 200.

        The body is `{"spec": …, "priority": …, …}`, or with `Content-Type: application/yaml` a spec by itself; then
        priority, timeout, wait, origin and labels are in the query.
        """
        token: Token = request.state.token  # that of the submission, which was admitted
        spec = service.admission.check(asked, service.seen()[0].cluster)
        origin = service.admission.origin(asked, spec, store.job)
        job, new = store.submit(spec, asked, token, idempotency_key, origin)
        if new:
            service.changed(request, "submit", job=job.id)
        else:
            response.status_code = 200
        return job.model_copy(update=service.linked(job))

    @app.post("/v1/plans", summary="Look at a job before it is submitted", openapi_extra=_SUBMISSION)
    def plan(asked: Asked) -> DryRun:
        """What a job would work on, on what, and when; the same faults are found as by submitting it, and more."""
        return service.admission.plan(asked, service.seen()[0].cluster, store.job)

    @app.get("/v1/jobs", response_model=JobPage, summary="List jobs, newest first")
    def jobs(
        token: ReadToken,
        state: Annotated[list[State], Query()] = [],  # noqa: B006
        owner: Annotated[str | None, Query(max_length=64)] = None,
        name: Annotated[str | None, Query(max_length=128)] = None,
        label: Annotated[list[str], Query(description="as `team=vision`", max_length=8)] = [],  # noqa: B006
        before: Annotated[int | None, Query(ge=0, le=2**53, description="`next` of the page before")] = None,
        limit: Annotated[int, Query(ge=1, le=500)] = 100,
    ) -> Response:
        """A page of jobs."""
        labels = dict(_assignment(one) for one in label)
        page = store.page(states=state, owner=owner, name=name, labels=labels, before=before, limit=limit)
        return _json(
            page.model_copy(update={"jobs": [job.model_copy(update=service.linked(job)) for job in page.jobs]})
        )

    @app.get("/v1/jobs/{job}", response_model=JobDetails, summary="One job, its attempts and its spec")
    def one(job: str, token: ReadToken) -> Response:
        """All that is known of a job but its log and its events."""
        return _json(details(job))

    @app.delete("/v1/jobs/{job}", summary="Cancel a job")
    def cancel(job: str, request: Request, token: SubmitToken) -> JobDetails:
        """Stop its workers and mark its MLflow run KILLED. A job that is over stays as it is."""
        require_owner(job, token)
        store.cancel(job, token.name)
        service.changed(request, "cancel", job=job)
        return details(job)

    @app.post("/v1/jobs/{job}/retry", summary="Queue a failed or cancelled job again")
    def retry(job: str, request: Request, token: SubmitToken) -> JobDetails:
        """It goes on from its last checkpoint, in the same MLflow run."""
        require_owner(job, token)
        store.retry(job, token.name)
        service.changed(request, "retry", job=job)
        return details(job)

    @app.get("/v1/jobs/{job}/logs", response_model=LogPage, summary="Lines of a job's log")
    def logs(job: str, token: ReadToken, offset: Annotated[int, Query(ge=0, le=2**53)] = 0) -> Response:
        """All attempts in order, from an offset; `next` is the offset of what follows."""
        return _json(log_page(job, offset))

    @app.get("/v1/jobs/{job}/logs/stream", response_class=EventSourceResponse, summary="The log as it is written")
    async def log_stream(
        job: str,
        token: ReadToken,
        offset: Annotated[int, Query(ge=0, le=2**53)] = 0,
        last_event_id: Annotated[str | None, Header(max_length=32)] = None,
    ) -> AsyncIterator[ServerSentEvent]:
        """Server-sent events, each some lines; their id is the offset of what follows. Ends with the job."""
        offset = _resumed(last_event_id, offset)
        while True:
            page = await asyncio.to_thread(log_page, job, offset)
            if page.lines:
                yield ServerSentEvent(data=page.lines, id=str(page.next), event="lines")
            offset = page.next
            if page.ended:
                yield ServerSentEvent(data=None, event="end")
                return
            if not page.lines:
                await asyncio.sleep(FOLLOWING)

    @app.get("/v1/jobs/{job}/events", response_model=EventPage, summary="The history of a job")
    def events(job: str, token: ReadToken, after: Annotated[int, Query(ge=0, le=2**53)] = 0) -> Response:
        """Its states, stages and errors, oldest first."""
        return _json(EventPage(events=store.events(job, after)))

    @app.get("/v1/jobs/{job}/events/stream", response_class=EventSourceResponse, summary="The history as it happens")
    async def event_stream(
        job: str,
        token: ReadToken,
        after: Annotated[int, Query(ge=0, le=2**53)] = 0,
        last_event_id: Annotated[str | None, Header(max_length=32)] = None,
    ) -> AsyncIterator[ServerSentEvent]:
        """Server-sent events of two kinds: `event` (see `/events`) and `progress`. Ends with the job."""
        after, progress = _resumed(last_event_id, after), None
        while True:
            found = await asyncio.to_thread(store.job, job)
            for event in await asyncio.to_thread(store.events, job, after):
                after = event.id
                yield ServerSentEvent(data=event, id=str(event.id), event="event")
            if found.progress is not None and found.progress != progress:
                progress = found.progress
                yield ServerSentEvent(data=progress, event="progress")
            if found.state.final:
                yield ServerSentEvent(data=None, event="end")
                return
            await asyncio.sleep(FOLLOWING)

    @app.get("/v1/cluster", summary="Nodes, who holds what, who waits for what")
    def cluster(token: ReadToken) -> ClusterView:
        """What the controller saw last."""
        return _view(service)

    add_node_routes(app, service)

    @app.put("/v1/drain", summary="Stop what runs until later, and start nothing")
    def drain(request: Request, token: AdminToken) -> ClusterView:
        """Each job goes on from its last checkpoint once draining has ended; what is submitted meanwhile waits."""
        store.drain(True)
        service.changed(request, "drain")
        return _view(service)

    @app.delete("/v1/drain", summary="End draining")
    def end_drain(request: Request, token: AdminToken) -> ClusterView:
        """What was stopped goes on first."""
        store.drain(False)
        service.changed(request, "end drain")
        return _view(service)

    @app.post("/v1/tokens", status_code=201, summary="Make a token")
    def create_token(wanted: TokenRequest, request: Request, token: AdminToken) -> NewToken:
        """The answer holds its secret, which is told this once."""
        made = store.create_token(wanted)
        service.changed(request, "create token", token=made.name, role=made.role.value)
        return made

    @app.get("/v1/tokens", summary="List tokens")
    def tokens(token: AdminToken) -> TokenList:
        """All of them, without their secrets."""
        return TokenList(tokens=store.tokens())

    @app.get("/v1/tokens/self", summary="The token of the request")
    def own_token(token: AnyToken) -> Token:
        """Without its secret; other servers ask here what a token allows."""
        return token

    @app.delete("/v1/tokens/{name}", summary="Revoke a token")
    def revoke(name: str, request: Request, token: AdminToken) -> Token:
        """It is refused from now on."""
        revoked = store.revoke(name)
        service.changed(request, "revoke token", token=name)
        return revoked

    @app.get("/health", summary="Whether the process lives")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", summary="Whether it looks at the cluster")
    def ready(response: Response) -> dict[str, Any]:
        """It is ready even while the cluster is away: jobs are then queued."""
        seen, looked = service.seen()
        looks = looked > 0 and time.monotonic() - looked < STALE
        response.status_code = 200 if looks else 503
        return {"ready": looks, "cluster": {"up": seen.cluster.away is None, "error": seen.cluster.away}}

    @app.get("/metrics", summary="Counters for Prometheus")
    def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    protect(app, max_bytes=MAX_BODY, loopback=loopback)
    return app


def read_submission(body: bytes, content_type: str, request: Request) -> Submission:
    """What a request asks for.

    Raises:
        SpecError: it is neither JSON nor YAML, or a field is wrong.
    """
    kind = content_type.partition(";")[0].strip().lower()
    try:
        if kind in ("application/yaml", "application/x-yaml", "text/yaml"):
            query = request.query_params
            document: Any = {
                name: yaml.safe_load(query[name]) for name in ("priority", "timeout", "wait") if name in query
            }
            document["labels"] = dict(_assignment(one) for one in query.getlist("label"))
            document["origin"] = query.get("origin")
            document["spec"] = body.decode()
        else:
            document = json.loads(body)
        return Submission.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "body"
        raise SpecError(f"{place}: {first['msg']}", hint="see /docs") from None
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise SpecError(f"body: neither JSON nor YAML: {reason}", hint="name its Content-Type") from None


def _json(document: BaseModel) -> Response:
    # FastAPI would check what is checked already, which takes as long again as the answer.
    return Response(document.model_dump_json(), media_type="application/json")


def _assignment(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise SpecError(f"label: {text[:100]!r} is no NAME=VALUE", hint="write it as team=vision")
    return name, value


def _resumed(last_event_id: str | None, start: int) -> int:
    """Where a client goes on that was cut off; browsers say so by themselves."""
    return int(last_event_id) if last_event_id is not None and last_event_id.isdecimal() else start


def _view(service: ApiContext) -> ClusterView:
    seen, _ = service.seen()
    jobs = service.store.unfinished()
    holding = [(job, job.attempt) for job in jobs if job.attempt is not None]
    used = {"CPU": 0, "GPU": 0}
    for _, attempt in holding:
        used["GPU" if attempt.placement.gpu else "CPU"] += attempt.placement.workers
    cluster = seen.cluster
    return ClusterView(
        away=cluster.away,
        draining=service.store.draining,
        nodes=[
            Node(id=n.id, address=n.address, cpus=n.resources.get("CPU", 0), gpus=n.resources.get("GPU", 0))
            for n in seen.nodes
        ],
        cpus=cluster.cpus,
        gpus=cluster.gpus,
        free_cpus=max(0.0, cluster.cpus - used["CPU"]),
        free_gpus=max(0.0, cluster.gpus - used["GPU"]),
        holding=[
            Holder(job=job.id, workers=attempt.placement.workers, device="gpu" if attempt.placement.gpu else "cpu")
            for job, attempt in holding
        ],
        waiting=[
            Waiting(job=job.id, priority=job.priority, reason=job.reason)
            for job in sorted(jobs, key=policy.place_in_queue)
            if job.attempt is None
        ],
    )


_SUBMISSION: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": Submission.model_json_schema()},
            "application/yaml": {"schema": {"type": "string", "description": "a job spec"}},
        },
    }
}
