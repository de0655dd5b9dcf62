"""One step of every config with all tensors on PyTorch's ``meta`` device, which needs no hardware.

A tensor on the CPU raises an error, and each synchronisation of the host with the device is counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import JOBS, Recorder, encoders, job, no_evaluation, stripes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipelines.data.loader import Batch, Loader, ShardedDataset
from pipelines.spec import JobSpec, load_spec
from pipelines.training.loop import train
from pipelines.training.run import start_run
from pipelines.transport.plan import Certificate, RowBlock, TransportPlan
from pipelines.transport.planner import Share
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solvers import sinkhorn

META = torch.device("meta")
CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
CLASSES = ("cat", "dog")
CERTIFICATE = Certificate(1.0, 1.0, 0.0, 1, True, "fixed", 0.0)

READS = {
    "sliced-generator": 1,  # whether the samples are finite
    "characters": 1,  # once a pool, whether the copy of the generator is of this one
    "sinkhorn-generator": 7,  # the same, and whether both sides of its three problems are
}
"""Number of synchronisations per step of a config, without those for plans; 0 by default."""


class HostReads(TorchDispatchMode):
    """Counts reads of device memory by the host, and raises for operations between two devices."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_device = [tensor for tensor in tensors if tensor.device == META]
        if not on_device:
            return function(*args, **kwargs)
        if name == "_local_scalar_dense":
            self.count += 1
            return on_device[0].dtype == torch.bool or 1
        if name in ("_to_copy", "copy_") and (kwargs.get("device") or args[0].device).type == "cpu":
            self.count += 1
            return torch.ones(on_device[0].shape, dtype=kwargs.get("dtype") or on_device[0].dtype)
        if name in ("nonzero", "masked_select") or (name == "index" and any(i.dtype == torch.bool for i in tensors)):
            raise AssertionError(f"{name}: a shape that depends on values")
        if name not in ("_to_copy", "copy_"):
            left = [tuple(t.shape) for t in tensors if t.device != META and t.ndim]
            assert not left, f"{name}: a tensor of shape {left[0]} was left on the CPU"
        return function(*args, **kwargs)


class FixedPlanner:
    """Pairs each point with the point at the same index."""

    def plan(self, problem: TransportProblem) -> TransportPlan:
        return TransportPlan(problem.shape, CERTIFICATE, assignment=np.arange(problem.shape[0]))

    def plan_rows(self, share: Share) -> RowBlock:
        assert share.x.device == share.y.device == META
        places = np.arange(len(share.x))
        return RowBlock(places, places, np.full(len(places), 1 / len(places)), CERTIFICATE)

    def plan_rows_each(self, shares: Sequence[Share]) -> list[RowBlock]:
        return [self.plan_rows(share) for share in shares]


@pytest.fixture(scope="module")
def cats_and_dogs(tmp_path_factory: pytest.TempPathFactory) -> ShardedDataset:
    data = stripes(tmp_path_factory.mktemp("meta"), count=300, side=28)
    return replace(data, manifest=data.manifest.model_copy(update={"classes": CLASSES}))


@pytest.fixture
def fixed_sinkhorn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fix the plans of Sinkhorn's algorithm, whose number of device reads depends on its convergence."""

    def solve(problem: TransportProblem, tolerance: float) -> TransportPlan:
        n, m = problem.shape
        return TransportPlan(problem.shape, CERTIFICATE, f=np.zeros(n), g=np.zeros(m), problem=problem)

    monkeypatch.setattr(sinkhorn, "solve", solve)


def reads_of_a_step(spec: JobSpec, data: ShardedDataset) -> int:
    """Count the host reads of the first step, in which every phase is updated."""
    reads = HostReads()
    planner = FixedPlanner()
    counts = []

    def counted(batches: Loader) -> Iterator[Batch]:
        for batch in batches:
            counts.append(reads.count)
            yield batch

    spec = spec.model_copy(
        update={
            "train": spec.train.model_copy(
                update={
                    "images": 2 * spec.train.batch,
                    "log_every": 10**9,
                    "checkpoint_every": 10**9,
                    "compile": False,
                    "precision": "float32",  # there is no autocast for this device
                }
            )
        }
    )
    objective, state = start_run(spec, data, planner, META, networks=encoders(spec, data))
    with Loader(data.train, spec.train.batch, spec.seed) as batches, reads:
        train(spec, objective, state, counted(batches), no_evaluation, Recorder(), META)
    return counts[1] - counts[0]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_step_of_a_config_stays_on_the_device(
    config: Path, cats_and_dogs: ShardedDataset, fixed_sinkhorn: None
) -> None:
    assert reads_of_a_step(load_spec(config), cats_and_dogs) == READS.get(config.stem, 0)


@pytest.mark.parametrize("kind", JOBS)
def test_a_step_of_a_kind_stays_on_the_device(kind: str, data: ShardedDataset, fixed_sinkhorn: None) -> None:
    reads_of_a_step(job(kind), data)


def test_what_was_left_on_the_cpu_is_found() -> None:
    with HostReads() as reads, pytest.raises(AssertionError, match=r"add: a tensor of shape \(3,\) was left"):
        torch.ones(3, device=META) + torch.ones(3)
    with reads:
        float(torch.ones((), device=META))
        torch.ones(3, device=META).cpu().numpy()
    assert reads.count == 2
