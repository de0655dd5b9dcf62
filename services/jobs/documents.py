"""What the job service sends and receives, as its API and its client know it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from services.jobs.states import State
from services.tokens import Role, Token

LABEL = r"^[A-Za-z0-9][\w./-]{0,62}$"


class Document(BaseModel):
    """Part of an answer."""

    # Each is built when it is first used: a command needs two or three.
    model_config = ConfigDict(frozen=True, defer_build=True)


class Submission(BaseModel):
    """A job to submit."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    spec: dict[str, Any] | Annotated[str, Field(max_length=2**18)] = Field(
        description="the job spec: an object, or a text in YAML; `monge schema` describes it"
    )
    overrides: list[Annotated[str, Field(max_length=4096)]] = Field(
        default=[], max_length=256, description="fields to change, as `train.images=20000`"
    )
    priority: int = Field(default=0, ge=-100, le=100, description="higher ones start first")
    timeout: float | None = Field(default=None, gt=0, le=10**9, description="seconds from its first start on")
    labels: dict[Annotated[str, Field(pattern=LABEL)], Annotated[str, Field(max_length=256)]] = Field(
        default={}, max_length=32, description="to find it again: `GET /v1/jobs?label=team=vision`"
    )
    wait: bool = Field(default=False, description="accept it even if the cluster has too few nodes today")
    origin: str | None = Field(
        default=None,
        max_length=224,
        description="continue this job that is over: `JOB`, from its latest checkpoint, or `JOB@IMAGES`",
    )


class JobProgress(Document):
    """How far a job is.

    Attributes:
        images: seen so far.
        total: to see.
        images_per_second: of this attempt.
        seconds_left: at that speed.
        metrics: the latest value of each.
    """

    images: int
    total: int
    images_per_second: float | None = None
    seconds_left: float | None = None
    metrics: dict[str, float] = {}


class Job(Document):
    """A job.

    Attributes:
        id: of the job.
        number: order of submission, from 1.
        name, kind: of its spec.
        state: of it, with its reason, since when.
        submitted, started, ended: when.
        owner: name of the token that submitted it.
        priority, labels, timeout: as submitted.
        attempts: made so far.
        progress: of the latest attempt.
        run_id, run_url: of its MLflow run, once it has one.
        model: what it registered, as ``name/version``.
        origin: the job that it continues, as ``JOB@IMAGES``; without the images where the service could not see them.
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
    """One attempt at a job.

    Attributes:
        number: 1, 2, …
        started, ended: when.
        outcome: of it, once it has ended: succeeded, failed, lost (its driver died, or its cluster), stopped, …
        message: what is known of its end.
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
    """What a job would do.

    Attributes:
        lines: for a person: its data, its network, its workers, and when it could start.
    """

    lines: list[str]


class JobPage(Document):
    """Jobs, newest first; ``next`` is the ``before`` of the following page, None on the last one."""

    jobs: list[Job]
    next: int | None


class Event(Document):
    """A moment in the history of a job.

    Attributes:
        id: grows; the ``after`` of what follows.
        at: when.
        attempt: in which, 0 before the first.
        kind: ``state`` (the job has another state or reason), ``stage`` (an attempt does something else), ``error``.
        text: in words.
        state: of the job from then on, for a ``state``.
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
    """Lines of a job's log, all attempts in order.

    Attributes:
        lines: whole ones.
        next: the ``offset`` of what follows.
        ended: whether nothing will follow.
    """

    lines: list[str]
    next: int
    ended: bool


class Node(Document):
    """A machine of the cluster."""

    id: str
    address: str
    cpus: float
    gpus: float


class NodeUse(Node):
    """A machine of the cluster, as it is now.

    Attributes:
        used_cpus, used_gpus: that tasks, actors and jobs hold; None where the cluster does not say.
        head: whether it is the head.
        draining: whether it is being taken out.
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
    """A job that waits, and for what."""

    job: str
    priority: int
    reason: str


class ClusterView(Document):
    """The cluster, who holds what, and who waits for what.

    Attributes:
        away: why it does not answer; None while it does.
        draining: whether nothing new starts.
        nodes: that are alive.
        cpus, gpus: of all nodes.
        free_cpus, free_gpus: that no job holds.
        holding, waiting: jobs.
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
    """What a machine needs to know to join the cluster.

    Attributes:
        ray_address: of the head, ``host:port``.
        ray_token: of the cluster, empty where it asks for none.
        mlflow_uri, transport_url: that workers ask; the latter None where it is not known.
        home: path of the head's home folder, which all nodes share where there is no storage in S3.
        home_id: by which it is known again.
        versions: that all nodes have, by name.
        storage: address in S3 of what nodes share, None where that is the home folder.
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
    """A token to make."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.@-]{0,62}$", description="who will use it; unique")
    role: Role
    requests_per_second: float = Field(default=100, gt=0, le=10_000)
    max_jobs: int = Field(default=1000, ge=0, le=10**6, description="jobs of it that are not over")


class NewToken(Token):
    """A token with its secret, which is told this once."""

    secret: str


class TokenList(Document):
    """All tokens."""

    tokens: list[Token]
