"""The training loop: runs all phases on each batch, and logs, evaluates and saves at the intervals of the spec."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from pipelines.data.loader import Batch
from pipelines.data.partition import rank_slice
from pipelines.distributed import agree, rank, sum_gradients, world_size
from pipelines.evaluation.result import Evaluation
from pipelines.models.bundle import to_float
from pipelines.objectives.phase import Objective, Phase, Step
from pipelines.randomness import seed_step
from pipelines.spec import JobSpec
from pipelines.training.meters import Meters
from pipelines.training.optimizer import learning_rate
from pipelines.training.position import Position
from pipelines.training.standing import renew_statistics
from pipelines.training.state import TrainState
from pipelines.training.stopping import Stopping


@runtime_checkable
class Listener(Protocol):
    """Receives the progress of a run. Called on every rank, at the same numbers of images, with the same values."""

    def metrics(self, values: dict[str, float], images: int) -> None:
        """Called every ``log_every`` images, with means and maxima since the last call and ``images_per_second``."""
        ...

    def evaluation(self, evaluation: Evaluation, images: int) -> None:
        """Called after each evaluation."""
        ...

    def checkpoint(self, state: TrainState) -> None:
        """Called when a checkpoint is due."""
        ...


def train(
    spec: JobSpec,
    objective: Objective,
    state: TrainState,
    batches: Iterable[Batch],
    evaluate: Callable[[nn.Module], Evaluation],
    listener: Listener,
    device: torch.device,
    asked_to_stop: Callable[[], bool] | None = None,
    position: Position | None = None,
) -> None:
    """Train until ``spec.train.images`` images were seen, from the step that ``state`` has reached.

    Args:
        spec: durations, batch size, learning rates.
        objective: provides the phases.
        state: updated in place.
        batches: this rank's batches, endless, starting with that of step ``state.step``.
        evaluate: evaluates ``state.judged``, the moving average of the weights if there is one; called on every rank.
        listener: receives metrics, evaluations and checkpoints.
        device: where the networks are.
        asked_to_stop: returns whether this rank was asked to stop early, for example by SIGTERM. All ranks then stop
            after the same step, with a checkpoint.
        position: updated during training, for a monitoring thread.

    Raises:
        DivergedError: a loss or a weight is not finite; raised on every rank.
    """
    position = position or Position()
    meters = Meters(device)
    stopping = None if asked_to_stop is None else Stopping(asked_to_stop)
    layout = torch.channels_last if spec.train.channels_last else torch.contiguous_format
    for batch in batches:
        if state.images >= spec.train.images:
            break
        seed_step(spec.seed, state.step, rank())
        step = Step(
            index=state.step,
            images=to_float(batch.images.to(device, non_blocking=True)).contiguous(memory_format=layout),
            labels=batch.labels.to(device, non_blocking=True),
            indices=batch.indices,
            batch=spec.train.batch,
            share=rank_slice(spec.train.batch, rank(), world_size()),
            seed=spec.seed,
        )
        for phase in objective.phases:
            if state.step % phase.every == 0:
                position.step, position.doing = state.step, f"in phase {phase.name}"
                _update(spec, phase, step, state, meters)
        before = state.images
        state.advance(spec.train.batch, spec.train.ema_half_life)
        meters.count(spec.train.batch)

        finished = state.images >= spec.train.images
        evaluates = finished or _crossed(before, state.images, spec.train.evaluate_every)
        stops = stopping is not None and stopping.after(state.step)
        saves = finished or stops or _crossed(before, state.images, spec.train.checkpoint_every)
        if finished or _crossed(before, state.images, spec.train.log_every):
            listener.metrics(meters.point(), state.images)
        if evaluates or saves:
            # Losses were computed before the step; this checks the weights after it.
            state.require_finite()
        if evaluates:
            position.doing = "evaluating"
            with agree("evaluating"):
                if state.average is not None:
                    renew_statistics(state.average, spec.train.batch, spec.seed, device)
                evaluation = evaluate(state.judged)
            listener.evaluation(evaluation, state.images)
        if saves:
            position.doing = "saving a checkpoint"
            listener.checkpoint(state)
        if stops:
            break
        position.step, position.doing = state.step, "waiting for images"


def _update(spec: JobSpec, phase: Phase, step: Step, state: TrainState, meters: Meters) -> None:
    optimizer = state.optimizers[phase.name]
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(phase.optimizer or spec.optimizer, min(1.0, state.images / spec.train.images))
    optimizer.zero_grad(set_to_none=True)
    low = state.precision != torch.float32
    with _only(phase.module, state.networks.values()):
        parts = []
        for part in step.parts(spec.train.accumulate):
            with torch.autocast(step.images.device.type, state.precision) if low else nullcontext():
                loss = phase.loss(part)
            loss.total.backward()
            parts.append(loss)
    meters.add(*parts)
    # Each rank's loss is its part of the mean over the global batch: the sum of the gradients is that of the mean.
    sum_gradients(phase.module.parameters())
    optimizer.step()
    if phase.project is not None:
        phase.project()


@contextmanager
def _only(module: nn.Module, networks: Iterable[nn.Module]) -> Iterator[None]:
    """Compute gradients for the weights of one network only; they still flow through the other networks."""
    own = {id(parameter) for parameter in module.parameters()}
    others = [p for network in networks for p in network.parameters() if p.requires_grad and id(p) not in own]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _crossed(before: int, after: int, interval: int) -> bool:
    return after // interval > before // interval
