"""The MLflow run of a job, across restarts; used on rank 0 only.

Logging must not block or stop training: entries go to an :class:`~services.tracking.outbox.Outbox`, whose thread
sends them, and keeps them while the server is unreachable. Steps are numbers of images seen.
"""

from __future__ import annotations

import io
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from pipelines.errors import ServiceError
from pipelines.evaluation.result import Evaluation
from pipelines.spec import JobSpec
from services.tracking.connection import brief, can_retry_call, connect, metric_name, mlflow_errors
from services.tracking.entries import File, LogEntry, Picture, Point, Tag
from services.tracking.opening import EXPERIMENT, LONGEST_PARAM, Opened, find, open_run
from services.tracking.outbox import Outbox

if TYPE_CHECKING:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
    from mlflow.tracking import MlflowClient

STATE_TAG, REASON_TAG = "monge.state", "monge.reason"
ORIGIN_TAG = "monge.from"
"""Tag of a run that continues from a checkpoint of another job: ``JOB@IMAGES``."""

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

_SYSTEM_METRICS_EVERY = 10.0

log = logging.getLogger(__name__)


class Run:
    """The MLflow run of a job. Created by :meth:`open` or :meth:`later`; methods may be called from any thread.

    Attributes:
        uri: URI of the tracking server or store.
    """

    def __init__(self, uri: str, opening: Callable[[], Opened], on_open: Callable[[Run], None]) -> None:
        self.uri = uri
        self._opening, self._on_open = opening, on_open
        self._opened: Opened | None = None
        self._refused: ServiceError | None = None
        self._guard = threading.Lock()
        self._images = 0
        self._not_finite: set[str] = set()
        self._closed = False
        self._monitor: SystemMetricsMonitor | None = None
        self._next_sample = 0.0
        self._outbox: Outbox[LogEntry] = Outbox(
            self._send, can_retry_call, joins=lambda entry: isinstance(entry, Point), tick=self._sample_system
        )

    @property
    def run_id(self) -> str:
        """MLflow's id of the run.

        Raises:
            ServiceError: the run is not open yet, and MLflow is unreachable.
        """
        return self._open().run_id

    @property
    def experiment_id(self) -> str:
        """MLflow's id of the experiment of the run; raises like :attr:`run_id`."""
        return self._open().experiment_id

    def _open(self) -> Opened:
        with self._guard:
            if self._opened is not None:
                return self._opened
            try:
                opened = self._opening()
            except ServiceError as error:
                self._refused = None if can_retry_call(error) else error
                raise
            self._monitor = _system_monitor(self.uri, opened.run_id)
            self._next_sample = time.monotonic() + _SYSTEM_METRICS_EVERY
            self._opened, self._refused = opened, None
        self._on_open(self)
        return opened

    @classmethod
    def open(
        cls,
        uri: str,
        job: str,
        spec: JobSpec,
        run_id: str | None = None,
        parent: str | None = None,
        name: str | None = None,
    ) -> Run:
        """Create the run of a job, or reopen it after a restart; its status becomes RUNNING.

        A job has one run: without ``run_id``, search for the run with the job's id before creating one. Points and
        pictures that an earlier attempt has logged are not logged again.

        Args:
            uri: URI of the tracking server (``http://…``) or store (``sqlite:///…``).
            job: id of the job.
            spec: resolved spec; its fields become parameters, and the whole spec the artifact ``spec.yaml``.
            run_id: id of the run of an earlier attempt, if known.
            parent: id of the parent run of a new run.
            name: name of a new run; by default that of the spec.

        Raises:
            ServiceError: MLflow is unreachable, or the run was deleted or belongs to another spec.
        """
        opened = open_run(uri, job, spec, run_id, parent, name)
        run = cls(uri, lambda: opened, lambda _: None)
        run._open()
        return run

    @classmethod
    def later(cls, uri: str, job: str, spec: JobSpec, on_open: Callable[[Run], None] = lambda _: None) -> Run:
        """Open the run in the background as soon as MLflow is reachable; entries logged before are kept.

        Args:
            uri, job, spec: see :meth:`open`.
            on_open: called on the background thread when the run is open.
        """
        return cls(uri, lambda: open_run(uri, job, spec), on_open)

    def metrics(self, values: Mapping[str, float], images: int) -> None:
        """Log one point of each metric; returns at once.

        Values that are not finite are omitted, since the stores turn infinity into 1.8e308, which flattens the rest of
        the curve. The first one of each name is stored as the tag ``not_finite.<name>``.

        Args:
            values: values by name; invalid characters in a name become ``_``.
            images: number of images seen so far.

        Raises:
            ServiceError: the run cannot be opened: it was deleted or belongs to another spec.
        """
        if self._refused is not None:
            raise self._refused
        self._images = max(self._images, images)
        now = _now()
        for name, number in values.items():
            name, value = metric_name(name), float(number)
            if math.isfinite(value):
                self._outbox.put(Point(name, value, images, now))
            elif name not in self._not_finite:
                self._not_finite.add(name)
                log.warning("metric %s is %s at %d images", name, value, images)
                self._outbox.put(Tag(f"not_finite.{name}", f"{value} at {images} images"))

    def image(self, name: str, png: np.ndarray, images: int) -> None:
        """Log an image of a series; the UI shows the series with a slider over steps.

        Args:
            name: name of the series, such as ``samples``.
            png: image, (h, w) or (h, w, 3) uint8.
            images: number of images seen so far.

        Raises:
            ValueError: the array has another shape or dtype.
        """
        if png.dtype != np.uint8 or not (png.ndim == 2 or (png.ndim == 3 and png.shape[2] in (1, 3, 4))):
            raise ValueError(f"expected (h, w) or (h, w, 3) uint8, received {png.shape} {png.dtype}")
        self._outbox.put(Picture(re.sub(r"[^a-zA-Z0-9_\-./ ]", "_", name), png.copy(), images, _now()))

    def pictures(self, evaluation: Evaluation, images: int) -> None:
        """Log the pictures and tags of an evaluation; its metrics are logged by :meth:`metrics`."""
        for name, picture in evaluation.pictures.items():
            self.image(name, picture, images)
        for name, value in evaluation.tags.items():
            self.tag(name, value)

    def figure(self, name: str, path: str | Path) -> None:
        """Log a file as the artifact ``figures/<name>`` with the file's suffix; it is read now and sent later.

        Raises:
            OSError: the file cannot be read.
        """
        path = Path(path)
        self._outbox.put(File(f"figures/{re.sub(r'[^a-zA-Z0-9_.-]', '_', name)}{path.suffix}", path.read_bytes()))

    def tag(self, name: str, value: str) -> None:
        """Set a tag of the run."""
        self._outbox.put(Tag(name, value))

    def unsent(self) -> list[LogEntry]:
        """Return the entries that MLflow has not received; a checkpoint stores them for :meth:`send_again`."""
        return self._outbox.waiting()

    def send_again(self, entries: Sequence[LogEntry]) -> None:
        """Send entries that an earlier attempt of the job had not sent, except those that have arrived since."""
        for entry in entries:
            self._outbox.put(entry)

    def flush(self, timeout: float = 30.0) -> None:
        """Wait until all entries are stored.

        Raises:
            ServiceError: entries remain after ``timeout`` seconds; they are kept and retried.
        """
        self._report(self._outbox.flush(timeout))
        self._open()

    def close(self, status: RunStatus = "FINISHED", timeout: float = 30.0) -> None:
        """Send the remaining entries and set the final status. After success, further calls have no effect.

        Args:
            status: final status of the run.
            timeout: seconds to retry.

        Raises:
            ServiceError: the entries or the status could not be stored.
        """
        if self._closed:
            return
        failure = self._outbox.close(timeout)
        if self._outbox.dropped:
            log.warning("tracking lost %d entries", self._outbox.dropped)
        self._report(failure)
        opened = self._open()
        with mlflow_errors(self.uri, f"close run {opened.run_id} as {status}"):
            opened.client.set_terminated(opened.run_id, status)
        self._closed = True

    def _report(self, failure: BaseException | None) -> None:
        if failure is not None:
            raise ServiceError(
                f"MLflow at {self.uri} has not received {len(self._outbox)} entries: {brief(failure)}",
                hint="check that the MLflow server is running (`monge status`)",
            ) from failure

    def _send(self, entries: list[LogEntry]) -> None:
        from mlflow.entities import Metric

        opened = self._open()
        client, run_id = opened.client, opened.run_id
        entries = [entry for entry in entries if not opened.delivered.has(entry)]
        points = [e for e in entries if isinstance(e, Point)]
        if points:
            # The stores ignore duplicate points, so a batch may be sent twice.
            client.log_batch(run_id, [Metric(p.name, p.value, p.milliseconds, p.images) for p in points])
        for entry in entries:
            match entry:
                case Picture(name, pixels, images, milliseconds):
                    client.log_image(run_id, pixels, key=name, step=images, timestamp=milliseconds, synchronous=True)
                case File(path, content):
                    client.log_stream(run_id, io.BytesIO(content), path)
                case Tag(name, value):
                    client.set_tag(run_id, name, value)

    def _sample_system(self) -> None:
        self._open()  # open it early: other processes look for the run
        if self._monitor is None or time.monotonic() < self._next_sample:
            return
        self._next_sample = time.monotonic() + _SYSTEM_METRICS_EVERY
        self._monitor.collect_metrics()
        values = self._monitor.aggregate_metrics()
        for device in self._monitor.monitors:
            device.clear_metrics()
        self.metrics({f"system/{name}": value for name, value in values.items()}, self._images)


def find_run(uri: str, job: str) -> str | None:
    """Return the id of the run of a job; None if there is none yet.

    Raises:
        ServiceError: MLflow is unreachable.
    """
    client = connect(uri)
    with mlflow_errors(uri, f"look for the run of job {job!r}"):
        experiment = client.get_experiment_by_name(EXPERIMENT)
        return find(client, experiment.experiment_id, job) if experiment is not None else None


@dataclass(frozen=True)
class LoggedRun:
    """Logged data of a run.

    Attributes:
        latest: last value of each metric.
        series: all values of the requested metrics.
        tags: tags of the run.
    """

    latest: Mapping[str, float]
    series: Mapping[str, list[float]]
    tags: Mapping[str, str]


def read_run(uri: str, job: str, series: Sequence[str] = ()) -> LoggedRun:
    """Return the logged data of the run of a job.

    Args:
        uri: URI of the tracking server or store.
        job: id of the job.
        series: names of the metrics whose values are all returned.

    Raises:
        ServiceError: MLflow is unreachable, or the job has no run.
    """
    run_id = find_run(uri, job)
    if run_id is None:
        raise ServiceError(f"MLflow at {uri} has no run of job {job!r}", hint="see `monge jobs`")
    client = connect(uri)
    with mlflow_errors(uri, f"read run {run_id}"):
        data = client.get_run(run_id).data
        curves = {name: [point.value for point in client.get_metric_history(run_id, name)] for name in series}
    return LoggedRun(data.metrics, curves, data.tags)


def mark(uri: str, run_id: str, state: str, reason: str) -> None:
    """Mark the state of the job in its run: by tags, and by the status if the job ended and its driver did not set it.

    Args:
        uri: URI of the tracking server or store.
        run_id: id of the run.
        state: state of the job.
        reason: reason of the state.

    Raises:
        ServiceError: MLflow is unreachable or the run does not exist.
    """
    client = connect(uri)
    with mlflow_errors(uri, f"mark run {run_id} as {state}"):
        client.set_tag(run_id, STATE_TAG, state)
        client.set_tag(run_id, REASON_TAG, reason[:LONGEST_PARAM])
        status = {"failed": "FAILED", "cancelled": "KILLED"}.get(state)
        if status is not None:
            _end(client, run_id, status)


def mark_killed(uri: str, run_id: str) -> None:
    """Close the run of a cancelled job; a run that has ended keeps its status.

    Raises:
        ServiceError: MLflow is unreachable or the run does not exist.
    """
    client = connect(uri)
    with mlflow_errors(uri, f"mark run {run_id} as KILLED"):
        _end(client, run_id, "KILLED")


def _end(client: MlflowClient, run_id: str, status: str) -> None:
    if client.get_run(run_id).info.status in ("RUNNING", "SCHEDULED"):
        client.set_terminated(run_id, status)


def _system_monitor(uri: str, run_id: str) -> SystemMetricsMonitor | None:
    """Return MLflow's collectors of CPU, memory, disk, network and GPU metrics.

    Only the collectors: MLflow's thread stops permanently when the server is unreachable once.
    """
    try:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        return SystemMetricsMonitor(run_id, tracking_uri=uri)
    except Exception as error:
        log.warning("no system metrics: %s", error)
        return None


def _now() -> int:
    return int(time.time() * 1000)
