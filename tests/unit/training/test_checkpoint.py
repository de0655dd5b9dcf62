"""A killed and resumed run equals an uninterrupted run."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import JOBS, Recorder, go_on, job, start, tensors
from safetensors.torch import save

from pipelines.data.loader import ShardedDataset
from pipelines.errors import CheckpointError
from pipelines.spec import JobSpec
from pipelines.training import checkpoint
from pipelines.training.checkpoint import NUMBERS, TENSORS, load_checkpoint, save_checkpoint, verify_checkpoint
from pipelines.training.state import TrainState

SLOTS = {"adam": {"step", "exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}}


def spec_of(kind: str, **train: Any) -> JobSpec:
    return job(kind, **{"ema_half_life": 40, "checkpoint_every": 16} | train)


@pytest.mark.parametrize("kind", JOBS)
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path: Path, data: ShardedDataset, kind: str) -> None:
    spec = spec_of(kind)
    objective, whole = start(spec, data)
    recorder = go_on(spec, data, objective, whole, Recorder(tmp_path))
    assert recorder.checkpoints == [16, 32, 48, 64, 80, 96]
    expected = tensors(whole)
    slots = {name.split("/")[-1] for name in expected if name.startswith(objective.phases[0].name + " ")}
    assert slots == SLOTS[spec.optimizer.kind]
    assert any(name.startswith("average/") for name in expected)
    for images in (16, 64, 96):
        # Other weights, and a generator of numbers that stands elsewhere: all that counts is in the file.
        objective, resumed = start(spec, data, seed=99)
        load_checkpoint(resumed, tmp_path / str(images))
        assert (resumed.step, resumed.images) == (images // 16, images)
        go_on(spec, data, objective, resumed)
        found = tensors(resumed)
        assert found.keys() == expected.keys()
        assert [name for name in found if not torch.equal(found[name], expected[name])] == [], images
        assert (resumed.step, resumed.images) == (whole.step, whole.images)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(data: ShardedDataset) -> None:
    runs = []
    for seed in (7, 7, 8):
        spec = spec_of("lenet").model_copy(update={"seed": seed})
        objective, state = start(spec, data, seed=7)
        go_on(spec, data, objective, state)
        runs.append(tensors(state))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not any(torch.equal(runs[0][name], runs[2][name]) for name in runs[0] if name.endswith("weight"))


@pytest.fixture
def saved(tmp_path: Path, data: ShardedDataset) -> Path:
    spec = spec_of("mlp", images=32)
    go_on(spec, data, *start(spec, data), Recorder(tmp_path))
    return tmp_path / "32"


@pytest.fixture
def fresh(data: ShardedDataset) -> TrainState:
    return start(spec_of("mlp", images=32), data)[1]


def rewrite(folder: Path, **changes: Any) -> None:
    """Write other numbers without their hash, as in checkpoints of older versions."""
    numbers = json.loads((folder / NUMBERS).read_text())
    del numbers["numbers_sha256"]
    (folder / NUMBERS).write_text(json.dumps(numbers | changes))


def put_tensors(folder: Path, blob: bytes) -> None:
    """Write other tensors with a matching hash."""
    (folder / TENSORS).write_bytes(blob)
    rewrite(folder, sha256=hashlib.sha256(blob).hexdigest())


def change_a_digit(folder: Path) -> None:
    text = (folder / NUMBERS).read_text()
    assert '"images": 32' in text
    (folder / NUMBERS).write_text(text.replace('"images": 32', '"images": 33'))


def flip_a_bit(folder: Path) -> None:
    blob = bytearray((folder / TENSORS).read_bytes())
    blob[len(blob) // 2] ^= 1
    (folder / TENSORS).write_bytes(blob)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "nothing there": lambda folder: [file.unlink() for file in folder.iterdir()],
    "no numbers": lambda folder: (folder / NUMBERS).unlink(),
    "no tensors": lambda folder: (folder / TENSORS).unlink(),
    "numbers cut short": lambda folder: os.truncate(folder / NUMBERS, 40),
    "numbers that are no text": lambda folder: (folder / NUMBERS).write_bytes(b"\xff\xfe"),
    "numbers that are a list": lambda folder: (folder / NUMBERS).write_text("[]"),
    "numbers without a step": lambda folder: rewrite(folder, step=None),
    "numbers with a slot of no optimizer": lambda folder: rewrite(folder, scalars={"optimizers/classifier/x": 1}),
    "one digit of the numbers": change_a_digit,
    "tensors cut short": lambda folder: os.truncate(folder / TENSORS, 200),
    "one bit of the tensors": flip_a_bit,
    "no tensors with their hash": lambda folder: put_tensors(folder, b""),
    "other tensors with their hash": lambda folder: put_tensors(folder, save({"networks/classifier/a": torch.ones(2)})),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_refused(saved: Path, fresh: TrainState, name: str) -> None:
    load_checkpoint(fresh, saved)
    DAMAGE[name](saved)
    with pytest.raises(CheckpointError, match=str(saved)):
        load_checkpoint(fresh, saved)


UNREADABLE = [
    name for name in DAMAGE if name not in ("numbers with a slot of no optimizer", "other tensors with their hash")
]


@pytest.mark.parametrize("name", UNREADABLE)
def test_damage_is_found_without_a_state(saved: Path, name: str) -> None:
    verify_checkpoint(saved)
    DAMAGE[name](saved)
    with pytest.raises(CheckpointError, match=str(saved)):
        verify_checkpoint(saved)


def test_a_checkpoint_without_a_hash_of_its_numbers_is_taken(saved: Path, fresh: TrainState) -> None:
    rewrite(saved)
    verify_checkpoint(saved)
    load_checkpoint(fresh, saved)
    assert fresh.images == 32


def test_a_checkpoint_of_another_spec_is_refused(saved: Path, data: ShardedDataset) -> None:
    for other in (spec_of("mlp", images=33), spec_of("lenet", images=32)):
        with pytest.raises(CheckpointError, match=f"while the job is of {other.fingerprint()[:12]}"):
            load_checkpoint(start(other, data)[1], saved)


def test_a_checkpoint_survives_another_number_of_workers(saved: Path, data: ShardedDataset) -> None:
    spec = spec_of("mlp", images=32)
    spec = spec.model_copy(update={"workers": spec.workers.model_copy(update={"count": 3}), "name": "b"})
    load_checkpoint(start(spec, data)[1], saved)


def test_a_write_cut_short_is_no_checkpoint(
    tmp_path: Path, saved: Path, fresh: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_checkpoint(fresh, saved)
    folder = tmp_path / "cut"

    class Full:
        """A disk that becomes full after the tensors are written."""

        dumps = staticmethod(lambda *_, **__: (_ for _ in ()).throw(OSError("no space left on device")))

    monkeypatch.setattr(checkpoint, "json", Full)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(fresh, folder)
    monkeypatch.undo()
    assert [file.name for file in folder.iterdir()] == [TENSORS]
    with pytest.raises(CheckpointError):
        load_checkpoint(fresh, folder)


def test_files_of_a_checkpoint(saved: Path) -> None:
    assert sorted(os.listdir(saved)) == [NUMBERS, TENSORS]
    numbers = json.loads((saved / NUMBERS).read_text())
    assert (numbers["step"], numbers["images"]) == (2, 32)
    assert numbers["sha256"] == hashlib.sha256((saved / TENSORS).read_bytes()).hexdigest()
