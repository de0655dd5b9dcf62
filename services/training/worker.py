"""What runs on each worker of a job: the composition root, where spec, data, network, planner and tracker meet."""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.torch import get_device

from pipelines.data.loader import Loader, ShardedDataset
from pipelines.errors import CheckpointError, DivergedError, ShardError, SpecError, StorageError
from pipelines.evaluation.result import Evaluation
from pipelines.models.build import build_model
from pipelines.models.bundle import Bundle
from pipelines.objectives.build import build_objective
from pipelines.objectives.phase import Objective
from pipelines.randomness import derived_seed
from pipelines.spec import JobSpec
from pipelines.training.checkpoint import load_checkpoint, save_checkpoint
from pipelines.training.choosing import evaluation_of
from pipelines.training.loop import train
from pipelines.training.state import TrainState
from pipelines.transport.planner import LocalPlanner, Planner
from services.settings import Settings
from services.storage.datasets import open_data
from services.tracking.registry import register
from services.tracking.run import Run
from services.training.progress import progress_line, stage_line
from services.training.references import reference_of
from services.transport.client import RayPlanner

EXAMPLES = 2
"""Images in the input example of a registered classifier."""


@dataclass(frozen=True)
class WorkerConfig:
    """What the driver tells its workers.

    Attributes:
        job: id of the job.
        spec: the resolved spec, as JSON holds it.
        data: folder of the sharded data set, or its address in S3.
        settings: of the process that drives the job, for S3 and the cache of shards.
        mlflow_uri: where rank 0 logs.
        plan_deadline: seconds to wait for a plan.
        staging: folder where checkpoints lie until Ray Train has taken them.
        models: folder of downloaded models.
    """

    job: str
    spec: dict[str, Any]
    data: str
    settings: dict[str, Any]
    mlflow_uri: str
    plan_deadline: float
    staging: str
    models: str


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Train on this worker until the job is done; Ray Train calls it on every rank.

    Args:
        config: the fields of a :class:`WorkerConfig`.

    Returns:
        ``{"model": …}`` of the registered model, None where the job registers none; or ``{"error", "cure"}`` for what
        no restart would mend. Those errors are the same on every rank, so that no rank is left waiting for another.
        All other errors are raised, and Ray Train restarts the workers from the latest checkpoint.
    """
    settings = WorkerConfig(**config)
    spec = JobSpec.model_validate(settings.spec)
    configure_process()
    try:
        return _train(settings, spec)
    except (SpecError, ShardError, CheckpointError, DivergedError) as error:
        return {"error": error.args[0], "cure": error.cure}


def _train(settings: WorkerConfig, spec: JobSpec) -> dict[str, Any]:
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = get_device()
    tracker = _Tracker(settings, spec) if rank == 0 else None
    data = open_data(settings.data, Settings(**settings.settings), verify=rank == 0).limited(spec.data.per_class)

    planner = planner_of(settings.job, spec, rank, world, settings.plan_deadline)
    objective, state = started(spec, data, planner, device)
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            load_checkpoint(state, Path(folder))
    listener = _Listener(spec, tracker, Path(settings.staging))
    if tracker:
        tracker.say(
            f"training {_parameters(state):,} parameters on {len(data.train):,} images, {world} workers, {device}"
            + (f", from image {state.images:,}" if state.images else "")
        )
    reference = reference_of(spec, settings.mlflow_uri, settings.models, device)
    evaluator = evaluation_of(spec, data, state, planner, device, reference)
    with (
        Loader(data.train, spec.train.batch, spec.seed, rank, world, start_step=state.step) as batches,
        raised_on_one_rank(),
    ):
        train(spec, objective, state, batches, evaluator, listener, device)
    if tracker is None:
        return {}
    model = tracker.register(state, data) if spec.registers else None
    tracker.run.close("FINISHED")
    return {"model": model, "metrics": listener.latest}


def configure_process() -> None:
    """Make this process one of many on its machine: one thread, and no chatter of libraries in its log."""
    # Workers share the cores of their machine; more threads than that and they wait for each other.
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s", force=True)
    for chatty in ("ray", "mlflow", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


@contextmanager
def raised_on_one_rank() -> Iterator[None]:
    """Make a damaged shard the error of a rank that failed by itself.

    Of shards that are fetched as they are needed, one rank meets the damaged one before the others: were it to return
    as from an error that all of them have, they would wait for it.

    Raises:
        StorageError: for a :class:`~pipelines.errors.ShardError`.
    """
    try:
        yield
    except ShardError as error:
        raise StorageError(error.args[0], cure=error.cure) from error


def started(
    spec: JobSpec, data: ShardedDataset, planner: Planner, device: torch.device
) -> tuple[Objective, TrainState]:
    """The objective of a job, and its state before the first step."""
    torch.manual_seed(derived_seed(spec.seed, 0, "initialisation"))
    network = build_model(spec.model, data.image, spec.outputs(len(data.classes))).to(device)
    objective = build_objective(spec, network, planner, data)
    return objective, TrainState.start(spec, objective)


def planner_of(job: str, spec: JobSpec, rank: int, world: int, deadline: float) -> Planner:
    """Who solves the plans of a job: the transport service, or this process by itself.

    Args:
        job: id of the job.
        spec: its spec.
        rank, world: of this process, and their number.
        deadline: seconds to wait for the other ranks and for a plan of the service.
    """
    # What needs no plan to train is judged by plans all the same.
    if spec.generates and getattr(spec.objective, "plans", "service") == "service":
        return RayPlanner(job, rank, world, deadline)
    return LocalPlanner()


def _parameters(state: TrainState) -> int:
    return sum(weights.numel() for weights in state.networks[state.served].parameters())


class _Tracker:
    """Rank 0's hold on MLflow, which takes seconds to import: that happens while the network is built."""

    def __init__(self, settings: WorkerConfig, spec: JobSpec) -> None:
        self._spec = spec
        self._opened = ThreadPoolExecutor(1).submit(Run.open, settings.mlflow_uri, settings.job, spec)

    @property
    def run(self) -> Run:
        return self._opened.result()

    def say(self, text: str) -> None:
        print(stage_line(text), flush=True)

    def register(self, state: TrainState, data: ShardedDataset) -> str:
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

    def __init__(self, spec: JobSpec, tracker: _Tracker | None, staging: Path) -> None:
        self._spec = spec
        self._tracker = tracker
        self._staging = staging
        self.latest: dict[str, float] = {}

    def metrics(self, values: dict[str, float], images: int) -> None:
        """See :class:`pipelines.training.loop.Listener`."""
        self.latest |= values
        if self._tracker:
            self._tracker.run.metrics(values, images)
            print(progress_line(images, self._spec.train.images, values), flush=True)

    def evaluation(self, evaluation: Evaluation, images: int) -> None:
        """See :class:`pipelines.training.loop.Listener`."""
        self.metrics(evaluation.metrics, images)
        if self._tracker:
            self._tracker.run.pictures(evaluation, images)

    def checkpoint(self, state: TrainState) -> None:
        """See :class:`pipelines.training.loop.Listener`; every rank comes here, since Ray Train waits for all."""
        checkpoint = None
        if self._tracker:
            self._staging.mkdir(parents=True, exist_ok=True)
            folder = tempfile.mkdtemp(dir=self._staging)
            save_checkpoint(state, Path(folder))
            checkpoint = Checkpoint.from_directory(folder)
        ray.train.report(
            {"images": state.images, **self.latest},
            checkpoint=checkpoint,
            checkpoint_dir_name=f"images-{state.images:012d}",
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )


def worker_config(
    job: str, spec: JobSpec, data: str, settings: Settings, staging: Path, models: Path
) -> dict[str, Any]:
    """The dictionary that :func:`train_worker` takes."""
    return asdict(
        WorkerConfig(
            job=job,
            spec=spec.model_dump(mode="json"),
            data=data,
            settings=settings.for_workers(),
            mlflow_uri=settings.address("mlflow_uri"),
            plan_deadline=settings.plan_deadline,
            staging=str(staging),
            models=str(models),
        )
    )
