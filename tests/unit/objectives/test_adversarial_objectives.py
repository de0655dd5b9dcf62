"""The losses of adversarial players, straight from their definitions."""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pipelines.errors import DivergedError, SpecError
from pipelines.models.critics import Critic
from pipelines.models.generators import ConvGenerator
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
    return ConvGenerator(IMAGE, 5, 4), Critic(IMAGE, 4, features, **options)


def gan(loss: str) -> Gan:
    return Gan(GanSpec.model_validate({"kind": "gan", "loss": loss}), *players())


def wasserstein(**fields: Any) -> Wasserstein:
    return Wasserstein(WassersteinSpec.model_validate({"kind": "wasserstein"} | fields), *players())


def learned(planner: LocalPlanner | None = None, **fields: Any) -> LearnedTransport:
    spec = LearnedTransportSpec.model_validate({"kind": "learned-transport", "features": 6, "plans": "local"} | fields)
    return LearnedTransport(spec, *players(6), planner or LocalPlanner())


def logits(made: Gan | Wasserstein) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The critic's scores of the images, of the samples of its own move, and of the generator's."""
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
    """On the same samples the generator's slope is minus that of the critic's loss."""
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
    for layer in (critic.layers[0], critic.layers[-1]):
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("dims", [(1, 28, 28), (3, 32, 32), (1, 8, 8), (3, 64, 64), (1, 12, 20)])
def test_critics_of_every_size(dims: tuple[int, int, int]) -> None:
    critic = Critic(ImageShape(*dims), 4, 3)
    assert critic(torch.zeros(2, *dims)).shape == (2, 3)


def embeddings(made: LearnedTransport, latents: str) -> tuple[torch.Tensor, torch.Tensor]:
    fakes = made.generator(step().normal(latents, 5))
    return tuple(F.normalize(made.critic(images), dim=1) for images in (step().images, fakes))  # type: ignore[return-value]


def energy(x: torch.Tensor, y: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The distance from its definition, differentiable along fixed plans."""

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
    with pytest.raises(DivergedError, match="at step 5 the critic's features make no transport problem"):
        made.phases[1].loss(step(5))


@pytest.mark.parametrize(
    ("kind", "section", "change", "message"),
    [
        ("wasserstein", "objective", {"critic": {"width": 4, "spectral": True}}, "one thing keeps a critic Lipschitz"),
        ("wasserstein", "objective", {"constraint": "none"}, "one thing keeps a critic Lipschitz"),
        ("learned-transport", "train", {"batch": 1}, "without images in both of its halves"),
        ("learned-transport", "train", {"accumulate": 2}, "accumulate 2 would cut"),
        ("learned-transport", "train", {"compile": True}, "cannot translate the gradient of a gradient"),
        ("wasserstein", "train", {"compile": True}, "cannot translate the gradient of a gradient"),
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
    document["model"]["normalisation"] = "batch"
    with pytest.raises(SpecError, match="accumulate 2 would cut the batches over which this model normalises"):
        parse_spec(document)
