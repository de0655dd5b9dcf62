"""A run that continues from the checkpoint of another run, with more images or another learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import CPU, Recorder, go_on, job, start, tensors

from pipelines.data.loader import ShardedDataset
from pipelines.errors import CheckpointError, SpecError
from pipelines.spec import JobSpec, OptimizerSpec
from pipelines.training import run
from pipelines.training.checkpoint import save_checkpoint
from pipelines.training.state import TrainState
from pipelines.transport.planner import LocalPlanner


def with_optimizer(spec: JobSpec, **fields: Any) -> JobSpec:
    return spec.model_copy(update={"optimizer": spec.optimizer.model_copy(update=fields)})


def constant(kind: str, **train: Any) -> JobSpec:
    return with_optimizer(job(kind, **{"ema_half_life": 40} | train), schedule="constant")


def trained(folder: Path, spec: JobSpec, data: ShardedDataset) -> Path:
    """Train a run and return the checkpoint of its last step."""
    _, state = (begun := start(spec, data))
    go_on(spec, data, *begun, Recorder(folder))
    return folder / str(state.images)


def continued(spec: JobSpec, data: ShardedDataset, origin: Path) -> TrainState:
    """Return the state of a run with an origin before its first step."""
    return run.start_run(spec, data, LocalPlanner(), CPU, origin=origin)[1]


@pytest.mark.parametrize("kind", ["mlp", "resnet", "gan", "learned-transport", "pool-flow", "pooled-transport"])
def test_more_images_give_the_bits_of_one_longer_run(tmp_path: Path, data: ShardedDataset, kind: str) -> None:
    longer = constant(kind, images=96)
    objective, whole = start(longer, data)
    go_on(longer, data, objective, whole)
    origin = trained(tmp_path, constant(kind, images=48), data)
    objective, state = run.start_run(longer, data, LocalPlanner(), CPU, origin=origin)
    assert (state.step, state.images) == (3, 48)
    go_on(longer, data, objective, state)
    expected, found = tensors(whole), tensors(state)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert (state.step, state.images) == (6, 96)


def test_another_rate_is_that_of_the_new_spec(tmp_path: Path, data: ShardedDataset) -> None:
    origin = trained(tmp_path, constant("mlp", images=48), data)
    slower = with_optimizer(constant("mlp", images=64), learning_rate=1e-9, weight_decay=0.0)
    objective, state = run.start_run(slower, data, LocalPlanner(), CPU, origin=origin)
    before = {name: value.clone() for name, value in tensors(state).items()}
    go_on(slower, data, objective, state)
    after = tensors(state)
    weights = [name for name in after if name.startswith("classifier/")]
    assert weights
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in weights)
    assert state.images == 64


def test_with_another_batch_the_place_in_the_data_is_that_of_the_images_seen(
    tmp_path: Path, data: ShardedDataset
) -> None:
    """Plans of pools are solved only for the steps of the spec; an additional step would have no plan."""
    origin = trained(tmp_path, constant("pool-flow", images=96, batch=8), data)
    wider = constant("pool-flow", images=144, batch=48)
    objective, state = run.start_run(wider, data, LocalPlanner(), CPU, origin=origin)
    assert (state.step, state.images) == (2, 96)
    go_on(wider, data, objective, state)
    assert (state.step, state.images) == (3, 144)


@pytest.mark.parametrize(("before", "after"), [(None, 32), (64, None), (64, 96), (64, 32)])
def test_a_run_with_other_pools_draws_them_by_the_weights_of_the_origin(
    tmp_path: Path, data: ShardedDataset, before: int | None, after: int | None
) -> None:
    def pooled(pool: int | None, images: int) -> JobSpec:
        spec = constant("pooled-transport", images=images)
        return spec.model_copy(update={"objective": spec.objective.model_copy(update={"pool": pool})})

    # After 5 steps, within a pool of 6 steps and of 2.
    origin = trained(tmp_path, pooled(before, 80), data)
    objective, state = run.start_run(pooled(after, 96), data, LocalPlanner(), CPU, origin=origin)
    weights = {name: value.clone() for name, value in state.networks["generator"].state_dict().items()}
    go_on(pooled(after, 96), data, objective, state)
    assert (state.step, state.images) == (6, 96)
    assert ("pool" in state.networks) == (after is not None)
    if after is not None:
        copied = state.networks["pool"].generator.state_dict()  # type: ignore[operator, union-attr]
        assert all(torch.equal(value, weights[name]) for name, value in copied.items())


def test_an_average_that_the_origin_has_not_begins_at_its_weights(tmp_path: Path, data: ShardedDataset) -> None:
    origin = trained(tmp_path, constant("mlp", images=48, ema_half_life=None), data)
    state = continued(constant("mlp", images=96), data, origin)
    assert state.average is not None
    served = state.networks[state.served].state_dict()
    assert all(torch.equal(value, served[name]) for name, value in state.average.state_dict().items())


def wider_hidden(spec: JobSpec) -> JobSpec:
    return spec.model_copy(update={"model": spec.model.model_copy(update={"hidden": (20,)})})


def deeper(spec: JobSpec) -> JobSpec:
    return spec.model_copy(update={"model": spec.model.model_copy(update={"hidden": (16, 16)})})


def adam(spec: JobSpec) -> JobSpec:
    return spec.model_copy(update={"optimizer": OptimizerSpec()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wider_hidden, r"layers\.1\.weight of the classifier is \(16, 144\), and \(20, 144\) in the job's spec"),
        (deeper, r"layers\.4\.weight of the classifier is \(2, 16\), and \(16, 16\) in the job's spec"),
        (adam, r"optimizer of the classifier keeps momentum_buffer, which the job's AdamW does not know"),
    ],
)
def test_a_state_that_does_not_fit_is_named(tmp_path: Path, data: ShardedDataset, change: Any, message: str) -> None:
    origin = trained(tmp_path, constant("mlp", images=48), data)
    with pytest.raises(CheckpointError, match=message) as refused:
        continued(change(constant("mlp", images=96)), data, origin)
    assert refused.value.hint is not None
    assert "kind of optimizer" in refused.value.hint


def test_other_networks_are_named(tmp_path: Path, data: ShardedDataset) -> None:
    origin = trained(tmp_path, constant("gan", images=16), data)
    with pytest.raises(CheckpointError, match="holds the networks critic, generator, while the job trains generator"):
        continued(constant("transport", images=96), data, origin)


def test_images_that_the_origin_has_seen_already_are_refused(tmp_path: Path, data: ShardedDataset) -> None:
    origin = trained(tmp_path, constant("mlp", images=48), data)
    with pytest.raises(
        SpecError, match=r"train\.images: 48, but the checkpoint to continue from has already seen 48"
    ) as refused:
        continued(constant("mlp", images=48), data, origin)
    assert refused.value.hint == "raise train.images above 48"


def test_a_checkpoint_of_the_run_itself_goes_before_the_origin(tmp_path: Path, data: ShardedDataset) -> None:
    origin = trained(tmp_path / "origin", constant("mlp", images=48), data)
    spec = constant("mlp", images=96)
    own = continued(spec, data, origin)
    own.step, own.images = 4, 64
    save_checkpoint(own, tmp_path / "own")
    state = run.start_run(spec, data, LocalPlanner(), CPU, tmp_path / "own", origin)[1]
    assert (state.step, state.images) == (4, 64)
