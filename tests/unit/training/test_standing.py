"""Batch normalisation statistics of averaged weights."""

import copy

import pytest
import torch
from runs import CPU, go_on, job, start, tensors

from pipelines.data.loader import ShardedDataset
from pipelines.models.biggan import BigGan
from pipelines.models.generators import ConvGenerator
from pipelines.models.network import Generator
from pipelines.models.normalisation import GlobalBatchNorm
from pipelines.shape import ImageShape
from pipelines.training.standing import PASSES, renew_statistics

IMAGE = ImageShape(1, 12, 12)


def generator(kind: str) -> Generator:
    torch.manual_seed(0)
    if kind == "biggan":
        return BigGan(IMAGE, 8, 4, 2)
    return ConvGenerator(IMAGE, 8, 4, batch_norm=kind == "batch")


def normalised(network: Generator, norm: GlobalBatchNorm) -> torch.Tensor:
    """Return the output of a layer for new samples, in evaluation mode and before scale and shift."""
    seen: list[torch.Tensor] = []
    hook = norm.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.no_grad():
        network.eval()(torch.randn(2048, 8, generator=torch.Generator().manual_seed(9)), network.in_turn(2048, CPU))
    hook.remove()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return (seen[0] - norm.running_mean[:, None, None]) / norm.running_var.sqrt()[:, None, None]


@pytest.mark.parametrize("kind", ["batch", "biggan"])
def test_samples_are_normal_under_statistics_of_their_own_weights(kind: str) -> None:
    network = generator(kind)
    norms = [module for module in network.modules() if isinstance(module, GlobalBatchNorm)]
    for norm in norms:  # of other weights
        norm.running_mean.fill_(3.0)  # type: ignore[union-attr]
        norm.running_var.fill_(25.0)  # type: ignore[union-attr]
    assert float(normalised(network, norms[0]).mean().abs()) > 0.3
    renew_statistics(network, 128, 0, CPU)
    assert not network.training
    assert all(norm.momentum == 0.1 for norm in norms)
    for norm in norms:
        maps = normalised(network, norm)
        assert float(maps.mean((0, 2, 3)).abs().max()) < 0.1
        assert float((maps.var((0, 2, 3)) - 1).abs().max()) < 0.2


def test_the_same_weights_have_the_same_statistics_whatever_was_there() -> None:
    network = generator("biggan")
    other = copy.deepcopy(network)
    renew_statistics(other, 32, 1, CPU)
    renew_statistics(network, 32, 0, CPU)
    renew_statistics(other, 32, 0, CPU)
    state = other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items() if "tracked" not in name)
    assert PASSES > 1


def test_networks_without_batch_normalisation_stay_as_they_are() -> None:
    network = generator("group").train()
    renew_statistics(network, 32, 0, CPU)
    assert network.training


def test_a_run_judges_its_average_by_statistics_of_the_average(data: ShardedDataset) -> None:
    spec = job("biggan", ema_half_life=64)
    objective, state = start(spec, data)
    go_on(spec, data, objective, state)
    average = state.average
    assert isinstance(average, Generator)
    left = {name: value.clone() for name, value in average.state_dict().items() if "running" in name}
    renew_statistics(average, spec.train.batch, spec.seed, CPU)
    assert all(torch.equal(value, average.state_dict()[name]) for name, value in left.items())
    assert any(not torch.equal(value, tensors(state)[f"generator/{name}"]) for name, value in left.items())
