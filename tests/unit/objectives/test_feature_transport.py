"""Generators trained by the transport distance in features, and the features."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from runs import CPU, encoders, go_on, job, start, stripes, tensors
from torch import Tensor, nn

from pipelines.data.loader import ShardedDataset
from pipelines.data.partition import batch_indices
from pipelines.errors import DivergedError, SpecError
from pipelines.models.autoencoder import AutoEncoder
from pipelines.models.bundle import to_float
from pipelines.models.classifiers import Perceptron
from pipelines.models.generators import ConvGenerator
from pipelines.models.network import Generator
from pipelines.objectives import features as of_features
from pipelines.objectives.feature_transport import FeatureTransport
from pipelines.objectives.features import FeatureMap, RealPoints
from pipelines.objectives.phase import Step
from pipelines.shape import ImageShape
from pipelines.spec import FeatureSpec, TransportSpec, parse_spec
from pipelines.transport.divergence import sinkhorn_divergence
from pipelines.transport.plan import RowBlock
from pipelines.transport.planner import LocalPlanner, Share
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import solve

BATCH, LATENT = 16, 3
EPSILON = 0.05


@pytest.fixture(scope="module")
def striped(tmp_path_factory: pytest.TempPathFactory) -> ShardedDataset:
    return stripes(tmp_path_factory.mktemp("features"))


class Fixed(Generator):
    """A generator whose samples are its weights."""

    def __init__(self, image: ImageShape, classes: int = 0) -> None:
        super().__init__(image, LATENT, classes)
        self.samples = nn.Parameter(torch.randn(BATCH, *image.dims, generator=torch.Generator().manual_seed(5)))

    def forward(self, latents: Tensor, conditions: Tensor | None = None) -> Tensor:
        return self.samples


class Recording(LocalPlanner):
    """Records its requests."""

    def __init__(self) -> None:
        self.asked: list[Share] = []

    def plan_rows(self, share: Share) -> RowBlock:
        self.asked.append(share)
        return super().plan_rows(share)


def features_of(data: ShardedDataset, *specs: dict[str, Any]) -> FeatureMap:
    named = [FeatureSpec(**spec) for spec in specs]
    networks = {spec.network: AutoEncoder(data.image, 4, 6) for spec in named if spec.network != "pixels"}
    return FeatureMap(named, networks, data.train, data.image, CPU)


def objective_of(data: ShardedDataset, classes: int = 0, **spec: Any) -> tuple[FeatureTransport, Step]:
    asked: dict[str, Any] = {"features": [{"side": 6}], "distance": {"kind": "sinkhorn-divergence", "epsilon": EPSILON}}
    parsed = TransportSpec.model_validate({"kind": "transport", "plans": "local"} | asked | spec)
    features = FeatureMap(parsed.features, {}, data.train, data.image, CPU)
    reals = RealPoints(features, data.train, CPU)
    made = FeatureTransport(parsed, Fixed(data.image, classes), LocalPlanner(), features, reals)
    indices = torch.from_numpy(batch_indices(len(data.train), 0, BATCH, 0))
    images, labels = data.train.take(indices)
    return made, Step(0, to_float(images), labels, indices, BATCH, slice(0, BATCH), seed=4)


def gradient(made: FeatureTransport, step: Step) -> Tensor:
    (found,) = torch.autograd.grad(made.phases[0].loss(step).total, made.generator.parameters())
    return found


def test_the_gradient_is_that_of_the_sinkhorn_divergence_in_features(striped: ShardedDataset) -> None:
    made, step = objective_of(striped)
    points, real = made.features(made.generator(torch.zeros(1))), made.reals.take(step.indices)[0]
    distance = sinkhorn_divergence(points, real, epsilon=EPSILON, tolerance=1e-6)
    (expected,) = torch.autograd.grad(distance, made.generator.parameters())
    torch.testing.assert_close(gradient(made, step), expected, rtol=0.02, atol=2e-5)


def test_the_two_halves_of_a_batch_repel_each_other(striped: ShardedDataset) -> None:
    """Compares with ½W(x, z) + ½W(x′, z) − ½W(x, x′) for fixed exact plans."""
    made, step = objective_of(striped, distance={"kind": "exact"}, self_term="two-batch")
    points, real = made.features(made.generator(torch.zeros(1))), made.reals.take(step.indices)[0]
    first, other = points[::2], points[1::2]

    def cost(x: Tensor, y: Tensor) -> Tensor:
        plan = torch.from_numpy(solve(TransportProblem.between(x.detach(), y.detach())).dense()).float()
        return (plan * torch.cdist(x, y).square()).sum()

    total = (cost(first, real) + cost(other, real) - cost(first, other)) / 2
    (expected,) = torch.autograd.grad(total, made.generator.parameters())
    torch.testing.assert_close(gradient(made, step), expected, rtol=1e-3, atol=1e-6)


def test_an_exact_plan_without_second_batch_has_no_self_term(striped: ShardedDataset) -> None:
    made, step = objective_of(striped, distance={"kind": "exact"})
    loss = made.phases[0].loss(step)
    assert "within_generated" not in loss.sums
    points, real = made.features(made.generator(torch.zeros(1))).detach(), made.reals.take(step.indices)[0]
    best = solve(TransportProblem.between(points, real)).certificate.primal
    assert loss.sums["transport_cost"] == pytest.approx(best)


def test_a_drift_that_is_normalised_has_the_same_direction_and_unit_size(striped: ShardedDataset) -> None:
    plain, normal = (gradient(*objective_of(striped, normalise=normalise)) for normalise in (False, True))
    assert float(torch.cosine_similarity(plain.flatten(), normal.flatten(), dim=0)) == pytest.approx(1, abs=1e-5)
    squares = float(objective_of(striped)[0].phases[0].loss(objective_of(striped)[1]).sums["drift"])
    torch.testing.assert_close(normal * squares**0.5, plain, rtol=1e-4, atol=1e-7)


def test_samples_of_a_class_are_drawn_to_images_of_it(striped: ShardedDataset) -> None:
    """With a large cost for another class, no plan moves mass between classes."""
    made, step = objective_of(striped, classes=2, condition_weight=1e3)
    points, real = made.features(made.generator(torch.zeros(1))).detach(), made.reals.take(step.indices)[0]
    ends = [made.drift_field._with_classes(side, step.labels) for side in (points, real)]
    plan = solve(TransportProblem.between(*ends, epsilon=EPSILON)).dense()
    other = step.labels[:, None] != step.labels[None]
    assert 0 < int(other.sum()) < other.numel()
    assert plan[other.numpy()].sum() < 1e-6
    assert not torch.allclose(gradient(made, step), gradient(*objective_of(striped, classes=2)))


def test_more_real_images_than_the_batch_are_drawn_from_the_whole_split(striped: ShardedDataset) -> None:
    made, step = objective_of(striped, reals=1000)
    asked: list[Tensor] = []
    take = made.reals.take

    def watched(indices: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(indices)
        return take(indices)

    made.reals.take = watched  # type: ignore[method-assign]
    for _ in range(2):
        made.phases[0].loss(step)
    assert len(asked[0]) == 1000
    assert set(asked[0].tolist()) == set(range(len(striped.train)))
    assert torch.equal(asked[0], asked[1])


def test_the_first_step_of_a_pool_follows_its_drift(striped: ShardedDataset) -> None:
    """With fixed targets, the first gradient equals that of the distance."""
    whole, pooled = (objective_of(striped, reals=BATCH, pool=pool) for pool in (None, BATCH))
    torch.testing.assert_close(gradient(*pooled), gradient(*whole), rtol=1e-4, atol=1e-7)


def test_plans_of_a_pool_serve_its_steps(striped: ShardedDataset) -> None:
    planner = Recording()
    made, step = objective_of(striped, classes=2, condition_weight=2, self_term="two-batch", pool=3 * BATCH)
    pooled = FeatureTransport(made.spec, made.generator, planner, made.features, made.reals)
    targets = []
    for index in range(6):
        sums = pooled.phases[0].loss(replace(step, index=index)).sums
        assert (sums["plan_solve_ms"] > 0) == (index % 3 == 0)
        assert pooled._pool is not None
        targets.append(pooled._pool.targets)
        with torch.no_grad():
            made.generator.samples.mul_(0.9)  # type: ignore[union-attr,operator]
    assert [share.key for share in planner.asked] == [
        f"step-{n}-{name}" for n in (0, 3) for name in ("0z", "1z", "within")
    ]
    assert {(len(share.x), len(share.y)) for share in planner.asked} == {(24, 24)}
    # In each half as many samples of a class as real images of it: none must pay for another class.
    classes = [[share.x[:, -2:].sum(0), share.y[:, -2:].sum(0)] for share in planner.asked]
    assert all(torch.equal(samples, images) for samples, images in classes)
    assert targets[0] is targets[2]
    assert not torch.equal(targets[2], targets[3])


@pytest.mark.parametrize("reals", [None, 8, 24])
def test_both_sides_of_a_plan_hold_the_classes_in_the_same_shares(striped: ShardedDataset, reals: int | None) -> None:
    planner = Recording()
    made, step = objective_of(striped, classes=2, condition_weight=2, self_term="two-batch", reals=reals)
    planned = FeatureTransport(made.spec, made.generator, planner, made.features, made.reals)
    planned.phases[0].loss(step)
    if reals != 24:
        assert {(len(share.x), len(share.y)) for share in planner.asked} == {(8, 8)}
        assert all(torch.equal(share.x[:, -2:].sum(0), share.y[:, -2:].sum(0)) for share in planner.asked)
    else:  # the first 8 of them say which classes are asked for
        drawn = planned._drawn(step.seed, step.index, reals)[:8]
        assert torch.equal((planner.asked[0].x[:, -1] > 0).long(), made.reals.labels(drawn))


@pytest.mark.parametrize(
    "fields",
    [{"self_term": "two-batch"}, {"distance": {"kind": "exact"}}, {"self_term": "two-batch", "reals": 20}],
)
def test_each_step_of_a_pool_moves_its_own_samples(striped: ShardedDataset, fields: dict[str, Any]) -> None:
    """Without an update of the generator, its distance to all targets is the length of the drift."""
    made, step = objective_of(striped, classes=2, condition_weight=2, pool=3 * BATCH, **fields)
    generator = ConvGenerator(striped.image, LATENT, 4, conditions=2)
    pooled = FeatureTransport(made.spec, generator, LocalPlanner(), made.features, made.reals)
    losses = [pooled.phases[0].loss(replace(step, index=index)) for index in range(3)]
    drift = float(losses[0].sums["drift"])
    assert sum(float(loss.total.detach()) for loss in losses) / 3 == pytest.approx(drift, rel=1e-4)
    assert drift > 0


def test_a_pool_leaves_the_generator_as_it_was(striped: ShardedDataset) -> None:
    """Samples that are drawn only for plans change neither weights nor running statistics."""
    spec = job("pooled-transport")
    objective, state = start(spec, striped)
    assert isinstance(objective, FeatureTransport)
    before = {name: value.clone() for name, value in tensors(state).items()}
    _, step = objective_of(striped)
    objective._drawn_pool(step, 0)
    assert all(torch.equal(value, before[name]) for name, value in tensors(state).items())


def test_samples_that_are_not_finite_end_the_run(striped: ShardedDataset) -> None:
    made, step = objective_of(striped)
    with torch.no_grad():
        made.generator.samples.fill_(torch.nan)  # type: ignore[union-attr,operator]
    with pytest.raises(DivergedError, match="at step 0, no transport problem can be built from features of samples"):
        made.phases[0].loss(step)


def test_two_real_images_are_1_apart_on_average(striped: ShardedDataset) -> None:
    specs = [{"side": 3, "weight": 2}, {"network": "a", "layer": 1, "side": 2}, {"network": "a"}]
    features = features_of(striped, *specs)
    points = features(to_float(striped.train.take(torch.arange(len(striped.train)))[0]))
    squares = torch.cdist(points, points).square()
    assert float(squares.mean()) == pytest.approx(1, rel=1e-3)
    shares = [part.square().sum() for part in (points - points.mean(0)).split([9, 4 * 4, 6], dim=1)]
    assert [float(share / sum(shares)) for share in shares] == pytest.approx([0.5, 0.25, 0.25], rel=1e-3)


def test_networks_of_features_are_frozen_and_images_get_gradients(striped: ShardedDataset) -> None:
    features = features_of(striped, {"network": "a", "layer": 2})
    images = torch.rand(2, *striped.image.dims, requires_grad=True)
    features(images).square().sum().backward()
    assert images.grad is not None
    assert bool(images.grad.any())
    assert not any(weights.requires_grad for weights in features.networks["a"].parameters())


def test_points_that_are_not_kept_are_computed(striped: ShardedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    features = features_of(striped, {"side": 6}, {"network": "a"})
    kept = RealPoints(features, striped.train, CPU)
    monkeypatch.setattr(of_features, "KEPT_BYTES", 0)
    monkeypatch.setattr(of_features, "BLOCK", 7)
    computed = RealPoints(features, striped.train, CPU)
    chosen = torch.tensor([3, 30, 3])
    assert computed._kept is None
    assert kept._kept is not None
    torch.testing.assert_close(kept.take(chosen)[0], computed.take(chosen)[0], rtol=1e-3, atol=1e-4)
    assert torch.equal(kept.labels(chosen), striped.train.take(chosen)[1])


def test_principal_components_keep_distances_and_all_of_them_keep_all(striped: ShardedDataset) -> None:
    named = [FeatureSpec()]
    images = to_float(striped.train.take(torch.arange(len(striped.train)))[0])

    def squares(components: int | None) -> tuple[int, Tensor]:
        made = FeatureMap(named, {}, striped.train, striped.image, CPU, components)
        points = made.reduced(made(images))
        return points.shape[1], torch.cdist(points, points).square()

    width, exact = squares(None)
    assert width == striped.image.pixels
    assert squares(10_000)[0] == width
    errors = []
    for components in (4, 16, 36):
        width, found = squares(components)
        assert width == components
        assert bool((found <= exact + 1e-4).all())
        errors.append(float((exact - found).mean()))
    assert errors[0] > errors[1] > errors[2] >= 0
    assert errors[2] < 0.1 * float(exact.mean())
    assert torch.equal(squares(16)[1], squares(16)[1])


def test_plans_are_of_components_and_drifts_of_all_numbers(striped: ShardedDataset) -> None:
    made, step = objective_of(striped)
    few = FeatureMap(made.features.specs, {}, striped.train, striped.image, CPU, 2)
    planner = Recording()
    reduced = FeatureTransport(made.spec, made.generator, planner, few, RealPoints(few, striped.train, CPU))
    moved = gradient(reduced, step)
    assert {share.x.shape[1] for share in planner.asked} == {share.y.shape[1] for share in planner.asked} == {2}
    assert moved.abs().sum() > 0
    assert not torch.allclose(moved, gradient(made, step))


@pytest.mark.parametrize(
    ("spec", "network", "message"),
    [
        ({"network": "a"}, AutoEncoder(ImageShape(1, 14, 12), 4, 6), "a reads images of (1, 14, 12), received ones of"),
        ({"network": "a"}, ConvGenerator(ImageShape(1, 12, 12), 4, 4), "a is a generator"),
        ({"network": "a", "layer": 4}, AutoEncoder(ImageShape(1, 12, 12), 4, 6), "layer 4 of a, which has 2"),
        ({"network": "a", "layer": 2}, Perceptron(ImageShape(1, 12, 12), 2), "layer 2 of a, which has 1"),
        (
            {"network": "a", "layer": 2, "side": 2},
            AutoEncoder(ImageShape(1, 12, 12), 4, 6),
            "layer 2 of a is not a feature map",
        ),
    ],
)
def test_networks_that_give_no_such_features(
    striped: ShardedDataset, spec: dict[str, Any], network: Any, message: str
) -> None:
    with pytest.raises(SpecError, match=re.escape(f"objective.features.0: {message}")):
        FeatureMap([FeatureSpec(**spec)], {"a": network}, striped.train, striped.image, CPU)


def test_points_that_would_fill_the_memory_are_refused(
    striped: ShardedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_features, "LARGEST_POINT", 150)
    with pytest.raises(
        SpecError, match=r"objective.features.1: 144 numbers for an image, over the limit of 150"
    ) as told:
        features_of(striped, {"side": 4}, {})
    assert "smaller side" in str(told.value.hint)
    features_of(striped, {"side": 4}, {"side": 4})


@pytest.mark.parametrize("kind", ["feature-transport", "pooled-transport"])
def test_a_run_resumes_bit_for_bit(striped: ShardedDataset, kind: str) -> None:
    document = job(kind).model_dump(mode="json")
    document["objective"]["features"] = [{"network": "an-encoder", "layer": 1}, {"network": "an-encoder"}]
    spec = parse_spec(document)
    assert encoders(spec, striped).keys() == {"an-encoder"}
    half = spec.model_copy(update={"train": spec.train.model_copy(update={"images": 48})})
    whole, first = start(spec, striped), start(half, striped)
    go_on(spec, striped, *whole)
    go_on(half, striped, *first)
    objective, state = start(spec, striped)
    for name, network in state.networks.items():
        network.load_state_dict(first[1].networks[name].state_dict())
    for name, optimizer in state.optimizers.items():
        optimizer.load_state_dict(first[1].optimizers[name].state_dict())
    state.step, state.images = first[1].step, first[1].images
    go_on(spec, striped, objective, state)
    assert all(torch.equal(value, tensors(whole[1])[name]) for name, value in tensors(state).items())
