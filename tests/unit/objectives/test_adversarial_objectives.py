"""Losses of adversarial objectives, compared with their definitions."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pipelines.errors import DivergedError, SpecError
from pipelines.models.biggan import BigGan
from pipelines.models.critics import ConvCritic, Critic, ResidualCritic
from pipelines.models.generators import ConvGenerator
from pipelines.models.network import Generator
from pipelines.models.orthogonal import overlap
from pipelines.objectives.gan import Gan
from pipelines.objectives.learned_transport import LearnedTransport
from pipelines.objectives.phase import Step
from pipelines.objectives.wasserstein import Wasserstein
from pipelines.shape import ImageShape
from pipelines.spec import GanSpec, LearnedTransportSpec, WassersteinSpec, parse_spec
from pipelines.transport.plan import RowBlock
from pipelines.transport.planner import LocalPlanner, Share
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import solve
from tests.runs import job

IMAGE = ImageShape(1, 8, 8)
BATCH = 12


def step(index: int = 0) -> Step:
    images = torch.randn(BATCH, *IMAGE.dims, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)
    return Step(index, images, torch.zeros(BATCH).long(), torch.arange(BATCH), BATCH, slice(0, BATCH), seed=4)


def players(features: int = 1, **options: Any) -> tuple[ConvGenerator, Critic]:
    torch.manual_seed(0)
    return ConvGenerator(IMAGE, 5, 4), ConvCritic(IMAGE, 4, features, **options)


def gan(loss: str) -> Gan:
    return Gan(GanSpec.model_validate({"kind": "gan", "loss": loss}), *players())


def wasserstein(**fields: Any) -> Wasserstein:
    return Wasserstein(WassersteinSpec.model_validate({"kind": "wasserstein"} | fields), *players())


def learned(planner: LocalPlanner | None = None, **fields: Any) -> LearnedTransport:
    spec = LearnedTransportSpec.model_validate({"kind": "learned-transport", "features": 6, "plans": "local"} | fields)
    return LearnedTransport(spec, *players(6), planner or LocalPlanner())


def logits(made: Gan | Wasserstein) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the critic's scores of the images, of the samples for its update, and of those for the generator's."""
    own, others = (made.generator(step().normal(name, 5)) for name in ("critic's latents", "latents"))
    return made.critic(step().images).detach(), made.critic(own).detach(), made.critic(others).detach()


@pytest.mark.parametrize("loss", ["zero-sum", "non-saturating", "hinge"])
def test_the_losses_of_a_game(loss: str) -> None:
    made = gan(loss)
    critic, generator = made.phases
    real, fake, others = logits(made)
    if loss == "hinge":
        expected = (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
        moved = -others.mean()
    else:
        expected = -(real.sigmoid().log() + (1 - fake.sigmoid()).log()).mean()
        moved = (1 - others.sigmoid()).log().mean() if loss == "zero-sum" else -others.sigmoid().log().mean()
    found = critic.loss(step())
    assert found.total.item() == pytest.approx(float(expected), rel=1e-5)
    assert generator.loss(step()).total.item() == pytest.approx(float(moved), rel=1e-5)
    right = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
    assert float(found.sums["critic_accuracy"]) == pytest.approx(float(right))
    if loss != "hinge":
        assert float(found.sums["equilibrium_gap"]) == pytest.approx(math.log(4) - float(expected), rel=1e-5)


def test_players_of_a_zero_sum_game_move_the_same_number_apart() -> None:
    """On the same samples, the generator's gradient is minus that of the critic's loss."""
    made = gan("zero-sum")
    fakes = made.generator(step().normal("latents", 5)).detach().requires_grad_()
    _, fake = made.critic(step().images), made.critic(fakes)
    (critics,) = torch.autograd.grad(F.softplus(fake).sum() / BATCH, fakes)
    made.generator.forward = lambda latents, conditions=None: fakes  # type: ignore[method-assign]
    (generators,) = torch.autograd.grad(made.phases[1].loss(step()).total, fakes)
    torch.testing.assert_close(generators, -critics)


@pytest.mark.parametrize("made", [gan("hinge"), wasserstein(), learned()], ids=["gan", "wasserstein", "learned"])
def test_the_critic_moves_with_the_generator_held_fixed(made: Any) -> None:
    next(phase for phase in made.phases if phase.name == "critic").loss(step()).total.backward()
    assert all(weights.grad is None for weights in made.generator.parameters())
    assert any(bool(weights.grad.abs().sum()) for weights in made.critic.parameters())


def test_how_often_the_players_move() -> None:
    assert [phase.every for phase in gan("hinge").phases] == [1, 1]
    assert [phase.every for phase in wasserstein(critic_steps=4).phases] == [1, 4]
    assert [(phase.name, phase.every) for phase in learned(critic_every=2).phases] == [("critic", 2), ("generator", 1)]


def test_the_estimate_and_the_penalty() -> None:
    made = wasserstein(penalty=3.0)
    real, fake, others = logits(made)
    fakes = made.generator(step().normal("critic's latents", 5)).detach()
    shares = step().uniform("interpolation")[:, None, None, None]
    between = (step().images + shares * (fakes - step().images)).requires_grad_()
    (slopes,) = torch.autograd.grad(made.critic(between).sum(), between)
    lengths = slopes.flatten(1).norm(dim=1)
    found = made.phases[0].loss(step())
    assert float(found.sums["critic_estimate"]) == pytest.approx(float(real.mean() - fake.mean()), rel=1e-4, abs=1e-6)
    assert float(found.sums["critic_slope"]) == pytest.approx(float(lengths.mean()), rel=1e-5)
    expected = fake.mean() - real.mean() + 3 * (lengths - 1).square().mean()
    assert found.total.item() == pytest.approx(float(expected), rel=1e-5)
    assert made.phases[1].loss(step()).total.item() == pytest.approx(-float(others.mean()), rel=1e-5)


def test_the_penalty_reaches_the_critics_weights() -> None:
    made = wasserstein(penalty=3.0)
    plain = wasserstein(constraint="clip")
    for objective in (made, plain):
        objective.phases[0].loss(step()).total.backward()
    assert not torch.allclose(made.critic.layers[0].weight.grad, plain.critic.layers[0].weight.grad)


def test_clipped_weights_stay_in_their_box() -> None:
    made = wasserstein(constraint="clip", clip=0.02)
    project = made.phases[0].project
    assert project is not None
    before = [weights.clone() for weights in made.critic.parameters()]
    project()
    for weights, old in zip(made.critic.parameters(), before, strict=True):
        assert torch.equal(weights, old.clamp(-0.02, 0.02))
    assert wasserstein().phases[0].project is None


def test_spectral_norms_are_one() -> None:
    _, critic = players(spectral=True)
    for _ in range(200):
        critic(step().images)
    for layer in (critic.layers[0], critic.last):
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("dims", [(1, 28, 28), (3, 32, 32), (1, 8, 8), (3, 64, 64), (1, 12, 20)])
@pytest.mark.parametrize("kind", [ConvCritic, ResidualCritic])
def test_critics_of_every_size(kind: type[ConvCritic | ResidualCritic], dims: tuple[int, int, int]) -> None:
    for spectral in (False, True):
        critic = kind(ImageShape(*dims), 4, 3, spectral=spectral)
        assert critic(torch.zeros(2, *dims)).shape == (2, 3)
        told = kind(ImageShape(*dims), 4, spectral=spectral, conditions=5)
        assert told(torch.zeros(2, *dims), torch.eye(5)[:2]).shape == (2, 1)


@pytest.mark.parametrize("kind", [ConvCritic, ResidualCritic])
def test_a_class_moves_the_score_along_what_the_last_layer_is_given(kind: type[ConvCritic | ResidualCritic]) -> None:
    torch.manual_seed(0)
    critic = kind(IMAGE, 4, conditions=3)
    assert critic.by_condition is not None
    images, asked = step().images, torch.eye(3)[torch.arange(BATCH) % 3]
    vectors = critic.layers(images)
    along = torch.stack([critic.by_condition.weight[:, row % 3] @ vectors[row] for row in range(BATCH)])
    assert float(along.detach().abs().min()) > 0
    torch.testing.assert_close(critic(images, asked), critic.last(vectors) + along[:, None])


def conditional(orthogonal: float = 0.0) -> Gan:
    torch.manual_seed(0)
    spec = GanSpec.model_validate({"kind": "gan", "loss": "hinge", "orthogonal": orthogonal})
    return Gan(spec, BigGan(IMAGE, 8, 4, conditions=3), ResidualCritic(IMAGE, 4, conditions=3))


def test_players_are_told_the_classes_of_the_batch() -> None:
    made = conditional()
    made.generator.eval()
    labels = torch.arange(BATCH) % 3
    told = replace(step(), labels=labels)
    asked = torch.eye(3)[labels]
    fake = made.critic(made.generator(told.normal("critic's latents", 8), asked), asked)
    real = made.critic(told.images, asked)
    expected = (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
    assert made.phases[0].loss(told).total.item() == pytest.approx(expected.item(), rel=1e-5)
    moved = -made.critic(made.generator(told.normal("latents", 8), asked), asked).mean()
    assert made.phases[1].loss(told).total.item() == pytest.approx(moved.item(), rel=1e-5)
    others = replace(told, labels=(labels + 1) % 3)
    assert made.phases[1].loss(others).total.item() != pytest.approx(moved.item(), rel=1e-3)


def test_rows_that_are_not_at_right_angles_are_paid_for() -> None:
    made, free = conditional(orthogonal=0.5), conditional()
    for objective in (made, free):
        objective.generator.eval()
        objective.generator.blocks[0].second.parametrizations.weight.original.data += 0.1
    found = made.phases[1].loss(step())
    added = found.total.item() - free.phases[1].loss(step()).total.item()
    assert added == pytest.approx(0.5 * overlap(made.generator).item(), rel=1e-4)
    assert float(found.sums["overlap"]) == pytest.approx(overlap(made.generator).item(), rel=1e-5)
    halves = [made.phases[1].loss(part).sums["overlap"] for part in step().parts(2)]
    assert float(sum(halves)) == pytest.approx(overlap(made.generator).item(), rel=1e-5)


def test_overlap_by_hand() -> None:
    layer = torch.nn.Conv2d(1, 3, (1, 2), bias=False)
    layer.weight.data = torch.tensor([[3.0, 0], [1, 1], [0, 2]]).view(3, 1, 1, 2)
    # Inner products 3, 0 and 2, each twice.
    assert overlap(torch.nn.Sequential(layer)).item() == pytest.approx(26)
    assert overlap(torch.nn.utils.parametrizations.spectral_norm(layer)).item() == pytest.approx(26)


def test_a_big_gan_starts_orthogonal() -> None:
    torch.manual_seed(0)
    square = BigGan(ImageShape(1, 28, 28), 80, 8, conditions=2).blocks[0].second
    rows = square.parametrizations.weight.original.flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.matrix_norm(square.weight.flatten(1), 2), torch.tensor(1.0))


def test_an_image_lies_between_those_of_two_classes() -> None:
    """Each part of the latent vector and the class affect the image."""
    torch.manual_seed(0)
    network: Generator = BigGan(ImageShape(1, 28, 28), 9, 4, conditions=2).eval()
    latent, cat = torch.randn(1, 9), torch.tensor([[1.0, 0.0]])
    image = network(latent, cat)
    for place in range(9):
        assert not torch.allclose(network(latent + 0.5 * torch.eye(9)[place], cat), image), place
    half, dog = network(latent, torch.tensor([[0.5, 0.5]])), network(latent, torch.tensor([[0.0, 1.0]]))
    way = float((dog - image).detach().norm())
    assert 0 < float((half - image).detach().norm()) < way
    assert 0 < float((half - dog).detach().norm()) < way


def embeddings(made: LearnedTransport, latents: str) -> tuple[torch.Tensor, torch.Tensor]:
    fakes = made.generator(step().normal(latents, 5))
    return tuple(F.normalize(made.critic(images), dim=1) for images in (step().images, fakes))  # type: ignore[return-value]


def energy(x: torch.Tensor, y: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Compute the distance from its definition, differentiable for fixed plans."""

    def cost(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        problem = TransportProblem.between(a.detach(), b.detach(), cost="cosine", epsilon=epsilon)
        return (torch.as_tensor(solve(problem).dense()).float() * (1 - a @ b.T)).sum()

    (x0, x1), (y0, y1) = ((points[0::2], points[1::2]) for points in (x, y))
    between = cost(x0, y0) + cost(x0, y1) + cost(x1, y0) + cost(x1, y1)
    return between - 2 * cost(x0, x1) - 2 * cost(y0, y1)


@pytest.mark.parametrize("epsilon", [0.0, 0.05])
def test_the_energy_distance_and_its_slope(epsilon: float) -> None:
    made = learned(epsilon=epsilon)
    found = made.phases[1].loss(step())
    found.total.backward()
    slopes = [weights.grad.clone() for weights in made.generator.parameters()]
    made.generator.zero_grad()
    expected = energy(*embeddings(made, "latents"), epsilon)
    expected.backward()
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-4)
    assert float(found.sums["energy_distance"]) == pytest.approx(expected.item(), rel=1e-4)
    for slope, weights in zip(slopes, made.generator.parameters(), strict=True):
        torch.testing.assert_close(slope, weights.grad, rtol=1e-3, atol=1e-5)


def test_the_critic_climbs_what_the_generator_descends() -> None:
    made = learned(penalty=0.0)
    expected = energy(*embeddings(made, "critic's latents"), 0.05)
    assert made.phases[0].loss(step()).total.item() == pytest.approx(-expected.item(), rel=1e-4)


def test_the_slope_of_the_features_is_paid_for() -> None:
    made = learned(penalty=2.0)
    fakes = made.generator(step().normal("critic's latents", 5)).detach()
    shares = step().uniform("interpolation")[:, None, None, None]
    between = torch.lerp(step().images, fakes, shares)[::4].requires_grad_()
    direction = step().normal("directions", 6)[::4]
    (slopes,) = torch.autograd.grad((F.normalize(made.critic(between), dim=1) * direction).sum(), between)
    free = learned(penalty=0.0).phases[0].loss(step()).total.item()
    paid = made.phases[0].loss(step()).total.item()
    assert paid - free == pytest.approx(2 * slopes.flatten(1).square().sum(1).mean().item(), rel=1e-3)


def test_every_plan_has_a_key_of_its_own() -> None:
    keys: list[str] = []

    class Listening(LocalPlanner):
        def plan_rows(self, share: Share) -> RowBlock:
            keys.append(share.key)
            assert not share.x.requires_grad
            return super().plan_rows(share)

    made = learned(Listening())
    for index in (0, 1):
        for phase in made.phases:
            phase.loss(step(index))
    assert len(keys) == len(set(keys)) == 24
    assert keys[0] == "step-0-critic-xx'"


def test_features_that_are_not_finite_have_diverged() -> None:
    made = learned()
    next(made.critic.parameters()).data[0] = float("nan")
    with pytest.raises(DivergedError, match="at step 5, no transport problem can be built from features of the critic"):
        made.phases[1].loss(step(5))


@pytest.mark.parametrize(
    ("kind", "section", "change", "message"),
    [
        ("wasserstein", "objective", {"critic": {"width": 4, "spectral": True}}, "must keep the critic Lipschitz"),
        ("wasserstein", "objective", {"constraint": "none"}, "must keep the critic Lipschitz"),
        ("learned-transport", "train", {"batch": 1}, "without images in one half of the batch"),
        ("learned-transport", "train", {"accumulate": 2}, "accumulate 2 would split"),
        ("learned-transport", "train", {"compile": True}, "does not support the second derivatives"),
        ("wasserstein", "train", {"compile": True}, "does not support the second derivatives"),
        ("learned-transport", "model", {"conditional": True}, "'learned-transport' cannot train a conditional model"),
    ],
)
def test_what_does_not_go_together_is_refused(kind: str, section: str, change: dict[str, Any], message: str) -> None:
    document = job(kind).model_dump()
    document[section] |= change
    with pytest.raises(SpecError, match=message):
        parse_spec(document)


def test_parts_of_a_batch_are_not_normalised_by_themselves() -> None:
    document = job("gan").model_dump()
    document["train"]["accumulate"] = 2
    parse_spec(document)
    with pytest.raises(SpecError, match="accumulate 2 would split the batches over which this model normalises"):
        parse_spec(document | {"model": {"kind": "biggan"}})
    document["model"]["normalisation"] = "batch"
    with pytest.raises(SpecError, match="accumulate 2 would split the batches over which this model normalises"):
        parse_spec(document)
