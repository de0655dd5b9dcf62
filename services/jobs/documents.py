"""Requests and responses of the job service, shared by its API and its client."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from services.jobs.states import State
from services.tokens import Role, Token

LABEL = r"^[A-Za-z0-9][\w./-]{0,62}$"


class Document(BaseModel):
    """Base class of responses."""

    # Build validators at first use: a command needs only two or three.
    model_config = ConfigDict(frozen=True, defer_build=True)


class Submission(BaseModel):
    """Body of a job submission."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    spec: dict[str, Any] | Annotated[str, Field(max_length=2**18)] = Field(
        description="job spec: an object, or a string in YAML; `monge schema` describes it"
    )
    overrides: list[Annotated[str, Field(max_length=4096)]] = Field(
        default=[], max_length=256, description="fields to change, such as `train.images=20000`"
    )
    priority: int = Field(default=0, ge=-100, le=100, description="jobs with higher priority start first")
    timeout: float | None = Field(default=None, gt=0, le=10**9, description="seconds from the first start")
    labels: dict[Annotated[str, Field(pattern=LABEL)], Annotated[str, Field(max_length=256)]] = Field(
        default={}, max_length=32, description="labels to find the job by: `GET /v1/jobs?label=team=vision`"
    )
    wait: bool = Field(default=False, description="queue the job even if the cluster is too small for it now")
    origin: str | None = Field(
        default=None,
        max_length=224,
        description="job to continue, which must have ended: `JOB` for its latest checkpoint, or `JOB@IMAGES`",
    )


class JobProgress(Document):
    """Progress of a job.

    Attributes:
        images: number of images seen so far.
        total: number of images to see.
        images_per_second: rate of the current attempt.
        seconds_left: estimated remaining time in seconds.
        metrics: latest value of each metric.
    """

    images: int
    total: int
    images_per_second: float | None = None
    seconds_left: float | None = None
    metrics: dict[str, float] = {}


class Job(Document):
    """A job.

    Attributes:
        id: id of the job.
        number: position in the order of submission, from 1.
        name, kind: name and objective kind from the spec.
        state: state of the job, the reason, and the time of the last change.
        submitted, started, ended: times of submission, first start and end.
        owner: name of the token that submitted it.
        priority, labels, timeout: as submitted.
        attempts: number of attempts so far.
        progress: progress of the latest attempt.
        run_id, run_url: id and URL of its MLflow run, or None.
        model: model that the job registered, as ``name/version``.
        origin: job that this one continues, as ``JOB@IMAGES``, or ``JOB`` if the service cannot see the checkpoints.
    """

    id: str
    number: int
    name: str
    kind: str
    state: State
    reason: str
    since: datetime
    submitted: datetime
    started: datetime | None
    ended: datetime | None
    owner: str
    priority: int
    labels: dict[str, str]
    timeout: float | None
    attempts: int
    progress: JobProgress | None
    run_id: str | None
    run_url: str | None
    model: str | None
    origin: str | None = None


class Attempt(Document):
    """One attempt of a job.

    Attributes:
        number: number of the attempt: 1, 2, …
        started, ended: times of start and end.
        outcome: None until it ends; then succeeded, failed, lost (its driver or its cluster died), stopped, …
        message: reason of its end.
    """

    number: int
    started: datetime
    ended: datetime | None
    outcome: str | None
    message: str | None


class JobDetails(Job):
    """A job with its attempts and its spec."""

    attempt_list: list[Attempt]
    spec: dict[str, Any]


class DryRun(Document):
    """Summary of a job before submission.

    Attributes:
        lines: lines of text on the data, the network, the workers, and when the job could start.
    """

    lines: list[str]


class JobPage(Document):
    """Jobs, newest first; ``next`` is the ``before`` of the next page, None on the last one."""

    jobs: list[Job]
    next: int | None


class Event(Document):
    """An event in the history of a job.

    Attributes:
        id: increasing number; pass it as ``after`` to get later events.
        at: time of the event.
        attempt: number of the attempt; 0 before the first.
        kind: ``state`` (new state or reason of the job), ``stage`` (new stage of an attempt) or ``error``.
        text: description.
        state: new state of the job, for the kind ``state``.
    """

    id: int
    at: datetime
    attempt: int
    kind: str
    text: str
    state: State | None


class EventPage(Document):
    """Events, oldest first."""

    events: list[Event]


class LogPage(Document):
    """Lines of the log of a job, all attempts in order.

    Attributes:
        lines: complete lines.
        next: ``offset`` of the next page.
        ended: whether the log is complete.
    """

    lines: list[str]
    next: int
    ended: bool


class Node(Document):
    """A node of the cluster."""

    id: str
    address: str
    cpus: float
    gpus: float


class NodeUse(Node):
    """A node of the cluster and its used resources.

    Attributes:
        used_cpus, used_gpus: resources held by tasks, actors and jobs; None if unknown.
        head: whether the node is the head.
        draining: whether the node is draining.
    """

    used_cpus: float | None
    used_gpus: float | None
    head: bool
    draining: bool


class NodeList(Document):
    """Nodes that are alive."""

    nodes: list[NodeUse]


class Holder(Document):
    """A job that holds workers."""

    job: str
    workers: int
    device: str


class Waiting(Document):
    """A job that waits, and the reason."""

    job: str
    priority: int
    reason: str


class ClusterView(Document):
    """State of the cluster, jobs that hold workers, and jobs that wait.

    Attributes:
        away: reason why the cluster is unreachable; None if it is reachable.
        draining: whether the service is draining.
        nodes: nodes that are alive.
        cpus, gpus: total resources of all nodes.
        free_cpus, free_gpus: resources that no job holds.
        holding, waiting: jobs that hold workers, and jobs that wait.
    """

    away: str | None
    draining: bool
    nodes: list[Node]
    cpus: float
    gpus: float
    free_cpus: float
    free_gpus: float
    holding: list[Holder]
    waiting: list[Waiting]


class Joining(Document):
    """What a machine needs to join the cluster.

    Attributes:
        ray_address: address of the head, ``host:port``.
        ray_token: token of the cluster; empty if it requires none.
        mlflow_uri, transport_url: addresses of services that workers use; the transport service may be None.
        home: path of the head's home folder, which all nodes share if there is no storage in S3.
        home_id: id of that folder.
        versions: required versions on all nodes, by name.
        storage: S3 address of the shared data; None if nodes share the home folder.
    """

    ray_address: str
    ray_token: str = Field(repr=False)
    mlflow_uri: str
    transport_url: str | None
    home: str
    home_id: str
    versions: dict[str, str]
    storage: str | None = None


class TokenRequest(BaseModel):
    """Body of a request to create a token."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.@-]{0,62}$", description="name of the user or service; unique")
    role: Role
    requests_per_second: float = Field(default=100, gt=0, le=10_000)
    max_jobs: int = Field(default=1000, ge=0, le=10**6, description="maximum number of unfinished jobs")


class NewToken(Token):
    """A token with its secret, which is shown only here."""

    secret: str


class TokenList(Document):
    """All tokens."""

    tokens: list[Token]
