"""Intervals of logging, evaluation and checkpoints; divergence; phases, averages and learning rates."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import CPU, Recorder, go_on, job, no_evaluation, start, tensors
from torch import nn

from pipelines.data.loader import Loader, ShardedDataset
from pipelines.errors import DivergedError, SpecError
from pipelines.evaluation.result import Evaluation
from pipelines.objectives.phase import Loss, Phase, Step
from pipelines.spec import JobSpec, OptimizerSpec
from pipelines.training.loop import train
from pipelines.training.meters import Meters
from pipelines.training.optimizer import build_optimizer, learning_rate
from pipelines.training.precision import supports_bfloat16
from pipelines.training.state import TrainState


def with_optimizer(spec: JobSpec, **changes: object) -> JobSpec:
    return spec.model_copy(update={"optimizer": spec.optimizer.model_copy(update=changes)})


def test_times_are_told_in_images(data: ShardedDataset) -> None:
    """Each event is due at the first step that reaches a multiple of its interval, and all are due at the end."""
    spec = job("perceptron", images=110, batch=16, log_every=40, evaluate_every=16, checkpoint_every=50)
    recorder = go_on(spec, data, *start(spec, data))
    assert [images for images, _ in recorder.points] == [48, 80, 112]
    assert recorder.evaluations == [16, 32, 48, 64, 80, 96, 112]
    assert recorder.checkpoints == [64, 112]
    assert {name for _, point in recorder.points for name in point} == {"loss", "train_accuracy", "images_per_second"}
    assert all(point["images_per_second"] > 0 for _, point in recorder.points)


def test_intervals_shorter_than_a_batch_are_due_once_a_step(data: ShardedDataset) -> None:
    spec = job("perceptron", images=48, batch=16, log_every=1, evaluate_every=5, checkpoint_every=1000)
    recorder = go_on(spec, data, *start(spec, data))
    assert [images for images, _ in recorder.points] == recorder.evaluations == [16, 32, 48]
    assert recorder.checkpoints == [48]


def test_all_are_due_at_the_end(data: ShardedDataset) -> None:
    spec = job("perceptron", images=40, batch=16, log_every=1000, evaluate_every=1000, checkpoint_every=1000)
    recorder = go_on(spec, data, *start(spec, data))
    assert [images for images, _ in recorder.points] == recorder.evaluations == recorder.checkpoints == [48]


def test_a_finished_run_goes_no_further(data: ShardedDataset) -> None:
    spec = job("perceptron", images=32)
    objective, state = start(spec, data)
    go_on(spec, data, objective, state)
    again = go_on(spec, data, objective, state)
    assert (state.step, state.images) == (2, 32)
    assert (again.points, again.evaluations, again.checkpoints) == ([], [], [])


def test_a_point_is_the_mean_since_the_last(data: ShardedDataset) -> None:
    fine, coarse = (job("mlp", images=64, log_every=every) for every in (16, 32))
    each = [point["loss"] for _, point in go_on(fine, data, *start(fine, data)).points]
    both = [point["loss"] for _, point in go_on(coarse, data, *start(coarse, data)).points]
    assert both == pytest.approx([(each[0] + each[1]) / 2, (each[2] + each[3]) / 2], rel=1e-6)


def test_meters_keep_means_and_maxima_and_forget_after_a_point() -> None:
    meters = Meters(CPU)
    for cost, gap in ((1.0, 0.5), (2.0, 0.25)):
        meters.add(Loss(torch.zeros(()), sums={"cost": torch.tensor(cost)}, maxima={"gap": gap}))
    meters.add(Loss(torch.zeros(()), sums={"critic": 7.0}))
    point = meters.point()
    assert {name: point[name] for name in ("cost", "gap", "critic")} == {"cost": 1.5, "gap": 0.5, "critic": 7.0}
    meters.add(Loss(torch.zeros(()), maxima={"gap": 0.125}))
    assert meters.point().keys() == {"gap", "images_per_second"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_point_of_a_curve_is_not_finite(value: float) -> None:
    """A single non-finite step is sufficient, in a mean and in a maximum, where it appears as ∞."""
    for kind, told in (("sums", value), ("maxima", math.inf)):
        meters = Meters(CPU)
        for number in (1.0, value, 1.0):
            meters.add(Loss(torch.zeros(()), **{kind: {"cost": number}}))
        with pytest.raises(DivergedError, match=f"cost is {told}\n.*hint: lower optimizer.learning_rate"):
            meters.point()


def test_training_learns(data: ShardedDataset) -> None:
    spec = job("mlp", images=1200, batch=20, log_every=20)
    points = [point for _, point in go_on(spec, data, *start(spec, data)).points]
    assert sum(point["train_accuracy"] for point in points[-5:]) / 5 > 0.9
    spec = job("transport", images=1200, batch=20, log_every=20)
    costs = [point["transport_cost"] for _, point in go_on(spec, data, *start(spec, data)).points]
    assert sum(costs[-5:]) < 0.7 * sum(costs[:5])


@pytest.mark.parametrize("kind", ["mlp", "transport", "flow"])
def test_divergence_is_told_and_nothing_of_it_is_kept(tmp_path: Path, data: ShardedDataset, kind: str) -> None:
    spec = with_optimizer(job(kind, images=960, log_every=16, checkpoint_every=160), learning_rate=1e30, kind="sgd")
    recorder = Recorder(tmp_path)
    with pytest.raises(DivergedError) as caught:
        go_on(spec, data, *start(spec, data), recorder)
    assert caught.value.hint == "lower optimizer.learning_rate"
    assert (recorder.evaluations, recorder.checkpoints) == ([], [])
    assert list(tmp_path.iterdir()) == []


class Cliff:
    """An objective without metrics whose gradient is infinite at the third step."""

    served = "net"

    def __init__(self) -> None:
        self.networks = {"net": nn.Linear(2, 2)}
        self.phases = [Phase("net", self.networks["net"], self._loss)]

    def _loss(self, step: Step) -> Loss:
        return Loss(self.networks["net"].weight.sum() * (math.inf if step.index == 2 else 1.0))


@pytest.mark.parametrize("due", ["evaluate_every", "checkpoint_every"])
def test_weights_that_are_not_finite_are_neither_judged_nor_saved(data: ShardedDataset, due: str) -> None:
    intervals = {"log_every": 960, "evaluate_every": 960, "checkpoint_every": 960} | {due: 32}
    spec = job("perceptron", images=960, **intervals)
    objective, recorder = Cliff(), Recorder()
    with pytest.raises(DivergedError, match="after 64 images, weights weight of the net are no longer finite"):
        go_on(spec, data, objective, TrainState.start(spec, objective), recorder)
    assert recorder.evaluations + recorder.checkpoints == [32]


class TwoPlayers:
    """An objective with two phases on networks of one parameter each, which leave gradients on each other."""

    served = "slow"

    def __init__(self) -> None:
        self.networks = {name: nn.Linear(1, 1, bias=False) for name in ("fast", "slow")}
        self.moves: list[tuple[str, int]] = []
        self.phases = [
            Phase("fast", self.networks["fast"], lambda step: self._loss("fast", step)),
            Phase("slow", self.networks["slow"], lambda step: self._loss("slow", step), every=3),
        ]

    def _loss(self, name: str, step: Step) -> Loss:
        self.moves.append((name, step.index))
        both = sum(network.weight.sum() for network in self.networks.values())
        return Loss(torch.as_tensor(both if name == "fast" else 10 * both))


def test_phases_move_in_order_each_at_its_steps_by_its_own_gradient(data: ShardedDataset) -> None:
    spec = with_optimizer(job("perceptron", images=64), kind="sgd", learning_rate=0.5, momentum=0.0)
    objective = TwoPlayers()
    state = TrainState.start(spec, objective)
    before = {name: network.weight.item() for name, network in objective.networks.items()}
    go_on(spec, data, objective, state)
    assert objective.moves == [("fast", 0), ("slow", 0), ("fast", 1), ("fast", 2), ("fast", 3), ("slow", 3)]
    assert objective.networks["fast"].weight.item() == pytest.approx(before["fast"] - 4 * 0.5)
    assert objective.networks["slow"].weight.item() == pytest.approx(before["slow"] - 2 * 0.5 * 10)


def test_a_phase_may_have_an_optimizer_of_its_own(data: ShardedDataset) -> None:
    spec = with_optimizer(job("perceptron", images=32), kind="sgd", learning_rate=0.5, momentum=0.5)
    objective = TwoPlayers()
    its = OptimizerSpec(kind="adam", learning_rate=2.0, schedule="cosine")  # of one constant gradient: whole steps
    objective.phases[0] = dataclasses.replace(objective.phases[0], optimizer=its)
    before = {name: network.weight.item() for name, network in objective.networks.items()}
    go_on(spec, data, objective, TrainState.start(spec, objective))
    assert objective.networks["fast"].weight.item() == pytest.approx(before["fast"] - 2.0 - 1.0)
    assert objective.networks["slow"].weight.item() == pytest.approx(before["slow"] - 0.5 * 10)


def test_gradients_of_one_players_move_stop_at_the_other(data: ShardedDataset) -> None:
    objective = TwoPlayers()
    seen: list[list[bool]] = []
    inner = objective._loss

    def watched(name: str, step: Step) -> Loss:
        seen.append([network.weight.requires_grad for network in objective.networks.values()])
        return inner(name, step)

    objective._loss = watched  # type: ignore[method-assign]
    spec = job("perceptron", images=16)
    go_on(spec, data, objective, TrainState.start(spec, objective))
    assert seen == [[True, False], [False, True]]
    assert all(network.weight.requires_grad for network in objective.networks.values())


@pytest.mark.parametrize("kind", ["mlp", "pool-flow"])
def test_batches_in_parts_move_weights_as_whole_ones_do(data: ShardedDataset, kind: str) -> None:
    found = []
    for parts in (1, 3):
        # Adam would make whole steps of small gradients, and so of their last digits.
        spec = with_optimizer(job(kind, images=48, log_every=16, accumulate=parts), kind="sgd")
        objective, state = start(spec, data)
        points = [point for _, point in go_on(spec, data, objective, state).points]
        found.append((tensors(state), [{k: v for k, v in p.items() if k in ("loss", "pair_cost")} for p in points]))
    (whole, points), (parts_, points_of_parts) = found
    for name, value in whole.items():
        torch.testing.assert_close(parts_[name], value, rtol=2e-4, atol=2e-5)
    for point, other in zip(points, points_of_parts, strict=True):
        assert other == pytest.approx(point, rel=1e-4)


def test_what_couples_whole_batches_is_not_cut() -> None:
    for kind in ("transport", "flow"):
        with pytest.raises(SpecError, match="accumulate 2 would split"):
            job(kind, accumulate=2)


@pytest.mark.parametrize("kind", ["lenet", "pool-flow", "transport", "sinkhorn-transport"])
def test_low_precision_and_layout_train_alike_and_leave_weights_in_float32(data: ShardedDataset, kind: str) -> None:
    curves = []
    for options in ({}, {"channels_last": True}, {"precision": "bfloat16"}):
        spec = job(kind, images=96, log_every=48, **options)
        objective, state = start(spec, data)
        name = "transport_cost" if "transport" in kind else "loss"
        curves.append([point[name] for _, point in go_on(spec, data, objective, state).points])
        assert {value.dtype for value in tensors(state).values() if value.is_floating_point()} == {torch.float32}
    exact, laid_out, low = curves
    assert laid_out == pytest.approx(exact, rel=1e-4)
    assert low == pytest.approx(exact, rel=0.05)
    assert (low != exact) == supports_bfloat16(torch.device("cpu"))


TRANSLATED = """
import json, sys
from pathlib import Path
from runs import go_on, job, start, stripes, tensors
data, found = stripes(Path(sys.argv[1])), []
for translated in (False, True):
    spec = job(sys.argv[2], images=48, log_every=16, ema_half_life=100, compile=translated)
    objective, state = start(spec, data)
    found.append([[p["loss"] for _, p in go_on(spec, data, objective, state).points], sorted(tensors(state))])
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mlp", "flow"])
def test_translated_networks_train_as_others_and_keep_their_names(tmp_path: Path, kind: str) -> None:
    """Runs in a separate process, because the type checks in this process cannot be compiled."""
    root = Path(__file__).parents[3]
    told = subprocess.run(
        [sys.executable, "-c", TRANSLATED, str(tmp_path), kind],
        env=os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    (curve, names), (other_curve, other_names) = json.loads(told.stdout)
    assert other_curve == pytest.approx(curve, rel=1e-4)
    assert other_names == names


def test_the_average_forgets_by_half_in_a_half_life(data: ShardedDataset) -> None:
    spec = job("perceptron", ema_half_life=40)
    _, state = start(spec, data)
    assert state.average is not None
    assert state.judged is state.average
    first = [weights.clone() for weights in state.average.parameters()]
    network = state.networks[state.served]
    with torch.no_grad():
        for weights in network.parameters():
            weights.add_(1)
    for _ in range(5):
        state.advance(8, 40)
    assert (state.step, state.images) == (5, 40)
    for mean, begun in zip(state.average.parameters(), first, strict=True):
        torch.testing.assert_close(mean, begun + 0.5)
        assert not mean.requires_grad


def test_the_average_takes_buffers_as_they_are() -> None:
    class Normed:
        served = "net"
        networks = {"net": nn.BatchNorm1d(2)}  # noqa: RUF012
        phases = (Phase("net", networks["net"], lambda step: Loss(torch.zeros(()))),)

    state = TrainState.start(job("perceptron", ema_half_life=40), Normed())
    state.networks["net"](torch.randn(5, 2) + 3)
    state.advance(8, 40)
    assert state.average is not None
    assert torch.equal(state.average.running_mean, state.networks["net"].running_mean)
    assert int(state.average.num_batches_tracked) == 1


def test_what_is_judged_is_the_network_where_there_is_no_average(data: ShardedDataset) -> None:
    spec = job("perceptron", images=32, evaluate_every=16)
    objective, state = start(spec, data)
    judged: list[nn.Module] = []

    def evaluate(network: nn.Module) -> Evaluation:
        judged.append(network)
        return no_evaluation(network)

    with Loader(data.train, 16, spec.seed) as batches:
        train(spec, objective, state, batches, evaluate, Recorder(), CPU)
    assert state.average is None
    assert len(judged) == 2
    assert all(network is state.networks[state.served] for network in judged)


def test_rates_by_hand() -> None:
    cosine = OptimizerSpec(learning_rate=0.5, schedule="cosine")
    values = {0.0: 0.5, 0.25: 0.25 * (1 + 2**-0.5), 0.5: 0.25, 0.75: 0.25 * (1 - 2**-0.5), 1.0: 0.0}
    for done, value in values.items():
        assert learning_rate(cosine, done) == pytest.approx(value, abs=1e-12)
    assert {learning_rate(OptimizerSpec(learning_rate=0.5), done) for done in values} == {0.5}
    cycle = OptimizerSpec(learning_rate=0.5, schedule="one-cycle")
    for done, value in {0.0: 0.0, 0.1: 0.25, 0.2: 0.5, 0.6: 0.25, 1.0: 0.0}.items():
        assert learning_rate(cycle, done) == pytest.approx(value, abs=1e-12)


def test_a_step_moves_at_the_rate_of_the_images_before_it(data: ShardedDataset) -> None:
    spec = with_optimizer(job("perceptron", images=64, log_every=16), schedule="cosine", learning_rate=0.1)
    objective, state = start(spec, data)
    rates: list[float] = []

    class Watching(Recorder):
        def metrics(self, values: dict[str, float], images: int) -> None:
            rates.append(state.optimizers["classifier"].param_groups[0]["lr"])

    go_on(spec, data, objective, state, Watching())
    assert rates == [learning_rate(spec.optimizer, done) for done in (0.0, 0.25, 0.5, 0.75)]


def test_optimizers_take_what_the_spec_says() -> None:
    network = nn.Linear(2, 2)
    spec = job("perceptron").optimizer.model_copy(update={"momentum": 0.3, "second_moment": 0.99, "weight_decay": 0.02})
    adam = build_optimizer(spec, network)
    assert isinstance(adam, torch.optim.AdamW)
    assert adam.defaults["betas"] == (0.3, 0.99)
    sgd = build_optimizer(spec.model_copy(update={"kind": "sgd", "nesterov": True}), network)
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.3, True)
    for optimizer in (adam, sgd):
        assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (spec.learning_rate, 0.02)
