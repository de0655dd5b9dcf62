"""Chooses the split of each evaluation: validation during training if there is one, test at the end."""

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
    """The function that evaluates a run; :func:`pipelines.training.loop.train` calls it.

    Without a validation split, every evaluation uses the test split. With one, evaluations use the validation split,
    and only the last one also uses the test split. Hyperparameters can then be chosen without looking at the test
    split.

    Args:
        spec: the job spec.
        data: the data set.
        state: of the run; its ``images`` decide whether an evaluation is the last one.
        planner, device, reference: see :class:`~pipelines.evaluation.build.Evaluator`.

    Raises:
        ShardError: there are no test images.
        SpecError: the reference takes images of another shape.
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
