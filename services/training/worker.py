"""The training function of each worker: composition of spec, data, networks, planner and tracker."""

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
"""Errors that would occur again after a restart: steps are pure functions of the seed."""

SPARE = 60.0
"""Seconds beyond the deadline of the ranks before the watchdog acts; the error of the ranks names the late one."""

ARRIVAL, PAUSE = 30.0, 10.0
"""Seconds that MLflow has to receive the remaining metrics of a run, and seconds between tries."""

UPLOAD = 30.0
"""Seconds for the upload of the last checkpoint of a run that was asked to stop."""

EXAMPLES = 2
"""Number of images in the input example of a registered classifier or encoder."""

log = logging.getLogger(__name__)


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Train on this worker until the job is done; every rank must call it.

    Args:
        config: fields of a :class:`WorkerConfig`.

    Returns:
        ``{"model": …}`` with the registered model, None if the job registers none; ``{"stopped": images, "saved": …}``
        if the run was asked to stop, with whether a checkpoint was written; or ``{"error", "hint"}`` for errors that a
        restart would not resolve. All other errors are raised, and Ray Train restarts the workers from the latest
        checkpoint. All ranks end with the same error: see :func:`pipelines.distributed.agree`.
    """
    worker = WorkerConfig(**config)
    configure_process()
    settings, position = worker.settings_here(), Position()
    try:
        with Watch(position, rank(), settings.rank_deadline + SPARE), agree("running the job"):
            trained = _train(worker, JobSpec.model_validate(worker.spec), settings, position)
        # On rank 0 only, while MLflow is unreachable: no other rank waits for it.
        return trained.ended()
    except FINAL as error:
        return {"error": error.args[0], "hint": error.hint}


@dataclass
class _Trained:
    """A run on this rank after its last step, or after the step at which it was asked to stop."""

    spec: JobSpec
    state: TrainState
    data: ShardedDataset
    tracker: _Tracker | None
    listener: _Listener

    def ended(self) -> dict[str, Any]:
        """Finish the MLflow run and return the result of :func:`train_worker`."""
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
    if tracker:  # only if this is the latest attempt
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
    except CheckpointError as error:  # the training itself succeeded
        report_stage(f"metrics that were not sent to MLflow when the job stopped are lost: {error.args[0]}")
        return []


def configure_process() -> None:
    """Configure the process as one of many on its machine: one thread, and few log messages of libraries."""
    # Workers share the cores of their machine; more threads would wait for each other.
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s", force=True)
    for chatty in ("ray", "mlflow", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def open_for(spec: JobSpec, address: str, settings: Settings, *, verify: bool = True) -> ShardedDataset:
    """Open the data set of a run; each rank verifies a part of the shards.

    Args:
        spec: spec of the run.
        address: address of the data set; see :func:`services.storage.datasets.open_data`.
        settings: settings of S3 and of the shard cache.
        verify: whether to compare the shards of a folder with their hashes.

    Raises:
        ShardError: a file is damaged; the message names it.
        StorageError: S3 rejects the request, fails or is unreachable.
    """
    part = slice(rank(), None, world_size()) if verify else slice(0)
    return open_data(address, settings, part).limited(spec.data.per_class)


def planner_of(job: str, spec: JobSpec, deadline: float) -> Planner:
    """Return the planner of a run: the transport service, or a solver in this process.

    Args:
        job: id of the job.
        spec: spec of the run.
        deadline: seconds to wait for the other ranks and for a plan.
    """
    # Objectives that train without plans are still evaluated by plans.
    if spec.generates and getattr(spec.objective, "plans", "service") == "service":
        return RayPlanner(job, rank(), world_size(), deadline)
    return LocalPlanner()


def _parameters(state: TrainState) -> int:
    return sum(weights.numel() for weights in state.networks[state.served].parameters())


class _Tracker:
    """MLflow tracking on rank 0. Training waits neither for the import of MLflow (seconds) nor for the server.

    Only the latest attempt of the job writes.
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
        """Report problems in the metrics: once in the log, and as a tag with the last image at which they occurred."""
        for kind, text in ailments(values).items():
            if kind not in self._told:
                self.say(f"{kind} at image {images:,}: {text}", trains=True)
            self._told.add(kind)
            self.run.tag(f"monge.{kind}", f"at image {images:,}: {text}")

    def finish(self, state: TrainState, data: ShardedDataset) -> str | None:
        """Send the remaining metrics, register the model and close the run, retrying while MLflow is unreachable."""
        self._until_taken(lambda: self.run.flush(ARRIVAL))
        model = self._until_taken(lambda: self._register(state, data)) if self._spec.registers else None
        self._until_taken(lambda: self.run.close("FINISHED"))
        return model

    def stop(self) -> None:
        """Close the run of a job that will resume; its checkpoint keeps metrics that MLflow has not received."""
        with suppress(ServiceError):
            self.run.close("KILLED", timeout=PAUSE)

    def _until_taken(self, call: Callable[[], Result]) -> Result:
        while True:
            try:
                self.fence.require()
                return call()
            except StorageError as error:  # cannot check for a later attempt
                self.say(f"training finished; waiting for the storage: {error.args[0]}")
            except ServiceError as error:
                if not can_retry_call(error):
                    raise
                self.say(f"training finished; waiting for MLflow: {error.args[0]}")
            time.sleep(PAUSE)

    def _register(self, state: TrainState, data: ShardedDataset) -> str:
        """Register the evaluated network and return the name and version of the model."""
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
    """Listener of the training loop: logs on rank 0, and passes checkpoints to Ray Train on all ranks."""

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
        """Whether the latest checkpoint was written; known on rank 0 only."""
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
        """See :class:`pipelines.training.loop.Listener`; called on every rank, since Ray Train waits for all."""
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
        """Wait until the latest checkpoint has been stored; return whether it was."""
        return self.saved and (self._uploads is None or self._uploads.stored(UPLOAD))

    def _written(self, state: TrainState, unsent: list[LogEntry]) -> Checkpoint | None:
        """Write a checkpoint to a new folder. Return None on failure: training continues, since a restart would lose
        the steps since the previous checkpoint."""
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
                f"the checkpoint at image {state.images:,} could not be written; earlier checkpoints are kept: {why}",
                trains=True,
            )
            return None
        self.saved = True
        return Checkpoint.from_directory(folder)
