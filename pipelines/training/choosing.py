"""On which images a run is judged: a validation split for choosing, the test split once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pipelines.data.loader import ShardedDataset
from pipelines.evaluation.build import Evaluator
from pipelines.evaluation.features import FeatureExtractor
from pipelines.evaluation.result import Evaluation
from pipelines.spec import JobSpec
from pipelines.training.state import TrainState
from pipelines.transport.planner import Planner


def evaluation_of(
    spec: JobSpec,
    data: ShardedDataset,
    state: TrainState,
    planner: Planner,
    device: torch.device,
    reference: FeatureExtractor | None = None,
) -> Callable[[nn.Module], Evaluation]:
    """What judges a run: see :func:`pipelines.training.loop.train`.

    Without a validation split every evaluation is of the test split. With one they are of the validation split, and
    the last, when the run has seen all its images, is of both: whoever chooses durations, rates or networks by these
    curves has not seen the test split.

    Args:
        spec: what is trained.
        data: its splits.
        state: of the run, which tells how far it is.
        planner, device, reference: as :class:`~pipelines.evaluation.build.Evaluator` takes them.

    Raises:
        ShardError: there are no test images.
        SpecError: the reference is not for such images.
    """
    if data.validation is None:
        return Evaluator(spec, data, planner, device, reference)
    validation = Evaluator(spec, data, planner, device, reference, "validation")

    def evaluate(network: nn.Module) -> Evaluation:
        found = validation(network)
        if state.images < spec.train.images:
            return found
        last = Evaluator(spec, data, planner, device, reference)(network)
        return Evaluation(found.metrics | last.metrics, found.pictures | last.pictures, found.tags | last.tags)

    return evaluate
