"""Work of each rank in a small world; the results are saved for the tests.

Starting a process takes longer than its work, so all checks of a world run in one start.
"""

from __future__ import annotations

import os
import socket
import time
import unittest.mock
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from runs import CPU, Recorder, go_on, job, start, tensors
from torch import nn

from pipelines import distributed
from pipelines.data.loader import ShardedDataset, open_dataset
from pipelines.data.partition import rank_slice
from pipelines.errors import MongeError
from pipelines.evaluation.build import Evaluator
from pipelines.evaluation.classification import accuracy
from pipelines.evaluation.features import ClassifierFeatures
from pipelines.models.bundle import Bundle
from pipelines.models.network import Classifier
from pipelines.objectives.phase import Loss, Phase, Step
from pipelines.spec import JobSpec, TrainSpec
from pipelines.training import precision
from pipelines.training.meters import Meters
from pipelines.training.state import TrainState
from pipelines.training.stopping import Stopping
from pipelines.transport.planner import LocalPlanner, Share

SECONDS = 240
POINTS = 13
KINDS = (
    "mlp",
    "regression",
    "mixup",
    "cutmix",
    "resnet",
    "transport",
    "weighted-transport",
    "sinkhorn-transport",
    "sliced-transport",
    "reconstruction",
    "feature-transport",
    "conditional-transport",
    "pooled-transport",
    "gan",
    "biggan",
    "wasserstein",
    "conditional-wasserstein",
    "learned-transport",
    "flow",
    "pool-flow",
    "conditional-flow",
)


def run_world(world: int, data: Path, folder: Path) -> list[dict[str, Any]]:
    """Run a world and return the results of each rank; fail if a rank fails, or after a timeout."""
    context = mp.start_processes(_rank, (world, data, folder), world, join=False, start_method="spawn")
    try:
        deadline = time.monotonic() + SECONDS
        # It returns when one rank has ended, whatever the others do.
        while not context.join(timeout=deadline - time.monotonic()):
            assert time.monotonic() < deadline, f"{world} ranks were not done after {SECONDS} s"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def _rank(rank: int, world: int, data: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    os.environ["GLOO_SOCKET_IFNAME"] = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        torch.save(look(open_dataset(data), folder) | collectives(), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def look(data: ShardedDataset, folder: Path) -> dict[str, Any]:
    """Compute results that must be equal in all worlds, including a single process."""
    return {
        "runs": {kind: _run(data, kind, folder) for kind in KINDS},
        "plans": {cost: _plan(cost) for cost in ("squared-euclidean", "euclidean")},
        "errors": _errors(data),
        "evaluations": _evaluations(data),
    }


def spec_of(kind: str) -> JobSpec:
    """Create a job with plain SGD: Adam would amplify rounding errors of gradients near zero to full steps."""
    spec = job(kind.removeprefix("pool-"), images=80, ema_half_life=40, log_every=16, checkpoint_every=48)
    # The gradient of a gradient blows rounding up too, more slowly.
    rate = 0.01 if kind == "wasserstein" else 0.05
    optimizer = spec.optimizer.model_copy(update={"kind": "sgd", "learning_rate": rate, "momentum": 0.9})
    document = spec.model_copy(update={"optimizer": optimizer}).model_dump()
    if kind == "pool-flow":
        document["objective"]["coupling"] = {"kind": "pool", "points": 32}
    return JobSpec.model_validate(document)


def _run(data: ShardedDataset, kind: str, folder: Path) -> dict[str, Any]:
    spec = spec_of(kind)
    recorder = Recorder(folder / kind if distributed.rank() == 0 else None)
    objective, state = start(spec, data)
    go_on(spec, data, objective, state, recorder)
    untold = {"images_per_second", "plan_wait_ms", "plan_solve_ms"}
    if kind == "learned-transport":
        # Of entropic plans the gap is the difference of two numbers that are nearly equal: mostly rounding.
        untold.add("plan_relative_gap")
    return {
        "tensors": tensors(state),
        "points": [
            {name: value for name, value in point.items() if name not in untold} for _, point in recorder.points
        ],
        "due": [[images for images, _ in recorder.points], recorder.evaluations, recorder.checkpoints],
    }


def _plan(cost: Any) -> dict[str, Any]:
    """Solve a plan between points that are unevenly distributed over ranks, differently on both sides."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(POINTS, 3, generator=generator) for _ in range(2))
    rank, world = distributed.rank(), distributed.world_size()
    mine = rank_slice(POINTS, rank, world)
    theirs = slice(0 if rank == 0 else rank + 1, POINTS if rank == world - 1 else rank + 2)
    block = LocalPlanner().plan_rows(Share("step-0", x[mine], y[theirs], cost))
    return {
        "rows": torch.as_tensor(block.rows) + mine.start,
        "columns": torch.as_tensor(block.columns),
        "mass": torch.as_tensor(block.mass),
        "primal": block.certificate.primal,
    }


class LastRankDiverges:
    """An objective whose loss is NaN on one rank at the third step."""

    served = "net"

    def __init__(self) -> None:
        self.networks = {"net": nn.Linear(2, 2)}
        self.phases = [Phase("net", self.networks["net"], self._loss)]

    def _loss(self, step: Step) -> Loss:
        last = distributed.rank() == distributed.world_size() - 1
        loss = self.networks["net"].weight.sum() * (torch.nan if last and step.index == 2 else 1.0)
        return Loss(loss, sums={"loss": loss.detach()})


def _errors(data: ShardedDataset) -> dict[str, str]:
    def diverging(kind: str) -> None:
        spec = spec_of(kind)
        spec = spec.model_copy(update={"optimizer": spec.optimizer.model_copy(update={"learning_rate": 1e30})})
        go_on(spec, data, *start(spec, data))

    def one_rank(log_every: int) -> None:
        spec = job("perceptron", images=96, log_every=log_every, evaluate_every=log_every)
        objective = LastRankDiverges()
        go_on(spec, data, objective, TrainState.start(spec, objective))

    def one_maximum() -> None:
        meters = Meters(CPU)
        last = distributed.rank() == distributed.world_size() - 1
        meters.add(Loss(torch.zeros(()), maxima={"gap": torch.nan if last else 1.0}))
        meters.point()

    def one_share() -> None:
        x = torch.zeros(12 // distributed.world_size(), 2)
        if distributed.rank() == distributed.world_size() - 1:
            x[0, 0] = torch.nan
        LocalPlanner().plan_rows(Share("step-0", x, torch.zeros_like(x)))

    tries: dict[str, Callable[[], None]] = {
        "mlp": lambda: diverging("mlp"),
        "transport": lambda: diverging("transport"),
        "one rank's loss": lambda: one_rank(16),
        "one rank's weights": lambda: one_rank(96),
        "one rank's maximum": one_maximum,
        "one rank's share": one_share,
    }
    found = {}
    for name, attempt in tries.items():
        try:
            attempt()
        except MongeError as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def _evaluations(data: ShardedDataset) -> dict[str, Any]:
    classifier = start(spec_of("mlp"), data)[1].judged
    assert isinstance(classifier, Classifier)
    spec = spec_of("transport")
    # Of stripes there are fewer than a block.
    reference = ClassifierFeatures("mlp", Bundle(classifier, spec_of("mlp").model, data.image, data.classes))
    evaluation = Evaluator(spec, data, LocalPlanner(), CPU, reference)(start(spec, data)[1].judged)
    return {
        "accuracy": accuracy(classifier, data.test, CPU, batch=4),
        "distances": evaluation.metrics,
        "pictures": sorted(evaluation.pictures),
    }


def collectives() -> dict[str, Any]:
    """Run the collective operations of a world with several ranks."""
    rank = distributed.rank()
    rows = torch.full((rank, 2), float(rank), requires_grad=True)
    numbers = torch.arange(3 * rank, 3 * rank + 3)
    everywhere, somewhere, nowhere = (nn.Parameter(torch.zeros(2, 3)) for _ in range(3))
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    everywhere.grad = torch.full((2, 3), 10.0**rank)
    if rank == 1:
        somewhere.grad = torch.ones(2, 3)
    distributed.sum_gradients([everywhere, frozen, somewhere, nowhere])
    # The device of rank 1 does not support bfloat16.
    with unittest.mock.patch.object(precision, "supports_bfloat16", return_value=rank != 1):
        agreed = precision.training_precision(TrainSpec(images=1, precision="bfloat16"), CPU)
    # Rank 1 is asked to stop at step 7, the others never.
    now, asked = 0.0, []
    stopping = Stopping(lambda: bool(asked.append(now)) or (rank == 1 and now >= 7), clock=lambda: now)
    while not stopping.after(int(now)):
        now += 1
    return {
        "stopped": (now, len(asked)),
        "precision": agreed,
        "gathered": distributed.gather_rows(rows).clone(),
        "gathered numbers": distributed.gather_rows(numbers),
        "gathered images": distributed.gather_rows(torch.full((1, 1, 2, 2), rank, dtype=torch.uint8)),
        "needs gradient": distributed.gather_rows(rows).requires_grad,
        "summed": distributed.sum_over_ranks(torch.tensor([1.0, rank])),
        "gradients": [parameter.grad for parameter in (everywhere, somewhere, nowhere)],
        "frozen": frozen.grad is None,
    }
