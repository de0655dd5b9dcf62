"""Couplings of noise and images."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.data.loader import Split
from pipelines.data.partition import batch_indices, rank_slice
from pipelines.data.shards import MappedShards
from pipelines.errors import ProblemError, ShardError
from pipelines.models.bundle import to_float
from pipelines.models.flow import FlowUNet
from pipelines.objectives.conditions import ConditionCost
from pipelines.objectives.couplings import BatchPlan, Coupling, Independent, PoolPlan, Recorded
from pipelines.objectives.flow import FlowMatching
from pipelines.objectives.phase import Step
from pipelines.objectives.recorded import RecordedCoupling, record_coupling
from pipelines.randomness import derived_seed, normal_rows, step_generator
from pipelines.shape import ImageShape
from pipelines.transport.cost import matched_cost
from pipelines.transport.plan import TransportPlan
from pipelines.transport.planner import LocalPlanner
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import solve

COUNT, BATCH, POOL, SEED, STEPS = 20, 4, 12, 3, 100
PIXELS = 16


@pytest.fixture
def split() -> Split:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (COUNT, 1, 4, 4), dtype=np.uint8)
    return Split("train", MappedShards([images]), np.arange(COUNT), np.arange(COUNT) % 2)


def step(split: Split, index: int, rank: int = 0, world: int = 1) -> Step:
    share = rank_slice(BATCH, rank, world)
    indices = batch_indices(COUNT, SEED, BATCH, index)[share]
    images, labels = split.take(indices)
    return Step(index, to_float(images), labels, torch.as_tensor(indices), BATCH, share, SEED)


def couplings(split: Split, tmp_path: Path) -> dict[str, Coupling]:
    recorded = record_coupling(LocalPlanner(), taker(split), COUNT, "a" * 64, rounds=2, pool=7)
    return {
        "independent": Independent(),
        "batch": BatchPlan(LocalPlanner()),
        "pool": PoolPlan(LocalPlanner(), split, POOL, BATCH, SEED, STEPS),
        "recorded": Recorded(recorded),
    }


def taker(split: Split) -> Callable[[np.ndarray], tuple[torch.Tensor, torch.Tensor]]:
    def take(places: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = split.take(places)
        return to_float(images).flatten(1), labels

    return take


def test_noise_is_standard_normal_and_new_at_each_step(split: Split, tmp_path: Path) -> None:
    for name, coupling in couplings(split, tmp_path).items():
        drawn = torch.cat([coupling.noise(step(split, index)).noise for index in range(10)])
        assert drawn.shape == (40, PIXELS)
        assert len(drawn.unique(dim=0)) == 40, name
        assert abs(float(drawn.mean())) < 0.12, name
        assert 0.85 < float(drawn.std()) < 1.15, name


@pytest.mark.parametrize("kind", ["batch", "pool"])
def test_plans_that_pay_between_classes_pair_noise_with_the_class_it_is_meant_for(split: Split, kind: str) -> None:
    """The noise has the same number of points per class as the images, so no pair needs to have the extra cost."""
    conditions = ConditionCost(2, 1e4, SEED)
    planner = LocalPlanner()
    coupling = (
        BatchPlan(planner, conditions)
        if kind == "batch"
        else PoolPlan(planner, split, BATCH, BATCH, SEED, STEPS, conditions)
    )
    for index in range(6):
        now = step(split, index)
        noise = now.normal("noise", PIXELS)
        if kind == "pool":
            noise = torch.randn(BATCH, PIXELS, generator=step_generator(SEED, index, "pool of noise"))
        meant = conditions.meant(now.labels, index)
        assert sorted(meant.tolist()) == sorted(now.labels.tolist())
        coupled = coupling.noise(now).noise
        assert coupled.shape == (BATCH, PIXELS)
        source = [int((noise == row).all(1).nonzero()) for row in coupled]
        assert sorted(source) == list(range(BATCH))
        assert meant[source].tolist() == now.labels.tolist()


def test_ranks_hold_the_rows_of_one_batch(split: Split, tmp_path: Path) -> None:
    for name, coupling in couplings(split, tmp_path).items():
        if name == "batch":
            continue  # it needs ranks that meet: see tests of the distributed planner
        whole = coupling.noise(step(split, 7)).noise
        parts = [coupling.noise(step(split, 7, rank, 3)).noise for rank in range(3)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0)


def test_a_batch_plan_pairs_optimally(split: Split) -> None:
    now = step(split, 0)
    coupled = BatchPlan(LocalPlanner()).noise(now)
    alone = Independent().noise(now).noise
    images = now.images.flatten(1)
    plan = solve(TransportProblem.between(images, alone))
    torch.testing.assert_close(coupled.noise, alone[torch.as_tensor(plan.assignment)], rtol=0, atol=0)
    assert coupled.maxima["plan_relative_gap"] < 1e-6


def test_a_pool_plan_pairs_optimally_over_its_steps(split: Split) -> None:
    with_pool = PoolPlan(LocalPlanner(), split, POOL, BATCH, SEED, STEPS)
    for number in range(2):
        steps = [step(split, number * 3 + place) for place in range(3)]
        noise = torch.cat([with_pool.noise(now).noise for now in steps])
        images = torch.cat([now.images.flatten(1) for now in steps])
        plan = solve(TransportProblem.between(noise, images))
        paired = matched_cost(noise, images, "squared-euclidean").double().mean()
        assert float(paired) == pytest.approx(plan.certificate.primal, rel=1e-6)


def test_recorded_pairs_are_those_of_the_plans(split: Split) -> None:
    seen: list[tuple[int, int]] = []
    coupling = record_coupling(
        LocalPlanner(), taker(split), COUNT, "a" * 64, rounds=2, pool=COUNT,
        on_progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(20, 40), (40, 40)]
    images = taker(split)(np.arange(COUNT))[0]
    for number in range(2):
        assert len(set(coupling.seeds[number].tolist())) == COUNT
        noise = normal_rows(coupling.seeds[number], PIXELS)
        plan = solve(TransportProblem.between(images, noise))
        assert plan.assignment is not None
        assert plan.assignment.tolist() == list(range(COUNT))
        assert coupling.costs[number] == pytest.approx(plan.certificate.primal, rel=1e-6)
    assert coupling.seeds[0].tolist() != coupling.seeds[1].tolist()


def test_recorded_pairs_that_know_of_classes_stay_within_them(split: Split) -> None:
    """With one pool per round, the classes of the noise are a permutation of those of the images."""
    conditions = ConditionCost(2, 1e4, SEED)
    coupling = record_coupling(
        LocalPlanner(), taker(split), COUNT, "a" * 64, rounds=2, pool=COUNT, conditions=conditions
    )
    plain = record_coupling(LocalPlanner(), taker(split), COUNT, "a" * 64, rounds=2, pool=COUNT)
    for number in range(2):
        order = np.random.default_rng(derived_seed(0, number, "pools")).permutation(COUNT)
        labels = torch.as_tensor(split.labels[order])
        keys = ((derived_seed(0, number, "recorded noise") + order) % 2**32).astype(np.uint32)
        meant = dict(zip(keys.tolist(), conditions.meant(labels, number).tolist(), strict=True))
        assert [meant[key] for key in coupling.seeds[number].tolist()] == split.labels.tolist()
        assert coupling.costs[number] > plain.costs[number]
        assert coupling.costs[number] < plain.costs[number] + 1e4 / COUNT


def test_no_pool_is_solved_that_no_step_asks_for(split: Split) -> None:
    class Counting(LocalPlanner):
        calls = 0

        def plan(self, problem: TransportProblem) -> TransportPlan:
            self.calls += 1
            return super().plan(problem)

    planner = Counting()
    coupling = PoolPlan(planner, split, POOL, BATCH, SEED, steps=5)
    for index in range(5):
        coupling.noise(step(split, index))
    assert planner.calls == 2


def test_recorded_rounds_take_turns_by_epoch(split: Split) -> None:
    coupling = record_coupling(LocalPlanner(), taker(split), COUNT, "a" * 64, rounds=2, pool=7)
    recorded = Recorded(coupling)
    for epoch, number in ((0, 0), (1, 1), (2, 0)):
        now = step(split, epoch * COUNT // BATCH + 1)
        expected = normal_rows(coupling.seeds[number, now.indices.numpy()], PIXELS)
        torch.testing.assert_close(recorded.noise(now).noise, expected, rtol=0, atol=0)


def test_a_recorded_coupling_comes_back_and_is_refused_elsewhere(split: Split, tmp_path: Path) -> None:
    file = tmp_path / "couplings.safetensors"
    coupling = record_coupling(LocalPlanner(), taker(split), COUNT, "a" * 64, rounds=1, pool=7)
    coupling.write(file)
    back = RecordedCoupling.read(file, "a" * 64, COUNT)
    assert back.seeds.tolist() == coupling.seeds.tolist()
    assert back.costs.tolist() == coupling.costs.tolist()
    assert back.max_gap == coupling.max_gap
    for fingerprint, count in (("b" * 64, COUNT), ("a" * 64, COUNT + 1)):
        with pytest.raises(ShardError, match="couples another data set"):
            RecordedCoupling.read(file, fingerprint, count)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ShardError, match="not a recorded coupling"):
        RecordedCoupling.read(file, "a" * 64, COUNT)
    with pytest.raises(ShardError, match="not a recorded coupling"):
        RecordedCoupling.read(tmp_path / "none", "a" * 64, COUNT)


def test_nothing_to_couple_is_refused(split: Split) -> None:
    with pytest.raises(ProblemError, match="at least 1"):
        record_coupling(LocalPlanner(), taker(split), COUNT, "a" * 64, rounds=0, pool=7)


def test_the_loss_is_the_mean_square_of_what_the_velocity_misses(split: Split) -> None:
    torch.manual_seed(0)
    network = FlowUNet(ImageShape(1, 4, 4), width=8, steps=2)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    now = step(split, 0)
    loss = FlowMatching(network, Independent()).phases[0].loss(now)
    noise, times = now.normal("noise", PIXELS).view(-1, 1, 4, 4), now.uniform("times")
    expected = 0.0
    for x0, x1, t in zip(noise, now.images, times, strict=True):
        velocity = network.velocity(((1 - t) * x0 + t * x1)[None], t[None])[0]
        expected += float((velocity.detach() - (x1 - x0)).square().mean()) / BATCH
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)
    assert float(loss.sums["pair_cost"]) == pytest.approx(float((now.images - noise).square().sum()) / BATCH, rel=1e-5)
