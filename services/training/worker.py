"""What runs on each worker of a job: the composition root, where spec, data, network, planner and tracker meet."""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.torch import get_device

from pipelines.data.loader import ShardedDataset
from pipelines.distributed import agree, rank, world_size
from pipelines.errors import (
    CheckpointError,
    DivergedError,
    ModelNotFoundError,
    NotConvergedError,
    ObjectNotFoundError,
    ProblemError,
    ServiceError,
    ShardError,
    SpecError,
    StorageError,
    SupersededError,
    TooLargeError,
)
from pipelines.evaluation.result import Evaluation
from pipelines.models.bundle import Bundle
from pipelines.spec import JobSpec
from pipelines.training.checkpoint import save_checkpoint
from pipelines.training.health import ailments
from pipelines.training.position import Position
from pipelines.training.run import run_training, start_run
from pipelines.training.state import TrainState
from pipelines.transport.planner import LocalPlanner, Planner
from services.settings import Settings
from services.storage.datasets import open_data
from services.tracking.connection import can_retry_call
from services.tracking.entries import LogEntry, read_entries, write_entries
from services.tracking.registry import register
from services.tracking.run import ORIGIN_TAG, Run
from services.training.checkpoints import Resumption, resumption
from services.training.config import WorkerConfig, jobs_address, models_folder, staging_folder
from services.training.fencing import Fence
from services.training.origin import Origin
from services.training.progress import report_progress, report_run, report_stage
from services.training.references import feature_networks, reference_of
from services.training.stopping import StopRequest
from services.training.uploads import Uploads
from services.training.watch import Watch
from services.transport.client import RayPlanner

Result = TypeVar("Result")

FINAL = (
    SpecError,
    ShardError,
    CheckpointError,
    DivergedError,
    ProblemError,
    TooLargeError,
    NotConvergedError,
    ModelNotFoundError,
    ObjectNotFoundError,
    SupersededError,
)
"""What would happen again: steps are pure functions of the seed."""

SPARE = 60.0
"""Seconds after the ranks' own deadline, which names the rank that is late, until one is taken to hang."""

ARRIVAL, PAUSE = 30.0, 10.0
"""Seconds that MLflow has for what is left at the end of a run, and seconds until it is tried again."""

UPLOAD = 30.0
"""Seconds that the last checkpoint of a run which was asked to stop has to come into the storage."""

EXAMPLES = 2
"""Images in the input example of a registered classifier or encoder."""

log = logging.getLogger(__name__)


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Train on this worker until the job is done; every rank calls it.

    Args:
        config: the fields of a :class:`WorkerConfig`.

    Returns:
        ``{"model": …}`` of the registered model, None where the job registers none; ``{"stopped": images, "saved": …}``
        where the run was asked to stop before its end, and whether a checkpoint could be written then; or ``{"error",
        "hint"}`` for what no restart would mend. All other errors are raised, and Ray Train restarts the workers from
        the latest checkpoint. Either way every rank ends with the same error: see
        :func:`pipelines.distributed.agree`.
    """
    worker = WorkerConfig(**config)
    configure_process()
    settings, position = worker.settings_here(), Position()
    try:
        with Watch(position, rank(), settings.rank_deadline + SPARE), agree("running the job"):
            trained = _train(worker, JobSpec.model_validate(worker.spec), settings, position)
        # Of rank 0 alone, and for as long as MLflow is away: no rank waits for it.
        return trained.ended()
    except FINAL as error:
        return {"error": error.args[0], "hint": error.hint}


@dataclass
class _Trained:
    """A run on this rank once its last step is done, or the one after which it was asked to stop."""

    spec: JobSpec
    state: TrainState
    data: ShardedDataset
    tracker: _Tracker | None
    listener: _Listener

    def ended(self) -> dict[str, Any]:
        """Tell MLflow; what :func:`train_worker` returns."""
        if self.state.images < self.spec.train.images:
            if self.tracker:
                self.tracker.stop()
            return {"stopped": self.state.images, "saved": self.listener.stored()}
        if self.tracker is None:
            return {}
        return {"model": self.tracker.finish(self.state, self.data), "metrics": self.listener.latest}


def _train(worker: WorkerConfig, spec: JobSpec, settings: Settings, position: Position) -> _Trained:
    device = get_device()
    fence = Fence(jobs_address(settings), worker.job, worker.attempt, settings)
    tracker = _Tracker(worker, spec, fence) if rank() == 0 else None
    position.doing = "opening the data"
    with agree("opening the data"):
        data = open_for(spec, worker.data, settings)
    position.doing = "building the networks"
    origin = None if worker.origin is None else Origin.parse(worker.origin)
    with agree("building the networks"), resumption(settings, origin, worker.job) as resumed:
        planner = planner_of(worker.job, spec, settings.plan_deadline)
        networks = feature_networks(spec, worker.mlflow_uri, models_folder(settings), device)
        objective, state = start_run(spec, data, planner, device, resumed.folder, resumed.origin, networks)
        if tracker and resumed.folder:
            tracker.run.send_again(_unsent(resumed.folder))
        elif tracker and origin and resumed.origin:
            tracker.run.tag(ORIGIN_TAG, str(origin.at(state.images)))
        reference = reference_of(spec, worker.mlflow_uri, models_folder(settings), device)
    uploads = Uploads(f"{jobs_address(settings)}/{worker.job}")
    staging = staging_folder(settings, worker.job, worker.attempt)
    if tracker:  # this attempt is the latest one
        for left in set(staging.parent.glob(f"{worker.job}.*")) - {staging}:
            shutil.rmtree(left, ignore_errors=True)
    listener = _Listener(spec, tracker, staging, resumed, uploads)
    if tracker:
        tracker.say(
            f"training {_parameters(state):,} parameters on {len(data.train):,} images, {world_size()} workers, "
            f"{device}" + (f", from image {state.images:,}" if state.images else ""),
            trains=True,
        )
    if tracker and state.precision != getattr(torch, spec.train.precision):
        text = "float32, because not all workers' devices support bfloat16"
        tracker.say(f"precision: {text}", trains=True)
        tracker.run.tag("monge.precision", text)
    with StopRequest(first=tracker is not None) as request:
        run_training(
            spec, data, objective, state, planner, listener, device, reference, lambda: request.asked, position
        )
    return _Trained(spec, state, data, tracker, listener)


def _unsent(folder: Path) -> list[LogEntry]:
    try:
        return read_entries(folder)
    except CheckpointError as error:  # the training itself is whole
        report_stage(f"what MLflow had not taken when the job stopped is lost: {error.args[0]}")
        return []


def configure_process() -> None:
    """Make this process one of many on its machine: one thread, and no chatter of libraries in its log."""
    # Workers share the cores of their machine; more threads than that and they wait for each other.
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s", force=True)
    for chatty in ("ray", "mlflow", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def open_for(spec: JobSpec, address: str, settings: Settings, *, verify: bool = True) -> ShardedDataset:
    """The data set of a run; its ranks verify a part of its shards each.

    Args:
        spec: of the run.
        address: of the data set, as :func:`services.storage.datasets.open_data` takes it.
        settings: of S3, and of the cache of shards.
        verify: compare the shards of a folder with their hashes.

    Raises:
        ShardError: naming the file that is damaged.
        StorageError: S3 refuses, fails or does not answer.
    """
    part = slice(rank(), None, world_size()) if verify else slice(0)
    return open_data(address, settings, part).limited(spec.data.per_class)


def planner_of(job: str, spec: JobSpec, deadline: float) -> Planner:
    """What solves the plans of a run: the transport service, or this process by itself.

    Args:
        job: id of the run.
        spec: its spec.
        deadline: seconds to wait for the other ranks and for a plan of the service.
    """
    # What needs no plan to train is judged by plans all the same.
    if spec.generates and getattr(spec.objective, "plans", "service") == "service":
        return RayPlanner(job, rank(), world_size(), deadline)
    return LocalPlanner()


def _parameters(state: TrainState) -> int:
    return sum(weights.numel() for weights in state.networks[state.served].parameters())


class _Tracker:
    """Rank 0's hold on MLflow, which takes seconds to import, and may be away: the training waits for neither.

    What it writes is written by the latest attempt at the job alone.
    """

    def __init__(self, worker: WorkerConfig, spec: JobSpec, fence: Fence) -> None:
        fence.require()
        self._spec, self.fence = spec, fence
        self._told: set[str] = set()
        self.run = Run.later(
            worker.mlflow_uri, worker.job, spec, on_open=lambda run: report_run(run.run_id, run.experiment_id)
        )

    def say(self, text: str, *, trains: bool = False) -> None:
        report_stage(text, trains=trains)

    def diagnose(self, values: dict[str, float], images: int) -> None:
        """Say what the curves show to be wrong: once in the log, and as a tag with the last image where it showed."""
        for kind, text in ailments(values).items():
            if kind not in self._told:
                self.say(f"{kind} at image {images:,}: {text}", trains=True)
            self._told.add(kind)
            self.run.tag(f"monge.{kind}", f"at image {images:,}: {text}")

    def finish(self, state: TrainState, data: ShardedDataset) -> str | None:
        """Send the rest, register the model and close the run, as soon as MLflow takes them."""
        self._until_taken(lambda: self.run.flush(ARRIVAL))
        model = self._until_taken(lambda: self._register(state, data)) if self._spec.registers else None
        self._until_taken(lambda: self.run.close("FINISHED"))
        return model

    def stop(self) -> None:
        """Close the run of a job that goes on later; its checkpoint has what MLflow does not take now."""
        with suppress(ServiceError):
            self.run.close("KILLED", timeout=PAUSE)

    def _until_taken(self, call: Callable[[], Result]) -> Result:
        while True:
            try:
                self.fence.require()
                return call()
            except StorageError as error:  # whether a later attempt has begun
                self.say(f"the training is over; waiting for the storage: {error.args[0]}")
            except ServiceError as error:
                if not can_retry_call(error):
                    raise
                self.say(f"the training is over; waiting for MLflow: {error.args[0]}")
            time.sleep(PAUSE)

    def _register(self, state: TrainState, data: ShardedDataset) -> str:
        """Register the judged network; returns the model's name and version."""
        target = self._spec.registered
        self.say(f"registering {target.name}@{target.alias}")
        network = state.judged.cpu().eval()
        bundle = Bundle(network, self._spec.model, data.image, data.classes)  # type: ignore[arg-type]
        examples, _ = data.test.take(np.arange(min(EXAMPLES, len(data.test))))
        with tempfile.TemporaryDirectory() as folder:
            bundle.save(folder)
            reference = register(
                self.run, folder, target.name, target.alias, examples=examples.numpy(), images=state.images
            )
        return str(reference)


class _Listener:
    """Hears of the run on every rank; logs on rank 0, and hands checkpoints to Ray Train on all."""

    def __init__(
        self,
        spec: JobSpec,
        tracker: _Tracker | None,
        staging: Path,
        resumed: Resumption,
        uploads: Uploads | None = None,
    ) -> None:
        self._spec = spec
        self._tracker = tracker
        self._staging = staging
        self._resumed = resumed
        self._uploads = uploads
        self.saved = False
        """Whether the latest checkpoint could be written; rank 0 alone knows."""
        self.latest: dict[str, float] = {}

    def metrics(self, values: dict[str, float], images: int) -> None:
        """See :class:`pipelines.training.loop.Listener`."""
        self.latest |= values
        if self._tracker:
            self._tracker.fence.require_if_seen()
            self._tracker.run.metrics(values, images)
            self._tracker.diagnose(values, images)
            report_progress(images, self._spec.train.images, values)

    def evaluation(self, evaluation: Evaluation, images: int) -> None:
        """See :class:`pipelines.training.loop.Listener`."""
        self.metrics(evaluation.metrics, images)
        if self._tracker:
            self._tracker.run.pictures(evaluation, images)

    def checkpoint(self, state: TrainState) -> None:
        """See :class:`pipelines.training.loop.Listener`; every rank comes here, since Ray Train waits for all."""
        with agree("saving a checkpoint"):
            checkpoint = self._written(state, self._tracker.run.unsent()) if self._tracker else None
        name = self._resumed.name(state.images)
        if checkpoint and self._uploads:
            self._uploads.expect(name)
        ray.train.report(
            {"images": state.images, **self.latest},
            checkpoint=checkpoint,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
            checkpoint_upload_fn=self._uploads,
        )

    def stored(self) -> bool:
        """Whether the latest checkpoint is kept; waits until it has been stored."""
        return self.saved and (self._uploads is None or self._uploads.stored(UPLOAD))

    def _written(self, state: TrainState, unsent: list[LogEntry]) -> Checkpoint | None:
        """A checkpoint in a folder of its own. None where it cannot be written: training goes on all the same, since a
        restart would only lose what was computed since the one before."""
        assert self._tracker
        folder = None
        try:
            self._tracker.fence.require()
            self._staging.mkdir(parents=True, exist_ok=True)
            folder = tempfile.mkdtemp(dir=self._staging)
            write_entries(unsent, Path(folder))
            save_checkpoint(state, Path(folder))
        except (OSError, StorageError) as error:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            self.saved = False
            log.warning("cannot write a checkpoint to %s", self._staging, exc_info=error)
            why = error.args[0] if isinstance(error, StorageError) else error
            report_stage(
                f"the checkpoint at image {state.images:,} could not be written, what was kept before stays: {why}",
                trains=True,
            )
            return None
        self.saved = True
        return Checkpoint.from_directory(folder)
