"""HTTP API of the job service: jobs, their events and logs, the cluster, and tokens."""

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
from fastapi.responses import PlainTextResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ValidationError

from pipelines.errors import ForbiddenError, SpecError
from services.error_documents import DESCRIPTIONS
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
"""Maximum size of a request in bytes; a spec has some thousands."""

FOLLOWING = 0.3
"""Seconds between two polls by clients that follow a job."""

STALE = 30.0
"""Maximum age of the last snapshot of the cluster, in seconds, for the service to be ready."""

audit = logging.getLogger("monge.audit")


class ApiContext:
    """Shared state of the routes.

    Args:
        store: persistent state of the service.
        logs: logs of the jobs.
        admission: checks submissions.
        seen: function that returns the controller's latest snapshot of the cluster and its time.
        poke: function that makes the controller act at once.
        mlflow: function that returns the URL of the MLflow UI, for links.
        joining: function that returns what another machine needs to join the cluster.
        nodes: client for the nodes of the cluster.
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
        """Write an audit line and make the controller act."""
        address = request.client.host if request.client else ""
        line = {"who": request.state.token.name, "what": what, "from": address, "request": request.state.request_id}
        audit.info("audit %s", json.dumps(line | details))
        self.poke()

    def linked(self, job: Job) -> dict[str, Any]:
        """Return a job with the full link to its run."""
        return {"run_url": self._mlflow() + job.run_url} if job.run_url else {}


async def _asked(request: Request, token: SubmitToken) -> Submission:
    # Check the token first: the body of an unauthorized request is not read.
    return read_submission(await request.body(), request.headers.get("content-type", ""), request)


Asked = Annotated[Submission, Depends(_asked)]
"""Submission in the body of a request whose token may submit."""


def build_app(service: ApiContext, *, loopback: bool = True, close: Callable[[], None] = lambda: None) -> FastAPI:
    """Return the ASGI application.

    Args:
        service: shared state of the routes.
        loopback: whether the server listens on loopback only; requests from other origins are then refused.
        close: called on shutdown.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(close)

    app = FastAPIOffline(
        title="Monge: jobs",
        description="Submit, list, follow and cancel training jobs.\n\nEvery request needs a token: "
        "`Authorization: Bearer …`. Errors are `{error, message, hint, field?, request_id}`.",
        version="1",
        lifespan=lifespan,
        responses={status: {"description": text} for status, text in DESCRIPTIONS.items() if status != 413},
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
            raise ForbiddenError(f"job {job} belongs to {owner}", hint="only its owner or an administrator can do this")

    @app.post("/v1/jobs", status_code=201, summary="Submit a job", openapi_extra=_SUBMISSION)
    def submit(
        request: Request,
        response: Response,
        asked: Asked,
        idempotency_key: Annotated[str | None, Header(max_length=128)] = None,
    ) -> Job:
        """Queue a job. A request with an `Idempotency-Key` that the token has used before returns the same job.

        The body is `{"spec": …, "priority": …, …}`, or with `Content-Type: application/yaml` only a spec; then
        priority, timeout, wait, origin and labels are query parameters.
        """
        token: Token = request.state.token  # checked by `Asked`
        spec = service.admission.check(asked, service.seen()[0].cluster)
        origin = service.admission.origin(asked, spec, store.job)
        job, new = store.submit(spec, asked, token, idempotency_key, origin)
        if new:
            service.changed(request, "submit", job=job.id)
        else:
            response.status_code = 200
        return job.model_copy(update=service.linked(job))

    @app.post("/v1/plans", summary="Check a job without submitting it", openapi_extra=_SUBMISSION)
    def plan(asked: Asked) -> DryRun:
        """Return the data, the network and the workers of a job. Finds the same errors as a submission, and more."""
        return service.admission.plan(asked, service.seen()[0].cluster, store.job)

    @app.get("/v1/jobs", response_model=JobPage, summary="List jobs, newest first")
    def jobs(
        token: ReadToken,
        state: Annotated[list[State], Query()] = [],  # noqa: B006
        owner: Annotated[str | None, Query(max_length=64)] = None,
        name: Annotated[str | None, Query(max_length=128)] = None,
        label: Annotated[list[str], Query(description="as `team=vision`", max_length=8)] = [],  # noqa: B006
        before: Annotated[int | None, Query(ge=0, le=2**53, description="`next` of the previous page")] = None,
        limit: Annotated[int, Query(ge=1, le=500)] = 100,
    ) -> Response:
        """Return a page of jobs, newest first."""
        labels = dict(_assignment(one) for one in label)
        page = store.page(states=state, owner=owner, name=name, labels=labels, before=before, limit=limit)
        return _json(
            page.model_copy(update={"jobs": [job.model_copy(update=service.linked(job)) for job in page.jobs]})
        )

    @app.get("/v1/jobs/{job}", response_model=JobDetails, summary="Get a job, its attempts and its spec")
    def one(job: str, token: ReadToken) -> Response:
        """Return all data of a job except its log and its events."""
        return _json(details(job))

    @app.delete("/v1/jobs/{job}", summary="Cancel a job")
    def cancel(job: str, request: Request, token: SubmitToken) -> JobDetails:
        """Stop its workers and mark its MLflow run KILLED. A job that has ended is not changed."""
        require_owner(job, token)
        store.cancel(job, token.name)
        service.changed(request, "cancel", job=job)
        return details(job)

    @app.post("/v1/jobs/{job}/retry", summary="Queue a failed or cancelled job again")
    def retry(job: str, request: Request, token: SubmitToken) -> JobDetails:
        """Queue a failed or cancelled job. It resumes from its last checkpoint, in the same MLflow run."""
        require_owner(job, token)
        store.retry(job, token.name)
        service.changed(request, "retry", job=job)
        return details(job)

    @app.get("/v1/jobs/{job}/logs", response_model=LogPage, summary="Get lines of the log of a job")
    def logs(job: str, token: ReadToken, offset: Annotated[int, Query(ge=0, le=2**53)] = 0) -> Response:
        """Return lines of all attempts in order, from an offset; `next` is the offset of the next page."""
        return _json(log_page(job, offset))

    @app.get("/v1/jobs/{job}/logs/stream", response_class=EventSourceResponse, summary="Follow the log of a job")
    async def log_stream(
        job: str,
        token: ReadToken,
        offset: Annotated[int, Query(ge=0, le=2**53)] = 0,
        last_event_id: Annotated[str | None, Header(max_length=32)] = None,
    ) -> AsyncIterator[ServerSentEvent]:
        """Stream lines as server-sent events; the id of an event is the next offset. Ends with the job."""
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

    @app.get("/v1/jobs/{job}/events", response_model=EventPage, summary="Get the history of a job")
    def events(job: str, token: ReadToken, after: Annotated[int, Query(ge=0, le=2**53)] = 0) -> Response:
        """Return states, stages and errors of a job, oldest first."""
        return _json(EventPage(events=store.events(job, after)))

    @app.get("/v1/jobs/{job}/events/stream", response_class=EventSourceResponse, summary="Follow the history of a job")
    async def event_stream(
        job: str,
        token: ReadToken,
        after: Annotated[int, Query(ge=0, le=2**53)] = 0,
        last_event_id: Annotated[str | None, Header(max_length=32)] = None,
    ) -> AsyncIterator[ServerSentEvent]:
        """Stream server-sent events of two kinds: `event` (see `/events`) and `progress`. Ends with the job."""
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

    @app.get("/v1/cluster", summary="Get the state of the cluster, running and waiting jobs")
    def cluster(token: ReadToken) -> ClusterView:
        """Return the latest snapshot of the cluster that the controller has read."""
        return _view(service)

    add_node_routes(app, service)

    @app.put("/v1/drain", summary="Stop all jobs with a checkpoint and start no others")
    def drain(request: Request, token: AdminToken) -> ClusterView:
        """Stop all jobs; each resumes from its last checkpoint when the drain ends. New jobs wait until then."""
        store.drain(True)
        service.changed(request, "drain")
        return _view(service)

    @app.delete("/v1/drain", summary="End draining")
    def end_drain(request: Request, token: AdminToken) -> ClusterView:
        """End the drain. Stopped jobs start first."""
        store.drain(False)
        service.changed(request, "end drain")
        return _view(service)

    @app.post("/v1/tokens", status_code=201, summary="Create a token")
    def create_token(wanted: TokenRequest, request: Request, token: AdminToken) -> NewToken:
        """Create a token. Only this response contains its secret."""
        made = store.create_token(wanted)
        service.changed(request, "create token", token=made.name, role=made.role.value)
        return made

    @app.get("/v1/tokens", summary="List tokens")
    def tokens(token: AdminToken) -> TokenList:
        """Return all tokens, without their secrets."""
        return TokenList(tokens=store.tokens())

    @app.get("/v1/tokens/self", summary="Get the token of the request")
    def own_token(token: AnyToken) -> Token:
        """Return the token without its secret. Other servers use this to check tokens."""
        return token

    @app.delete("/v1/tokens/{name}", summary="Revoke a token")
    def revoke(name: str, request: Request, token: AdminToken) -> Token:
        """Revoke a token; requests with it are refused from now on."""
        revoked = store.revoke(name)
        service.changed(request, "revoke token", token=name)
        return revoked

    @app.get("/health", summary="Check that the process is alive")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", summary="Check that the controller reads the cluster")
    def ready(response: Response) -> dict[str, Any]:
        """Return 200 even if the cluster is unreachable: jobs are then queued."""
        seen, looked = service.seen()
        looks = looked > 0 and time.monotonic() - looked < STALE
        response.status_code = 200 if looks else 503
        return {"ready": looks, "cluster": {"up": seen.cluster.away is None, "error": seen.cluster.away}}

    @app.get("/metrics", response_class=PlainTextResponse, summary="Prometheus metrics")
    def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    protect(app, max_bytes=MAX_BODY, loopback=loopback)
    return app


def read_submission(body: bytes, content_type: str, request: Request) -> Submission:
    """Return the submission in a request.

    Raises:
        SpecError: the body is neither JSON nor YAML, or a field is invalid.
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
        raise SpecError(f"body: neither JSON nor YAML: {reason}", hint="set the Content-Type") from None


def _json(document: BaseModel) -> Response:
    # FastAPI would validate the response again, which takes as long as creating it.
    return Response(document.model_dump_json(), media_type="application/json")


def _assignment(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise SpecError(f"label: {text[:100]!r} is not NAME=VALUE", hint="for example team=vision")
    return name, value


def _resumed(last_event_id: str | None, start: int) -> int:
    """Return the position from which a client resumes; browsers send ``Last-Event-ID`` by themselves."""
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
            "application/yaml": {"schema": {"type": "string", "description": "job spec in YAML"}},
        },
    }
}
