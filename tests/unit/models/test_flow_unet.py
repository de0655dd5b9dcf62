"""The velocity network and its flow."""

import math

import numpy as np
import pytest
import torch

from pipelines.models.flow import TIME_FEATURES, FlowUNet
from pipelines.shape import ImageShape

SMALL = ImageShape(1, 8, 8)


def flow(image: ImageShape = SMALL, steps: int = 4) -> FlowUNet:
    torch.manual_seed(0)
    return FlowUNet(image, width=8, steps=steps)


@pytest.mark.parametrize("dims", [(1, 28, 28), (3, 32, 32), (1, 9, 14), (3, 5, 4)])
def test_images_of_any_size_keep_their_shape(dims: tuple[int, int, int]) -> None:
    network = flow(ImageShape(*dims))
    assert network.latent == math.prod(dims)
    assert network(torch.randn(3, network.latent)).shape == (3, *dims)


def test_an_untrained_flow_stands_still() -> None:
    latents = torch.randn(5, 64)
    torch.testing.assert_close(flow()(latents), latents.view(5, 1, 8, 8).clamp(-1, 1), rtol=0, atol=0)


def test_a_class_moves_the_velocity_and_a_mixture_lies_between() -> None:
    torch.manual_seed(0)
    network = FlowUNet(SMALL, width=8, steps=2, conditions=3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    points, times = torch.randn(3, 1, 8, 8), torch.full((3,), 0.5)
    asked = network.asked(torch.tensor([0, 1, 2]))
    assert torch.equal(asked, torch.eye(3))
    assert torch.equal(network.in_turn(4, torch.device("cpu")), torch.eye(3)[[0, 1, 2, 0]])
    same = points[:1].expand(3, -1, -1, -1)
    velocities = network.velocity(same, times, asked)
    assert len({velocity.sum().item() for velocity in velocities}) == 3
    assert flow().asked(torch.tensor([0])) is None
    assert flow().in_turn(2, torch.device("cpu")) is None


class Exponential(FlowUNet):
    """A field with a known flow, x' = x/2 − t."""

    def velocity(
        self, points: torch.Tensor, times: torch.Tensor, conditions: torch.Tensor | None = None
    ) -> torch.Tensor:
        return points / 2 - times[:, None, None, None]


def test_euler_steps_converge_to_the_flow_at_first_order() -> None:
    network = Exponential(ImageShape(1, 4, 4), width=8, steps=1)
    start = torch.full((1, 16), 0.3)
    assert float(network.integrate(start, 1)[0, 0, 0, 0]) == pytest.approx(0.45)
    # x(t) = (x₀ − 4) e^{t/2} + 2t + 4
    exact = (0.3 - 4) * math.exp(0.5) + 6
    errors = [abs(float(network.integrate(start, steps)[0, 0, 0, 0]) - exact) for steps in (8, 16, 32)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.15)


def test_velocity_depends_on_place_and_time() -> None:
    network = flow()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    points, times = torch.randn(2, 1, 8, 8), torch.tensor([0.25, 0.75])
    velocity = network.velocity(points, times)
    assert not torch.allclose(velocity, network.velocity(points, times + 0.1))
    assert not torch.allclose(velocity, network.velocity(points + 0.1, times))
    # A sample does not depend on other samples of the batch.
    torch.testing.assert_close(velocity[:1], network.velocity(points[:1], times[:1]))


def test_time_features_have_the_digits_of_the_times() -> None:
    network = flow().double()
    given: list[torch.Tensor] = []
    network.time.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    times = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    network.velocity(torch.zeros(3, 1, 8, 8, dtype=torch.float64), times)
    angles = np.outer(times, np.exp(np.linspace(0, math.log(1000), TIME_FEATURES // 2)))
    np.testing.assert_allclose(given[0], np.concatenate([np.sin(angles), np.cos(angles)], 1), atol=1e-12)
