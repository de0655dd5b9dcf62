"""Loss curves of short runs, as text: a change of the training computations changes these files.

The runs are those of the real loop on the data set ``digits``, on one CPU thread. Kernels for AVX2 and AVX-512 round
differently, so networks compute in float64 and six digits are written: the text is the same with either. Rewrite the
files after a change that is meant to move them, and review the difference::

    .venv/bin/python tests/golden/curves.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch
from runs import go_on, job, shard, start
from torch import nn

from pipelines.data.loader import ShardedDataset
from pipelines.models.flow import FlowUNet
from pipelines.spec import DataSpec, JobSpec, parse_spec

FOLDER = Path(__file__).parent
KINDS = (
    *(
        "perceptron",
        "mlp",
        "regression",
        "lenet",
        "resnet",
        "transport",
        "sinkhorn-transport",
        "sliced-transport",
        "reconstruction",
        "feature-transport",
        "conditional-transport",
        "pooled-transport",
        "gan",
        "biggan",
        "wasserstein",
        "learned-transport",
    ),
    *("flow", "pool-flow", "conditional-flow"),
)
STEPS, BATCH = 20, 16

RATES = {
    "perceptron": 0.003,
    "mlp": 0.5,
    "regression": 0.01,
    "lenet": 0.003,
    "resnet": 0.05,
    "transport": 0.01,
    "sinkhorn-transport": 0.01,
    "sliced-transport": 0.01,
    "reconstruction": 0.01,
    "feature-transport": 0.01,
    "conditional-transport": 0.01,
    "pooled-transport": 0.01,
    "gan": 0.003,
    "biggan": 0.003,
    "wasserstein": 0.003,
    "learned-transport": 0.003,
    "flow": 0.004,
    "pool-flow": 0.004,
    "conditional-flow": 0.004,
}
"""Learning rates with visible progress of each network in few steps."""

CURVES = (
    *("loss", "train_accuracy", "transport_cost", "drift", "pair_cost"),
    *(
        "critic_loss",
        "generator_loss",
        "overlap",
        "critic_estimate",
        "critic_slope",
        "energy_distance",
        "within_generated",
    ),
)
DIGITS = 6


def dataset(folder: Path) -> ShardedDataset:
    """Return the digits, large enough for the two pooling layers of LeNet."""
    return shard(DataSpec(source="digits", size=12), folder)


def curves(kind: str, data: ShardedDataset) -> str:
    """Format a line for each step, with images seen and curves by name, and a line for the final weights."""
    spec = _spec(kind)
    objective, state = start(spec, data)
    for network in [*state.networks.values(), state.average]:
        assert network is not None
        _compute_in_float64(network)
    lines = [
        (f"{images} images", {name: point[name] for name in CURVES if name in point})
        for images, point in go_on(spec, data, objective, state).points
    ]
    networks = {"weights": state.networks[state.served], "average": state.judged}
    lines.append(("norms", {name: _norm(network) for name, network in networks.items()}))
    return "".join(
        " ".join([head, *(f"{name} {value:.{DIGITS}g}" for name, value in values.items())]) + "\n"
        for head, values in lines
    )


def _spec(kind: str) -> JobSpec:
    spec = job(kind, source="digits", size=12, images=STEPS * BATCH, batch=BATCH, log_every=BATCH, ema_half_life=64)
    document: dict[str, Any] = spec.model_dump()
    document["optimizer"]["learning_rate"] = RATES[kind]
    return parse_spec(document)


def _compute_in_float64(network: nn.Module) -> None:
    """Convert weights and inputs of the network to float64; batches and random draws are exact in float32."""
    network.double()
    if isinstance(network, FlowUNet):
        velocity = network.velocity
        network.velocity = lambda points, times, asked: velocity(points.double(), times.double(), asked)  # type: ignore[method-assign]
    else:
        network.register_forward_pre_hook(lambda _, inputs: tuple(_wide(given) for given in inputs))


def _wide(given: torch.Tensor | None) -> torch.Tensor | None:
    return None if given is None else given.double()


def _norm(network: nn.Module) -> float:
    return float(torch.cat([weights.detach().flatten() for weights in network.parameters()]).norm())


def main() -> None:
    """Update all files."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    with tempfile.TemporaryDirectory() as folder:
        data = dataset(Path(folder))
        for kind in KINDS:
            (FOLDER / f"{kind}.txt").write_text(curves(kind, data), encoding="utf-8")


if __name__ == "__main__":
    main()
