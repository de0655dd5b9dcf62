"""Faults of one rank in a small world, and the resulting errors of all ranks."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from runs import CPU, Recorder, start
from torch import nn
from worlds import spec_of

from pipelines import distributed
from pipelines.data.loader import open_dataset
from pipelines.distributed import agree
from pipelines.errors import MongeError, ShardError
from pipelines.evaluation.build import Evaluator
from pipelines.evaluation.result import Evaluation
from pipelines.objectives.phase import Loss, Step
from pipelines.training import choosing
from pipelines.training.run import run_training
from pipelines.training.state import TrainState
from pipelines.transport.planner import LocalPlanner

PLACES = ("opening the data", "building the networks", "training", "evaluating", "saving a checkpoint", "registering")
DEADLINE = 8.0
"""Seconds that ranks wait for one that sleeps."""


@dataclass(frozen=True)
class Case:
    """A fault.

    Attributes:
        place: place of the fault.
        rank: rank of the fault.
        kind: kind of the job.
        fault: action of the rank.
    """

    place: str
    rank: int
    kind: str
    fault: Literal["fails", "breaks", "sleeps", "dies"]

    @property
    def name(self) -> str:
        """Name of the folder of the case."""
        return f"{self.fault}-{self.place.replace(' ', '-')}-{self.rank}-{self.kind}"

    def go_wrong(self, place: str, folder: Path) -> None:
        """Execute the fault if place and rank match."""
        if (place, distributed.rank()) != (self.place, self.rank):
            return
        match self.fault:
            case "fails":
                raise ShardError("shard-00001: damaged", hint="shard it anew")
            case "breaks":
                raise OSError("no space left on device")
            case "sleeps":
                while not (folder / f"{1 - self.rank}.error").exists():
                    time.sleep(0.05)
            case "dies":
                os._exit(1)


def run_cases(cases: Sequence[Case], data: Path, folder: Path) -> dict[Case, dict[int, str]]:
    """Run cases one after the other on two ranks; return their errors by case and rank."""
    context = mp.start_processes(_rank, (tuple(cases), data, folder), 2, join=False, start_method="spawn")
    try:
        for process in context.processes:
            process.join(270)
            assert process.exitcode is not None, "a rank waits for another that will not come"
    finally:
        for process in context.processes:
            process.kill()
    return {case: {int(path.stem): path.read_text() for path in (folder / case.name).glob("*.error")} for case in cases}


def _rank(index: int, cases: Sequence[Case], data: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    distributed.GRACE = 2.0
    for case in cases:
        own = folder / case.name
        own.mkdir(exist_ok=True)
        store = dist.FileStore(str(own / "store"), 2)
        timeout = timedelta(seconds=DEADLINE if case.fault == "sleeps" else 60)
        dist.init_process_group("gloo", store=store, rank=index, world_size=2, timeout=timeout)
        try:
            with agree("running the job"):
                _job(data, case, own)
        except Exception as error:
            kind = type(error).__name__ if isinstance(error, MongeError) else f"untyped {type(error).__name__}"
            (own / f"{index}.part").write_text(f"{kind}: {error}")
            (own / f"{index}.part").replace(own / f"{index}.error")


def _job(address: Path, case: Case, folder: Path) -> None:
    """Run the steps of :func:`services.training.worker.train_worker` without Ray and MLflow."""

    def pass_by(place: str) -> None:
        case.go_wrong(place, folder)

    with agree("opening the data"):
        data = open_dataset(address)
        pass_by("opening the data")
    with agree("building the networks"):
        pass_by("building the networks")
        spec = spec_of(case.kind)
        objective, state = start(spec, data)
    phase = objective.phases[0]
    loss = phase.loss

    def broken_loss(step: Step) -> Loss:
        if step.index >= 2:
            pass_by("training")
        return loss(step)

    object.__setattr__(phase, "loss", broken_loss)

    class Evaluating(Evaluator):
        def __call__(self, network: nn.Module) -> Evaluation:
            pass_by("evaluating")
            return super().__call__(network)

    class Listener(Recorder):
        def checkpoint(self, state: TrainState) -> None:
            with agree("saving a checkpoint"):
                pass_by("saving a checkpoint")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(choosing, "Evaluator", Evaluating)
        run_training(spec, data, objective, state, LocalPlanner(), Listener(), CPU)
    with agree("registering"):
        pass_by("registering")
