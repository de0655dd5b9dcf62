"""Checkpoints of a :class:`TrainState`: safetensors and JSON, so that loading one executes no code."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from pipelines.errors import CheckpointError
from pipelines.objectives.phase import POOL
from pipelines.spec import JobSpec
from pipelines.training.optimizer import SLOTS
from pipelines.training.state import TrainState

TENSORS = "state.safetensors"
NUMBERS = "state.json"


def save_checkpoint(state: TrainState, folder: Path) -> None:
    """Write a state. The JSON file is written last and contains the hash of the tensors: an incomplete checkpoint is
    never accepted."""
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
    numbers["numbers_sha256"] = _hash(numbers)
    temporary = folder / f"{NUMBERS}.part"
    temporary.write_text(json.dumps(numbers, indent=2) + "\n")
    temporary.replace(folder / NUMBERS)


def verify_checkpoint(folder: Path) -> None:
    """Read a checkpoint of any job and compare it with its hashes.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    _read(folder)


def load_checkpoint(state: TrainState, folder: Path) -> None:
    """Load a checkpoint into a new state, in place.

    Raises:
        CheckpointError: a file is missing or damaged, or the checkpoint is of another spec.
    """
    numbers, tensors = _read(folder)
    if numbers["fingerprint"] != state.fingerprint:
        raise CheckpointError(
            f"{folder}: of spec {numbers['fingerprint'][:12]}, while the job is of {state.fingerprint[:12]}",
            hint="resume with the spec that the run was started with, or continue it by `monge submit SPEC --from JOB`",
        )
    _put(state, folder, numbers, tensors)


def load_origin(state: TrainState, folder: Path, spec: JobSpec) -> None:
    """Load a checkpoint of another run into the new state of a run of ``spec``, in place.

    The two specs may differ in everything that keeps the shapes of the state: durations, learning rates, batch, seed,
    data, pools. If the checkpoint has no average, the average starts at its weights.

    Raises:
        CheckpointError: a file is missing or damaged; networks, shapes of tensors or kinds of optimizers differ.
        SpecError: the checkpoint has seen ``spec.train.images`` images already.
    """
    numbers, tensors = _read(folder)
    if POOL not in state.networks:
        tensors = {name: value for name, value in tensors.items() if not name.startswith(f"networks/{POOL}/")}
    elif not _under(f"networks/{POOL}", tensors):
        tensors |= {f"networks/{POOL}/{name}": value for name, value in state.networks[POOL].state_dict().items()}
    _require_fit(state, folder, numbers, tensors)
    spec.require_more(numbers["images"])
    if not _under("average", tensors):
        weights = _under(f"networks/{state.served}", tensors)
        tensors |= {f"average/{name}": value for name, value in weights.items()}
    _put(state, folder, numbers, tensors)
    # The same where the batch is the same; with another one, the place in the data is that of the images seen.
    state.step = state.images // spec.train.batch


def _require_fit(state: TrainState, folder: Path, numbers: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    hint = "continue it with the model, the objective and the kind of optimizer that it was trained with"
    saved = sorted({key.split("/")[1] for key in tensors if key.startswith("networks/")})
    if saved != sorted(state.networks):
        held, wanted = ", ".join(saved), ", ".join(sorted(state.networks))
        raise CheckpointError(f"{folder}: holds the networks {held}, while the job trains {wanted}", hint=hint)
    for network, module in state.networks.items():
        there, here = _under(f"networks/{network}", tensors), module.state_dict()
        for name in here | there:
            shapes = [f"({', '.join(map(str, t[name].shape))})" if name in t else "absent" for t in (there, here)]
            if shapes[0] != shapes[1]:
                raise CheckpointError(
                    f"{folder}: {name} of the {network} is {shapes[0]}, and {shapes[1]} in the job's spec", hint=hint
                )
    for phase, optimizer in state.optimizers.items():
        slots = {path.split("/")[1] for path in _under(f"optimizers/{phase}", tensors | numbers["scalars"])}
        if foreign := slots - SLOTS[type(optimizer)]:
            raise CheckpointError(
                f"{folder}: the optimizer of the {phase} keeps {', '.join(sorted(foreign))}, which the job's "
                f"{type(optimizer).__name__} does not know",
                hint=hint,
            )


def _put(state: TrainState, folder: Path, numbers: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    try:
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
        state.step, state.images = numbers["step"], numbers["images"]
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: not a checkpoint of this job: {error}") from error


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The numbers and the tensors of a checkpoint, after checking their hashes."""
    try:
        numbers = json.loads((folder / NUMBERS).read_text())
        blob = (folder / TENSORS).read_bytes()
        if hashlib.sha256(blob).hexdigest() != numbers["sha256"]:
            raise CheckpointError(f"{folder}: the tensors do not match their hash", hint="resume from an older one")
        # Checkpoints of older versions have no hash of their numbers.
        if (expected := numbers.pop("numbers_sha256", None)) is not None and _hash(numbers) != expected:
            raise CheckpointError(f"{folder}: the numbers do not match their hash", hint="resume from an older one")
        numbers |= {name: int(numbers[name]) for name in ("step", "images")}
        numbers |= {"fingerprint": str(numbers["fingerprint"]), "scalars": dict(numbers["scalars"])}
        return numbers, load(blob)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: damaged: {type(error).__name__}: {error}") from error


def _hash(numbers: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()


def _prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}/{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _under(prefix: str, entries: dict[str, Any]) -> dict[str, Any]:
    return {key[len(prefix) + 1 :]: value for key, value in entries.items() if key.startswith(prefix + "/")}
