"""Two ranks compute the same plan as one process."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipelines.transport.problem import TransportProblem
from pipelines.transport.solvers import sharded, sinkhorn


def points() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(50, 3, generator=generator), torch.randn(40, 3, generator=generator) + 1


def rank_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        x, y = points()
        # Uneven parts of both sides.
        own_x, own_y = (x[:35], y[:10]) if rank == 0 else (x[35:], y[10:])
        plan = sharded.solve(own_x, own_y, epsilon=0.2, tolerance=1e-5)
        certificate = plan.certificate
        np.savez(
            Path(folder) / f"{rank}.npz",
            dense=plan.dense(),
            bounds=[certificate.primal, certificate.dual, certificate.marginal_error],
        )
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_find_the_plan_of_one_process(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(rank_of_two, (str(tmp_path),), nprocs=2)
    x, y = points()
    alone = sinkhorn.solve(TransportProblem.between(x, y, epsilon=0.2), tolerance=1e-5)
    parts = [np.load(tmp_path / f"{rank}.npz") for rank in (0, 1)]
    assert np.abs(np.concatenate([part["dense"] for part in parts]) - alone.dense()).sum() < 1e-4
    assert np.array_equal(parts[0]["bounds"], parts[1]["bounds"])
    assert parts[0]["bounds"][:2] == pytest.approx([alone.certificate.primal, alone.certificate.dual], rel=1e-5)


def test_one_rank_alone_is_the_whole():
    x, y = points()
    plan = sharded.solve(x, y, epsilon=0.2, tolerance=1e-5)
    alone = sinkhorn.solve(TransportProblem.between(x, y, epsilon=0.2), tolerance=1e-5)
    assert plan.certificate.solver == "sinkhorn-sharded"
    assert np.abs(plan.dense() - alone.dense()).sum() < 1e-5


@pytest.mark.slow
def test_blurred_twins_are_recognised():
    """Between smooth random images and blurred copies, one coordinate per pixel, the plan is the identity."""
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.avg_pool2d(torch.randn(3000, 1, 16, 16, generator=generator), 3, 1, 1)
    twins = torch.nn.functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    mean = float((images - twins.roll(1, 0)).square().flatten(1).sum(1).mean())
    plan = sharded.solve(images, twins, epsilon=0.01 * mean)
    found = torch.cat([block.argmax(1) for _, block in plan.gibbs().blocks()])
    assert float((found == torch.arange(3000)).double().mean()) >= 0.999
