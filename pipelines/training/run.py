"""One run: builds the networks and the objective of a spec, and trains them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from pipelines.data.loader import Loader, ShardedDataset
from pipelines.distributed import agree, rank, world_size
from pipelines.evaluation.features import FeatureExtractor
from pipelines.models.build import build_model
from pipelines.models.network import Network
from pipelines.objectives.build import build_objective
from pipelines.objectives.phase import Objective
from pipelines.randomness import derived_seed
from pipelines.spec import JobSpec
from pipelines.training.checkpoint import load_checkpoint, load_origin
from pipelines.training.choosing import evaluation_of
from pipelines.training.loop import Listener, train
from pipelines.training.position import Position
from pipelines.training.state import TrainState
from pipelines.transport.planner import Planner


def start_run(
    spec: JobSpec,
    data: ShardedDataset,
    planner: Planner,
    device: torch.device,
    checkpoint: Path | None = None,
    origin: Path | None = None,
    networks: Mapping[str, Network] | None = None,
) -> tuple[Objective, TrainState]:
    """Build the objective of a run and its state: new, or from a checkpoint.

    Args:
        spec: the job spec.
        data: the data set.
        planner: solves the plans of the objective.
        device: where to put the networks.
        checkpoint: folder of a checkpoint of this run, to resume from.
        origin: folder of a checkpoint of another run, to start from if ``checkpoint`` is None.
        networks: frozen feature networks of the objective, by name.

    Raises:
        SpecError: the objective cannot train this network, or the origin has already seen ``train.images`` images.
        CheckpointError: the checkpoint is damaged or of another spec, or the origin does not fit the networks.
    """
    torch.manual_seed(derived_seed(spec.seed, 0, "initialisation"))
    network = build_model(spec.model, data.image, spec.outputs(len(data.classes))).to(device)
    objective = build_objective(spec, network, planner, data, networks)
    state = TrainState.start(spec, objective)
    if checkpoint is not None:
        load_checkpoint(state, checkpoint)
    elif origin is not None:
        load_origin(state, origin, spec)
    return objective, state


def run_training(
    spec: JobSpec,
    data: ShardedDataset,
    objective: Objective,
    state: TrainState,
    planner: Planner,
    listener: Listener,
    device: torch.device,
    reference: FeatureExtractor | None = None,
    asked_to_stop: Callable[[], bool] | None = None,
    position: Position | None = None,
) -> None:
    """Train until ``spec.train.images`` images were seen, with evaluations. Collective: every rank calls it.

    Args:
        spec: the job spec.
        data: the data set, with its held-out images.
        objective, state: from :func:`start_run`; the state is updated in place.
        planner: solves the plans of evaluations.
        listener: receives metrics, evaluations and checkpoints.
        device: where the networks are.
        reference: feature network for the evaluation of generators.
        asked_to_stop, position: see :func:`pipelines.training.loop.train`.

    Raises:
        MongeError: the same on every rank, even if only one failed; see :func:`pipelines.distributed.agree`.
    """
    position = position or Position()
    position.doing = "preparing the evaluation"
    with agree("preparing the evaluation"):
        evaluate = evaluation_of(spec, data, state, planner, device, reference)
    with (
        Loader(data.train, spec.train.batch, spec.seed, rank(), world_size(), start_step=state.step) as batches,
        agree("training"),
    ):
        train(spec, objective, state, batches, evaluate, listener, device, asked_to_stop, position)
