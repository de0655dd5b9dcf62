"""Loss curves of short runs, as text: a change of what training computes shows as a change of these files.

The runs are those of the real loop on the data set ``digits``, on one CPU thread. Rewrite the files after a change that
is meant to move them, and review the difference::

    .venv/bin/python tests/golden/curves.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch
from runs import go_on, job, shard, start

from pipelines.data.loader import ShardedDataset
from pipelines.spec import DataSpec

FOLDER = Path(__file__).parent
KINDS = {"perceptron": None, "mlp": None, "lenet": 12, "transport": None}
"""Networks, and the size to which their images are scaled."""

CURVES = ("loss", "train_accuracy", "transport_cost")
DIGITS = 7


def dataset(kind: str, folder: Path) -> ShardedDataset:
    """The digits in the size of a network."""
    return shard(DataSpec(source="digits", size=KINDS[kind]), folder)


def curves(kind: str, data: ShardedDataset) -> str:
    """A line for each of 12 steps, images seen and then curves by name, and one for the weights that come out."""
    spec = job(kind, source="digits", size=KINDS[kind], images=12 * 32, batch=32, log_every=32, ema_half_life=64)
    if kind == "transport":
        # Adam blows the rounding of gradients near zero up to whole steps, and kernels of other CPUs round differently.
        optimizer = spec.optimizer.model_copy(update={"kind": "sgd"})
        spec = spec.model_copy(update={"optimizer": optimizer})
    objective, state = start(spec, data)
    lines = [
        (f"{images} images", {name: point[name] for name in CURVES if name in point})
        for images, point in go_on(spec, data, objective, state).points
    ]
    networks = {"weights": state.networks[state.served], "average": state.average}
    lines.append(("norms", {name: _norm(network) for name, network in networks.items() if network is not None}))
    return "".join(
        " ".join([head, *(f"{name} {value:.{DIGITS}g}" for name, value in values.items())]) + "\n"
        for head, values in lines
    )


def _norm(network: torch.nn.Module) -> float:
    return float(torch.cat([weights.detach().flatten() for weights in network.parameters()]).norm())


def main() -> None:
    """Rewrite all files."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            (FOLDER / f"{kind}.txt").write_text(curves(kind, dataset(kind, Path(folder))))


if __name__ == "__main__":
    main()
