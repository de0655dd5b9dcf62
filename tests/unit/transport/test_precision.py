"""Float32 products have full precision, independent of the settings of the process."""

from collections.abc import Iterator
from threading import Event, Thread

import pytest
import torch

from pipelines.transport.cost import pairwise_cost
from pipelines.transport.precision import full_products, products_are_full
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import solve


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


def settings() -> tuple[str, str]:
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


def older(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)


def newer(backend: object, precision: str) -> None:
    torch.set_float32_matmul_precision("highest")
    backend.fp32_precision = precision  # type: ignore[attr-defined]


WAYS = {
    "high": lambda: older("high"),
    "medium": lambda: older("medium"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "CUDA alone": lambda: newer(torch.backends.cuda.matmul, "tf32"),
    "oneDNN alone": lambda: newer(torch.backends.mkldnn.matmul, "bf16"),
}


@pytest.mark.parametrize("way", WAYS)
def test_products_are_full_inside_and_as_before_outside(way: str) -> None:
    WAYS[way]()
    before = settings()
    assert not products_are_full()
    with full_products():
        assert settings() == ("ieee", "ieee")
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32
        with full_products():
            pass
        assert products_are_full()
    assert settings() == before
    if way in ("high", "medium"):
        assert torch.get_float32_matmul_precision() == way


def test_an_error_brings_the_setting_back() -> None:
    older("medium")
    with pytest.raises(ValueError, match="inside"), full_products():
        raise ValueError("inside")
    assert torch.get_float32_matmul_precision() == "medium"


def test_a_thread_that_leaves_first_does_not_round_for_those_inside() -> None:
    older("medium")
    entered, leave = Event(), Event()

    def stay() -> None:
        with full_products():
            entered.set()
            leave.wait(60)

    thread = Thread(target=stay)
    with full_products():
        thread.start()
        assert entered.wait(60)
    assert products_are_full()
    leave.set()
    thread.join(60)
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize("cost", ["squared-euclidean", "cosine"])
def test_costs_do_not_follow_the_setting(cost: str) -> None:
    # Large enough that oneDNN's product would be taken, on machines that multiply in bfloat16.
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(300, 300, generator=generator) for _ in range(2))
    full = pairwise_cost(x, y, cost)
    older("medium")
    assert torch.equal(pairwise_cost(x, y, cost), full)


@pytest.mark.parametrize("epsilon", [0.0, 20.0])
def test_plans_do_not_follow_the_setting(epsilon: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(200, 100, generator=generator) for _ in range(2))
    problem = TransportProblem.between(x, y, epsilon=epsilon)
    full = solve(problem)
    older("medium")
    plan = solve(problem)
    assert (plan.certificate.primal, plan.certificate.dual) == (full.certificate.primal, full.certificate.dual)
    blocks = [each.block(0, 20).mass.tolist() for each in (plan, full)]
    assert blocks[0] == blocks[1]
