"""Small training runs, shared by several test packages."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipelines.data.loader import Loader, ShardedDataset, open_dataset
from pipelines.data.shard import chunks, write_manifest, write_shard
from pipelines.data.source import open_source
from pipelines.distributed import rank, world_size
from pipelines.evaluation.result import Evaluation
from pipelines.models.autoencoder import AutoEncoder
from pipelines.models.network import Network
from pipelines.objectives.phase import Objective
from pipelines.spec import DataSpec, JobSpec, TransportSpec, parse_spec
from pipelines.training import run
from pipelines.training.checkpoint import save_checkpoint
from pipelines.training.loop import train
from pipelines.training.state import TrainState
from pipelines.transport.planner import LocalPlanner

CPU = torch.device("cpu")

JOBS: dict[str, dict[str, Any]] = {
    "perceptron": {"model": {"kind": "perceptron"}, "objective": {"kind": "classification"}},
    "mlp": {
        "model": {"kind": "mlp", "hidden": [16]},
        "objective": {"kind": "classification", "loss": "least-squares", "flip": True},
        "optimizer": {"kind": "sgd", "learning_rate": 0.05, "weight_decay": 0.01, "schedule": "cosine"},
    },
    "mixup": {
        "model": {"kind": "mlp", "hidden": [16]},
        "objective": {"kind": "classification", "flip": True, "mixup": 0.4},
    },
    "cutmix": {
        "model": {"kind": "mlp", "hidden": [16]},
        "objective": {"kind": "classification", "shift": 1, "cutmix": 1.0},
    },
    "lenet": {
        "model": {"kind": "lenet", "dropout": 0.5},
        "objective": {"kind": "classification", "flip": True},
        "optimizer": {"learning_rate": 0.002, "schedule": "cosine"},
    },
    "regression": {
        "model": {"kind": "mlp", "hidden": [16]},
        "objective": {"kind": "regression", "target": "waves"},
        "optimizer": {"learning_rate": 0.01},
    },
    "resnet": {
        "model": {"kind": "resnet", "depth": 10, "width": 4},
        "objective": {
            "kind": "classification",
            "flip": True,
            "shift": 2,
            "cutout": 3,
            "label_smoothing": 0.1,
        },
        "optimizer": {"kind": "sgd", "learning_rate": 0.05, "nesterov": True, "schedule": "one-cycle"},
    },
    "transport": {
        "model": {"kind": "conv-generator", "latent": 8, "width": 4},
        "objective": {"kind": "transport", "plans": "local"},
        "optimizer": {"learning_rate": 0.01, "momentum": 0.5},
    },
    "weighted-transport": {
        "model": {"kind": "conv-generator", "latent": 8, "width": 4},
        "objective": {"kind": "transport", "class_weights": {"0": 3}, "plans": "local"},
        "optimizer": {"learning_rate": 0.01, "momentum": 0.5},
    },
    "sinkhorn-transport": {
        "model": {"kind": "conv-generator", "latent": 8, "width": 4},
        "objective": {
            "kind": "transport",
            "distance": {"kind": "sinkhorn-divergence", "epsilon": 10},
            "plans": "local",
        },
        "optimizer": {"learning_rate": 0.01, "momentum": 0.5},
    },
    "sliced-transport": {
        "model": {"kind": "conv-generator", "latent": 8, "width": 4},
        "objective": {"kind": "transport", "distance": {"kind": "sliced", "directions": 32}, "plans": "local"},
        "optimizer": {"learning_rate": 0.01, "momentum": 0.5},
    },
    "reconstruction": {
        "model": {"kind": "autoencoder", "width": 4, "code": 6},
        "objective": {"kind": "reconstruction", "hidden": 0.4, "patch": 5},
        "optimizer": {"learning_rate": 0.01},
    },
    "feature-transport": {
        "model": {"kind": "conv-generator", "latent": 8, "width": 4, "normalisation": "batch"},
        "objective": {
            "kind": "transport",
            "features": [{"network": "pixels", "side": 6, "weight": 0.5}, {"network": "pixels"}],
            "distance": {"kind": "sinkhorn-divergence", "epsilon": 0.05},
            "self_term": "two-batch",
            "reals": 24,
            "plans": "local",
        },
        "optimizer": {"learning_rate": 0.01, "momentum": 0.5},
    },
    "conditional-transport": {
        "model": {"kind": "biggan", "latent": 8, "width": 4},
        "objective": {
            "kind": "transport",
            "features": [{"network": "pixels", "side": 6}],
            "distance": {"kind": "sinkhorn-divergence", "epsilon": 0.05},
            "condition_weight": 2,
            "normalise": True,
            "plans": "local",
        },
        "optimizer": {"learning_rate": 0.01, "momentum": 0.5},
    },
    "pooled-transport": {
        "model": {
            "kind": "conv-generator",
            "latent": 8,
            "width": 4,
            "normalisation": "batch",
            "conditional": True,
        },
        "objective": {
            "kind": "transport",
            "features": [{"network": "pixels", "side": 6}],
            "distance": {"kind": "sinkhorn-divergence", "epsilon": 0.05},
            "self_term": "two-batch",
            "pool": 32,
            "condition_weight": 2,
            "plans": "local",
        },
        "optimizer": {"learning_rate": 0.01, "momentum": 0.5},
    },
    "gan": {
        "model": {"kind": "conv-generator", "latent": 8, "width": 4},
        "objective": {"kind": "gan", "loss": "hinge", "critic": {"width": 4, "spectral": True}},
        "optimizer": {"learning_rate": 0.002, "momentum": 0.0},
    },
    "biggan": {
        "model": {"kind": "biggan", "latent": 8, "width": 4},
        "objective": {
            "kind": "gan",
            "loss": "hinge",
            "orthogonal": 0.01,
            "critic": {"width": 4, "spectral": True, "network": "residual"},
        },
        "optimizer": {"learning_rate": 0.002, "momentum": 0.0},
    },
    "wasserstein": {
        "model": {"kind": "conv-generator", "latent": 8, "width": 4},
        "objective": {"kind": "wasserstein", "critic": {"width": 4}, "critic_steps": 2},
        "optimizer": {"learning_rate": 0.002, "momentum": 0.0},
    },
    "conditional-wasserstein": {
        "model": {"kind": "conv-generator", "latent": 8, "width": 4, "conditional": True},
        "objective": {"kind": "wasserstein", "critic": {"width": 4}},
        "optimizer": {"learning_rate": 0.002, "momentum": 0.0},
    },
    "learned-transport": {
        "model": {
            "kind": "conv-generator",
            "latent": 8,
            "width": 4,
            "upsampling": "transposed",
            "normalisation": "batch",
        },
        "objective": {"kind": "learned-transport", "critic": {"width": 4}, "features": 6, "plans": "local"},
        "optimizer": {"learning_rate": 0.002, "momentum": 0.5},
    },
    "flow": {
        "model": {"kind": "flow-unet", "width": 8, "steps": 2},
        "objective": {"kind": "flow", "coupling": {"kind": "batch"}, "plans": "local"},
        "optimizer": {"learning_rate": 0.002},
    },
    "conditional-flow": {
        "model": {"kind": "flow-unet", "width": 8, "steps": 2, "conditional": True},
        "objective": {"kind": "flow", "coupling": {"kind": "batch", "condition_weight": 40}, "plans": "local"},
        "optimizer": {"learning_rate": 0.002},
    },
    "pool-flow": {
        "model": {"kind": "flow-unet", "width": 8, "steps": 2},
        "objective": {"kind": "flow", "coupling": {"kind": "pool", "points": 48}, "plans": "local"},
        "optimizer": {"learning_rate": 0.002},
    },
}
"""Jobs for each kind of network and coupling, without the sections common to all jobs."""


def job(kind: str, source: str = "images.npz", size: int | None = None, **train_section: Any) -> JobSpec:
    """Create a spec with one worker; by default it trains on 96 images in batches of 16."""
    section = {"images": 96, "batch": 16} | train_section
    document = {"name": f"a-{kind}", "seed": 7, "data": {"source": source, "size": size}, "train": section}
    return parse_spec(document | copy.deepcopy(JOBS[kind]) | {"workers": {"count": 1}})


def shard(spec: DataSpec, folder: Path) -> ShardedDataset:
    """Shard a data set into a folder and open it."""
    source = open_source(spec, folder / "cache")
    receipts = [
        write_shard(source, folder / "shards", number, *span)
        for number, span in enumerate(chunks(len(source), source.image))
    ]
    write_manifest(source, spec, folder / "shards", receipts)
    return open_dataset(folder / "shards")


def stripes(folder: Path, count: int = 60, side: int = 12) -> ShardedDataset:
    """Create grey images of two classes, noise with a bright row or column, two thirds of them for training."""
    random = np.random.default_rng(0)
    labels = np.arange(count) % 2
    images = random.integers(0, 128, (count, side, side), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        stripe = image if label else image.T
        stripe[random.integers(0, side)] += 100
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "images.npz", images=images, labels=labels)
    return shard(DataSpec(source=str(folder / "images.npz"), test_fraction=1 / 3), folder)


@dataclass
class Recorder:
    """Records the events of a run; writes each checkpoint into a separate folder if ``folder`` is given."""

    folder: Path | None = None
    points: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)

    def metrics(self, values: dict[str, float], images: int) -> None:
        self.points.append((images, values))

    def evaluation(self, evaluation: Evaluation, images: int) -> None:
        self.evaluations.append(images)

    def checkpoint(self, state: TrainState) -> None:
        self.checkpoints.append(state.images)
        if self.folder is not None:
            save_checkpoint(state, self.folder / str(state.images))


def start(spec: JobSpec, data: ShardedDataset, seed: int | None = None) -> tuple[Objective, TrainState]:
    """Create objective and state before the first step; ``seed`` replaces the job's seed for the weights."""
    objective, state = run.start_run(spec, data, LocalPlanner(), CPU, networks=encoders(spec, data))
    if seed is not None:
        torch.manual_seed(seed)
        for network in state.networks.values():
            for value in network.parameters():
                torch.nn.init.normal_(value.data, std=0.1)
    return objective, state


def encoders(spec: JobSpec, data: ShardedDataset) -> dict[str, Network]:
    """Create small auto-encoders in place of the registered feature networks of a spec."""
    names = spec.objective.registered if isinstance(spec.objective, TransportSpec) else ()
    torch.manual_seed(1)
    return {name: AutoEncoder(data.image, 4, 6) for name in names}


def no_evaluation(network: nn.Module) -> Evaluation:
    """Return an empty evaluation."""
    return Evaluation({}, {})


def go_on(
    spec: JobSpec, data: ShardedDataset, objective: Objective, state: TrainState, recorder: Recorder | None = None
) -> Recorder:
    """Train from the given state to the end."""
    recorder = recorder or Recorder()
    with Loader(data.train, spec.train.batch, spec.seed, rank(), world_size(), start_step=state.step) as batches:
        train(spec, objective, state, batches, no_evaluation, recorder, CPU)
    return recorder


def tensors(state: TrainState) -> dict[str, torch.Tensor]:
    """Return all tensors of a state by name."""
    held = {f"{name}/{key}": value for name, net in state.networks.items() for key, value in net.state_dict().items()}
    if state.average is not None:
        held |= {f"average/{key}": value for key, value in state.average.state_dict().items()}
    for name, optimizer in state.optimizers.items():
        for index, slots in optimizer.state_dict()["state"].items():
            held |= {f"{name} {index}/{slot}": torch.as_tensor(value) for slot, value in slots.items()}
    return held
