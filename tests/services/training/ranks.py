"""Two ranks that resume from checkpoints and write one, without a Ray cluster."""

from __future__ import annotations

import errno
import json
import os
import socket
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray.train
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ray.train import Checkpoint
from runs import job, start

from pipelines.data.loader import open_dataset
from pipelines.distributed import agree
from pipelines.training.state import TrainState
from services.settings import Settings
from services.training import worker
from services.training.checkpoints import resumption
from services.training.fencing import Fence


def run_ranks(data: str, latest: Path, folder: Path) -> list[dict[str, Any]]:
    """What each of two ranks takes when Ray Train hands over the latest checkpoint, and what it tells Ray Train of one
    that rank 0 cannot write."""
    context = mp.start_processes(_rank, (data, latest, folder), 2, join=False, start_method="spawn")
    try:
        for process in context.processes:
            process.join(120)
            assert process.exitcode == 0
    finally:
        for process in context.processes:
            process.kill()
    return [json.loads((folder / f"{index}.json").read_text()) for index in range(2)]


def _rank(index: int, data: str, latest: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=index, world_size=2, timeout=timedelta(seconds=60))
    told: list[tuple[int, str, bool]] = []

    def report(metrics: dict[str, Any], *, checkpoint: Any, checkpoint_dir_name: str, **_: Any) -> None:
        told.append((metrics["images"], checkpoint_dir_name, checkpoint is not None))

    def full(state: TrainState, _: Path) -> None:
        if state.images == 16:
            raise OSError(errno.ENOSPC, "no space left on device")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ray.train, "get_checkpoint", lambda: Checkpoint.from_directory(str(latest)))
        patched.setattr(ray.train, "report", report)
        patched.setattr(worker, "save_checkpoint", full)
        spec = job("mlp")
        state = start(spec, open_dataset(Path(data)))[1]
        with agree("running the job"):
            with resumption() as resumed:
                taken = resumed.folder
            run, fence = SimpleNamespace(unsent=list), Fence(str(folder), "job-1", 1, Settings())
            tracker = cast(Any, SimpleNamespace(run=run, fence=fence)) if index == 0 else None
            listener = worker._Listener(spec, tracker, folder / "staging", resumed)
            for images in (16, 32):
                state.images = images
                listener.checkpoint(state)
    (folder / f"{index}.json").write_text(json.dumps({"taken": str(taken), "told": told}))
    dist.destroy_process_group()
