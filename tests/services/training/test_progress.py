"""Progress lines: what rank 0 writes is what a follower reads."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.training.progress import progress_line, read_progress, read_stage, stage_line


@given(images=st.integers(0, 10**12), total=st.integers(1, 10**12), value=st.floats(allow_nan=False))
def test_round_trip(images: int, total: int, value: float) -> None:
    progress = read_progress(progress_line(images, total, {"loss": value}))
    assert progress is not None
    assert (progress.images, progress.total) == (images, total)
    assert progress.details.startswith(" · loss ")


def test_rays_prefix_is_no_hindrance() -> None:
    assert read_stage("(RayTrainWorker pid=7) " + stage_line("joining the cluster")) == "joining the cluster"
    progress = read_progress("(RayTrainWorker pid=7, ip=127.0.0.1) " + progress_line(10, 20, {}))
    assert progress is not None
    assert progress.images == 10


def test_other_lines_tell_nothing() -> None:
    assert read_progress("Traceback (most recent call last):") is None
    assert read_stage("[train] 1/2 images") is None
