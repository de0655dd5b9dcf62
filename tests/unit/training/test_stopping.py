"""A run with a stop request saves a checkpoint after the current step, and resumes later with identical results."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from runs import CPU, Recorder, go_on, job, no_evaluation, start, tensors

from pipelines.data.loader import Loader, ShardedDataset
from pipelines.training.checkpoint import load_checkpoint
from pipelines.training.loop import train
from pipelines.training.stopping import EVERY, MOST_STEPS, Stopping


@pytest.mark.parametrize("kind", ["lenet", "gan"])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, data: ShardedDataset, kind: str) -> None:
    spec = job(kind, images=96, checkpoint_every=96, log_every=16)
    objective, whole = start(spec, data)
    go_on(spec, data, objective, whole)

    objective, stopped = start(spec, data)
    recorder = Recorder(tmp_path)
    with Loader(data.train, spec.train.batch, spec.seed, 0, 1) as batches:
        train(spec, objective, stopped, batches, no_evaluation, recorder, CPU, lambda: stopped.step == 2)
    assert (recorder.checkpoints, recorder.evaluations) == ([32], [])

    objective, resumed = start(spec, data, seed=99)
    load_checkpoint(resumed, tmp_path / "32")
    go_on(spec, data, objective, resumed)
    assert resumed.images == whole.images
    expected, found = tensors(whole), tensors(resumed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_that_ends_with_the_step_at_which_it_is_asked_is_whole(data: ShardedDataset) -> None:
    spec = job("lenet", images=32, checkpoint_every=96)
    objective, state = start(spec, data)
    recorder = Recorder()
    with Loader(data.train, spec.train.batch, spec.seed, 0, 1) as batches:
        train(spec, objective, state, batches, no_evaluation, recorder, CPU, lambda: state.images == 32)
    assert (recorder.checkpoints, recorder.evaluations) == ([32], [32])


@pytest.mark.parametrize("seconds", [1e-4, 0.01, 0.2, 3.0])
def test_questions_come_about_as_often_as_promised_however_long_a_step_takes(seconds: float) -> None:
    now, asked = 0.0, []

    def ask() -> bool:
        asked.append(now)
        return False

    stopping = Stopping(ask, clock=lambda: now)
    for step in range(1, 20_001):
        now = step * seconds
        assert not stopping.after(step)
        if len(asked) == 30:
            break
    pauses = [later - earlier for earlier, later in pairwise(asked)]
    assert max(pauses) <= max(seconds, EVERY + seconds / 2) * 1.01
    assert pauses[-1] >= max(seconds, EVERY - seconds / 2) * 0.99


def test_a_clock_that_stands_still_does_not_end_the_questions() -> None:
    asked: list[int] = []
    stopping = Stopping(lambda: bool(asked.append(0)), clock=lambda: 0.0)
    for step in range(1, 3 * MOST_STEPS):
        stopping.after(step)
    assert len(asked) >= 3
