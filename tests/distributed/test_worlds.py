"""A job means the same on one, two and three ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import go_on, start, stripes, tensors
from worlds import KINDS, POINTS, look, run_world, spec_of

from pipelines import distributed
from pipelines.data.loader import ShardedDataset
from pipelines.training.checkpoint import load_checkpoint
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import solve

WORLDS = (2, pytest.param(3, marks=pytest.mark.slow))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ShardedDataset:
    return stripes(tmp_path_factory.mktemp("stripes"))


@pytest.fixture(scope="module")
def alone(data: ShardedDataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return look(data, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world} ranks")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world")
    (path / "world").write_text(str(request.param))
    return path


@pytest.fixture(scope="module")
def ranks(folder: Path, data: ShardedDataset) -> list[dict[str, Any]]:
    return run_world(int((folder / "world").read_text()), Path(data.address), folder)


def test_rows_are_gathered_in_the_order_of_ranks(ranks: list[dict[str, Any]]) -> None:
    world = len(ranks)
    for found in ranks:
        assert found["gathered"].tolist() == [[float(rank)] * 2 for rank in range(world) for _ in range(rank)]
        assert found["gathered numbers"].tolist() == list(range(3 * world))
        assert found["gathered images"].dtype == torch.uint8
        assert found["gathered images"][:, 0, 1, 1].tolist() == list(range(world))
        assert not found["needs gradient"]


def test_gradients_are_summed_those_of_a_rank_without_them_too(ranks: list[dict[str, Any]]) -> None:
    world = len(ranks)
    for found in ranks:
        assert found["summed"].tolist() == [world, sum(range(world))]
        everywhere, somewhere, nowhere = found["gradients"]
        assert torch.equal(everywhere, torch.full((2, 3), float(sum(10**rank for rank in range(world)))))
        assert torch.equal(somewhere, torch.ones(2, 3))
        assert torch.equal(nowhere, torch.zeros(2, 3))
        assert found["frozen"]


def test_all_ranks_stop_after_the_step_at_which_one_is_asked_to(ranks: list[dict[str, Any]]) -> None:
    assert [found["stopped"] for found in ranks] == [(7, 8)] * len(ranks)


def test_all_ranks_train_in_the_same_precision(ranks: list[dict[str, Any]]) -> None:
    assert [found["precision"] for found in ranks] == [torch.float32] * len(ranks)


def test_alone_there_is_nobody_to_meet() -> None:
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    rows = torch.arange(4.0).requires_grad_()
    gathered = distributed.gather_rows(rows)
    assert torch.equal(gathered, rows)
    assert not gathered.requires_grad
    assert distributed.sum_over_ranks(torch.ones(2)).tolist() == [1, 1]
    moved, unmoved = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    moved.grad = torch.ones(2)
    distributed.sum_gradients([moved, unmoved])
    assert moved.grad.tolist() == [1, 1]
    assert unmoved.grad is not None
    assert unmoved.grad.tolist() == [0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_hold_the_same_state_bit_for_bit(ranks: list[dict[str, Any]], kind: str) -> None:
    first, *others = (found["runs"][kind] for found in ranks)
    for other in others:
        assert other["tensors"].keys() == first["tensors"].keys()
        assert all(torch.equal(value, first["tensors"][name]) for name, value in other["tensors"].items())
        assert other["points"] == first["points"]
        assert other["due"] == first["due"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_does_not_depend_on_the_number_of_ranks(
    ranks: list[dict[str, Any]], alone: dict[str, Any], kind: str
) -> None:
    """Weights, their average and momenta, which are sums of gradients, after five steps."""
    found, expected = ranks[0]["runs"][kind], alone["runs"][kind]
    assert found["tensors"].keys() == expected["tensors"].keys()
    assert any("momentum" in name for name in expected["tensors"])
    for name, value in expected["tensors"].items():
        # BigGAN's many normalised layers, and slopes of slopes, amplify the rounding of float32 sums over ranks.
        loose = kind in ("biggan", "conditional-transport", "conditional-wasserstein")
        rtol, atol = (1e-4, 1e-5) if loose else (1e-5, 1e-6)
        torch.testing.assert_close(found["tensors"][name], value, rtol=rtol, atol=atol)
    assert found["due"] == expected["due"] == [[16, 32, 48, 64, 80], [80], [48, 80]]
    for point, at in zip(found["points"], expected["points"], strict=True):
        assert point == pytest.approx(at, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", ["mlp", "transport"])
def test_a_run_goes_on_with_another_number_of_ranks(
    ranks: list[dict[str, Any]], alone: dict[str, Any], folder: Path, data: ShardedDataset, kind: str
) -> None:
    spec = spec_of(kind)
    objective, state = start(spec, data, seed=99)
    load_checkpoint(state, folder / kind / "48")
    go_on(spec, data, objective, state)
    for name, value in alone["runs"][kind]["tensors"].items():
        torch.testing.assert_close(tensors(state)[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cost", ["squared-euclidean", "euclidean"])
def test_ranks_hold_the_rows_of_one_plan(ranks: list[dict[str, Any]], alone: dict[str, Any], cost: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(POINTS, 3, generator=generator) for _ in range(2))
    whole = solve(TransportProblem.between(x, y, cost=cost))
    for parts in (ranks, [alone]):
        blocks = [found["plans"][cost] for found in parts]
        dense = np.zeros((POINTS, POINTS))
        for block in blocks:
            dense[block["rows"], block["columns"]] += block["mass"].numpy()
        assert np.array_equal(dense, whole.dense())
        assert {block["primal"] for block in blocks} == {whole.certificate.primal}


def test_what_fails_on_one_rank_fails_on_all(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for found in (*ranks, alone):
        assert found["errors"] == ranks[0]["errors"]
    kinds = {name: message.split(":")[0] for name, message in ranks[0]["errors"].items()}
    assert kinds == {
        "mlp": "DivergedError",
        "transport": "DivergedError",
        "one rank's loss": "DivergedError",
        "one rank's weights": "DivergedError",
        "one rank's maximum": "DivergedError",
        "one rank's share": "ProblemError",
    }


def test_evaluations_do_not_depend_on_the_number_of_ranks(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    expected = alone["evaluations"]
    for rank, found in enumerate(found["evaluations"] for found in ranks):
        assert found["accuracy"] == pytest.approx(expected["accuracy"], rel=1e-6)
        # All ranks draw, see and measure; rank 0 alone has the numbers and pictures.
        assert found["distances"] == (pytest.approx(expected["distances"], rel=1e-6) if rank == 0 else {})
        assert found["pictures"] == (["neighbours", "samples"] if rank == 0 else [])
    assert {"test_fid", "test_precision", "test_kid_real", "test_coverage_gaussian"} <= expected["distances"].keys()
