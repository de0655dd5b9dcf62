"""The gradient of the transport distance between samples and images."""

from dataclasses import replace

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from pipelines.errors import DivergedError, NotConvergedError, ProblemError
from pipelines.models.network import Generator
from pipelines.objectives.phase import Step
from pipelines.objectives.transport import TransportObjective, sliced_distance
from pipelines.shape import ImageShape
from pipelines.spec import CostName, TransportSpec
from pipelines.transport.plan import RowBlock
from pipelines.transport.planner import LocalPlanner, Share

IMAGE = ImageShape(1, 2, 2)
BATCH, LATENT = 12, 3
COSTS: list[CostName] = ["squared-euclidean", "euclidean", "cosine"]


class Affine(Generator):
    """Samples in float64, so that finite differences are precise enough."""

    def __init__(self) -> None:
        super().__init__(IMAGE, LATENT)
        generator = torch.Generator().manual_seed(2)
        weights = torch.randn(LATENT + 1, IMAGE.pixels, dtype=torch.float64, generator=generator)
        self.weights = torch.nn.Parameter(0.5 * weights)

    def forward(self, latents: torch.Tensor, conditions: torch.Tensor | None = None) -> torch.Tensor:
        points = latents.double() @ self.weights[:-1] + self.weights[-1]
        return points.view(-1, *IMAGE.dims)


def step(index: int = 0) -> Step:
    images = torch.randn(BATCH, *IMAGE.dims, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)
    return Step(index, images, torch.zeros(BATCH).long(), torch.arange(BATCH), BATCH, slice(0, BATCH), seed=4)


def objective(cost: CostName, planner: LocalPlanner | None = None) -> TransportObjective:
    spec = TransportSpec(kind="transport", cost=cost, plans="local")
    return TransportObjective(spec, Affine(), planner or LocalPlanner())


def pair_costs(x: torch.Tensor, y: torch.Tensor, cost: CostName) -> torch.Tensor:
    """Compute the cost of every pair from the definition."""
    x, y = x.flatten(1)[:, None], y.flatten(1).double()[None]
    if cost == "cosine":
        return 1 - (x * y).sum(2) / (x.norm(dim=2) * y.norm(dim=2))
    return (x - y).square().sum(2) if cost == "squared-euclidean" else (x - y).norm(dim=2)


@pytest.mark.parametrize("cost", COSTS)
def test_the_loss_is_the_optimal_mean_cost(cost: CostName) -> None:
    made = objective(cost)
    loss = made.phases[0].loss(step())
    samples = made.generator(step().normal("latents", LATENT))
    costs = pair_costs(samples, step().images, cost).detach()
    expected = float(costs[linear_sum_assignment(costs)].mean())
    assert float(loss.total.detach()) == pytest.approx(expected, rel=1e-6)
    assert float(loss.sums["transport_cost"]) == float(loss.total.detach())
    assert loss.sums["plan_wait_ms"] > 0
    assert loss.maxima["plan_relative_gap"] < 1e-5


@pytest.mark.parametrize("cost", COSTS)
def test_the_gradient_is_that_of_the_cost_along_the_fixed_plan(cost: CostName) -> None:
    made = objective(cost)
    made.phases[0].loss(step()).total.backward()
    found = made.generator.weights.grad
    twin = Affine()
    costs = pair_costs(twin(step().normal("latents", LATENT)), step().images, cost)
    rows, columns = linear_sum_assignment(costs.detach())
    costs[rows, columns].mean().backward()
    torch.testing.assert_close(found, twin.weights.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("cost", COSTS)
def test_the_gradient_is_that_of_the_distance(cost: CostName) -> None:
    """Envelope theorem: the plan is solved again for each changed weight, without effect on the gradient."""
    made = objective(cost)
    phase = made.phases[0]
    phase.loss(step()).total.backward()
    weights = made.generator.weights
    with torch.no_grad():
        for place in range(weights.numel()):
            across = []
            for displacement in (1e-5, -1e-5):
                weights.view(-1)[place] += displacement
                across.append(float(phase.loss(step()).total))
                weights.view(-1)[place] -= displacement
            slope = (across[0] - across[1]) / 2e-5
            assert float(weights.grad.view(-1)[place]) == pytest.approx(slope, rel=1e-4, abs=1e-7), place


class Narrow(Affine):
    """A network with a matrix product that autocast rounds."""

    def forward(self, latents: torch.Tensor, conditions: torch.Tensor | None = None) -> torch.Tensor:
        weights = self.weights.float()
        return torch.addmm(weights[-1], latents, weights[:-1]).view(-1, *IMAGE.dims)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("power", [2.0, 1.5])
@pytest.mark.parametrize("kind", ["exact", "sinkhorn-divergence", "sliced"])
def test_autocast_ends_where_transport_begins(kind: str, power: float, weighted: bool) -> None:
    """The loss equals that of the rounded samples, up to float32 precision."""
    sliced = kind == "sliced"
    document = {"kind": "transport", "distance": {"kind": kind}, "plans": "local"}
    if not sliced:
        document |= {"cost": "power", "power": power}
    spec = TransportSpec.model_validate(document)
    weights = torch.tensor([1.0, 2.0]) if weighted and not sliced else None

    def loss(generator: Generator, bfloat16: bool) -> torch.Tensor:
        made = TransportObjective(spec, generator, LocalPlanner(), weights)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            return made.phases[0].loss(step()).total

    with torch.autocast("cpu", torch.bfloat16):
        rounded = Narrow()(step().normal("latents", LATENT)).detach()
    assert rounded.dtype == torch.bfloat16

    class Same(Narrow):
        def forward(self, latents: torch.Tensor, conditions: torch.Tensor | None = None) -> torch.Tensor:
            return rounded.float() + 0 * self.weights.sum().float()

    found = loss(Narrow(), bfloat16=True)
    assert found.dtype == torch.float32
    assert float(found.detach()) == pytest.approx(float(loss(Same(), bfloat16=False).detach()), rel=2e-6)
    found.backward()


def test_latents_are_of_the_step_and_the_key_names_it() -> None:
    asked: list[Share] = []

    class Listening(LocalPlanner):
        def plan_rows(self, share: Share) -> RowBlock:
            asked.append(share)
            return super().plan_rows(share)

    made = objective("squared-euclidean", Listening())
    for index in (0, 1, 0):
        made.phases[0].loss(step(index))
    assert [share.key for share in asked] == ["step-0", "step-1", "step-0"]
    assert torch.equal(asked[0].x, asked[2].x)
    assert not torch.equal(asked[0].x, asked[1].x)
    assert not any(share.x.requires_grad for share in asked)


@pytest.mark.parametrize("kind", ["exact", "sinkhorn-divergence", "sliced"])
def test_samples_that_are_not_finite_have_diverged(kind: str) -> None:
    spec = TransportSpec.model_validate({"kind": "transport", "distance": {"kind": kind}, "plans": "local"})
    made = TransportObjective(spec, Affine(), LocalPlanner())
    made.generator.weights.data[0, 0] = float("nan")
    with pytest.raises(DivergedError, match=r"at step 5, .*(in)?finite.*\n.*hint: lower optimizer.learning_rate"):
        made.phases[0].loss(step(5))


def test_an_epsilon_that_is_too_small_is_no_divergence() -> None:
    distance = {"kind": "sinkhorn-divergence", "epsilon": 1e-12}
    spec = TransportSpec.model_validate({"kind": "transport", "distance": distance, "plans": "local"})
    with pytest.raises(ProblemError, match="epsilon"):
        TransportObjective(spec, Affine(), LocalPlanner()).phases[0].loss(step())


def test_a_plan_that_cannot_be_had_is_no_divergence() -> None:
    class Stopping(LocalPlanner):
        def plan_rows(self, share: Share) -> RowBlock:
            raise NotConvergedError("it stopped short")

    with pytest.raises(NotConvergedError, match="it stopped short"):
        objective("squared-euclidean", Stopping()).phases[0].loss(step())


@pytest.mark.parametrize("distance", [{"kind": "sinkhorn-divergence", "epsilon": 0.5}, {"kind": "sliced"}])
def test_other_distances_have_their_gradient(distance: dict[str, object]) -> None:
    spec = TransportSpec.model_validate({"kind": "transport", "distance": distance, "plans": "local"})
    made = TransportObjective(spec, Affine(), LocalPlanner())
    phase, weights = made.phases[0], made.generator.weights
    phase.loss(step()).total.backward()
    along = torch.randn(weights.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    across = []
    with torch.no_grad():
        for displacement in (1e-2, -2e-2):
            weights += displacement * along
            across.append(float(phase.loss(step()).total))
    slope = (across[0] - across[1]) / 2e-2
    assert float((weights.grad * along).sum()) == pytest.approx(slope, rel=0.02)


LABELS = torch.arange(BATCH) % 3


@pytest.mark.parametrize("kind", ["exact", "sinkhorn-divergence"])
def test_an_image_that_weighs_twice_is_one_that_is_there_twice(kind: str) -> None:
    """Class weights 2 and 0 among three classes are equivalent to a batch with duplicated images of the first class."""
    spec = TransportSpec.model_validate({"kind": "transport", "distance": {"kind": kind}, "plans": "local"})
    weighted = TransportObjective(spec, Affine(), LocalPlanner(), torch.tensor([2.0, 1.0, 0.0]))
    plain = TransportObjective(spec, Affine(), LocalPlanner())
    now = replace(step(), labels=LABELS)
    doubled = torch.cat([now.images[LABELS == 0], now.images[LABELS == 0], now.images[LABELS == 1]])
    losses = [made.phases[0].loss(at) for made, at in ((weighted, now), (plain, replace(now, images=doubled)))]
    for loss in losses:
        loss.total.backward()
    assert float(losses[0].total.detach()) == pytest.approx(float(losses[1].total.detach()), rel=1e-5)
    torch.testing.assert_close(weighted.generator.weights.grad, plain.generator.weights.grad, rtol=1e-3, atol=1e-6)


def test_a_batch_in_which_nothing_weighs_anything_is_taken_as_it_is() -> None:
    spec = TransportSpec(kind="transport", plans="local")
    weighted = TransportObjective(spec, Affine(), LocalPlanner(), torch.tensor([0.0, 1.0, 1.0]))
    assert float(weighted.phases[0].loss(step()).total.detach()) == float(
        objective("squared-euclidean").phases[0].loss(step()).total.detach()
    )


def test_the_sliced_distance_is_the_mean_over_lines() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, lines = (torch.randn(*shape, generator=generator) for shape in ((9, 4), (9, 4), (4, 5)))
    expected = 0.0
    for line in lines.T / lines.norm(dim=0)[:, None]:
        costs = ((x @ line)[:, None] - (y @ line)).square()
        expected += float(costs[linear_sum_assignment(costs)].mean()) / 5
    assert float(sliced_distance(x, y, lines)) == pytest.approx(expected, rel=1e-5)


def test_lines_are_new_at_each_step_and_squares_alone_are_sliced() -> None:
    spec = TransportSpec.model_validate({"kind": "transport", "distance": {"kind": "sliced", "directions": 2}})
    phase = TransportObjective(spec, Affine(), LocalPlanner()).phases[0]
    one, other, again = (float(phase.loss(step(index)).total.detach()) for index in (0, 1, 0))
    assert one == again
    assert one != other
    with pytest.raises(ValueError, match="cost 'euclidean': distance sliced"):
        TransportSpec.model_validate(spec.model_dump() | {"cost": "euclidean"})
    with pytest.raises(ValueError, match=r"class_weights \{'cat': 2.0\}: distance sliced"):
        TransportSpec.model_validate(spec.model_dump() | {"class_weights": {"cat": 2}})
