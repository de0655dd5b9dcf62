"""A :class:`TrainState` on disk: tensors as safetensors, numbers as JSON, nothing that executes on loading."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from pipelines.errors import CheckpointError
from pipelines.training.state import TrainState

TENSORS = "state.safetensors"
NUMBERS = "state.json"


def save_checkpoint(state: TrainState, folder: Path) -> None:
    """Write a state; the file of numbers comes last and carries the hash of the tensors, so that a write cut short
    is never taken for a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, network in state.networks.items():
        tensors |= _prefixed(f"networks/{name}", network.state_dict())
    if state.average is not None:
        tensors |= _prefixed("average", state.average.state_dict())
    scalars: dict[str, Any] = {}
    for name, optimizer in state.optimizers.items():
        for index, slots in optimizer.state_dict()["state"].items():
            for slot, value in slots.items():
                key = f"optimizers/{name}/{index}/{slot}"
                if isinstance(value, torch.Tensor):
                    tensors[key] = value.detach().cpu().contiguous()
                else:
                    scalars[key] = value
    blob = save(tensors)
    (folder / TENSORS).write_bytes(blob)
    numbers = {
        "fingerprint": state.fingerprint,
        "step": state.step,
        "images": state.images,
        "scalars": scalars,
        "sha256": hashlib.sha256(blob).hexdigest(),
    }
    temporary = folder / f"{NUMBERS}.part"
    temporary.write_text(json.dumps(numbers, indent=2) + "\n")
    temporary.replace(folder / NUMBERS)


def load_checkpoint(state: TrainState, folder: Path) -> None:
    """Put a saved state into a freshly started one, in place.

    Raises:
        CheckpointError: a file is missing or damaged, or it is a checkpoint of another spec.
    """
    try:
        numbers = json.loads((folder / NUMBERS).read_text())
        blob = (folder / TENSORS).read_bytes()
        if hashlib.sha256(blob).hexdigest() != numbers["sha256"]:
            raise CheckpointError(f"{folder}: the tensors do not match their hash", cure="resume from an older one")
        if numbers["fingerprint"] != state.fingerprint:
            raise CheckpointError(
                f"{folder}: of spec {numbers['fingerprint'][:12]}, while the job is of {state.fingerprint[:12]}",
                cure="resume with the spec that the run was started with, or submit a new job",
            )
        tensors = load(blob)
        for name, network in state.networks.items():
            network.load_state_dict(_under(f"networks/{name}", tensors))
        if state.average is not None:
            state.average.load_state_dict(_under("average", tensors))
        for name, optimizer in state.optimizers.items():
            slots: dict[int, dict[str, Any]] = {}
            for path, value in (_under(f"optimizers/{name}", tensors | numbers["scalars"])).items():
                index, slot = path.split("/")
                slots.setdefault(int(index), {})[slot] = value
            optimizer.load_state_dict(optimizer.state_dict() | {"state": slots})
        state.step, state.images = int(numbers["step"]), int(numbers["images"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: not a checkpoint of this job: {error}") from error


def _prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}/{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _under(prefix: str, entries: dict[str, Any]) -> dict[str, Any]:
    return {key[len(prefix) + 1 :]: value for key, value in entries.items() if key.startswith(prefix + "/")}
