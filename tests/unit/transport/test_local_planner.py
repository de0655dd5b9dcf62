"""Plans solved in this process; tests with several ranks are in ``tests/distributed``."""

import numpy as np
import pytest
import torch

from pipelines import distributed
from pipelines.errors import ProblemError
from pipelines.transport.planner import LocalPlanner, Share
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import solve


def test_alone_a_share_is_the_whole() -> None:
    x, y = torch.randn(9, 1, 2, 2), torch.randn(9, 1, 2, 2)
    block = LocalPlanner().plan_rows(Share("step-0", x, y, "euclidean"))
    plan = solve(TransportProblem.between(x, y, cost="euclidean"))
    assert block.rows.tolist() == list(range(9))
    assert block.columns.tolist() == plan.dense().argmax(1).tolist()
    assert block.mass.sum() == pytest.approx(1)
    assert block.certificate.primal == plan.certificate.primal


def test_targets_may_weigh() -> None:
    x, y, b = torch.randn(6, 2), torch.randn(4, 2), torch.tensor([1.0, 2.0, 0.0, 5.0])
    block = LocalPlanner().plan_rows(Share("step-0", x, y, b=b))
    arrived = np.bincount(block.columns, block.mass, minlength=4)
    np.testing.assert_allclose(arrived, b / b.sum())
    assert block.certificate.primal == solve(TransportProblem.between(x, y, b=b)).certificate.primal


def test_a_plan_is_that_of_the_solver() -> None:
    problem = TransportProblem.between(np.arange(4.0), np.arange(6.0))
    assert np.array_equal(LocalPlanner().plan(problem).dense(), solve(problem).dense())


def test_shares_that_make_no_problem_are_refused() -> None:
    with pytest.raises(ProblemError, match="x: 1 of 4 numbers are NaN"):
        LocalPlanner().plan_rows(Share("step-0", torch.tensor([[0.0, 1.0], [torch.nan, 2.0]]), torch.zeros(2, 2)))


def test_ranks_exchange_tensors_of_the_device_of_their_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Required by a process group with NCCL only."""
    devices = []

    def gather_rows(rows: torch.Tensor) -> torch.Tensor:
        devices.append(rows.device.type)
        # What a rank with as many rows would add, on the CPU, where it can be solved.
        filled = torch.full_like(rows, 3, device="cpu")
        return torch.cat([filled, filled])

    monkeypatch.setattr(distributed, "gather_rows", gather_rows)
    points = torch.empty(3, 2, device="meta")
    block = LocalPlanner().plan_rows(Share("step-0", points, points, b=torch.ones(3)))
    assert devices == ["meta"] * 4
    assert len(block.rows) == 3
