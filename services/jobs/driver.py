"""The driver of a job: shards the data, trains, and leaves no run behind that looks as if it went on.

``python -m services.jobs.driver --job ID --attempt N --spec JSON`` is what an attempt runs on the cluster.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from pipelines.data.manifest import QUARANTINE
from pipelines.errors import ModelNotFoundError, MongeError, ObjectNotFoundError, ServiceError, StorageError
from pipelines.spec import JobSpec, parse_spec
from services.cluster import join_cluster
from services.settings import Settings, load_settings
from services.training.config import jobs_address
from services.training.fencing import Fence
from services.training.origin import Origin, complete_checkpoints, find_origin
from services.training.placement import exactly, placement_of
from services.training.progress import report_done, report_error, report_run, report_stage

PATIENCE, PAUSE = 600.0, 10.0
"""Seconds that the storage may be away when an attempt begins, and seconds until it is tried again."""

LAST_STEP = 45.0
"""Seconds that workers have for a step and a checkpoint once the job was told to stop."""


def run_job(
    job: str,
    spec: JobSpec,
    settings: Settings,
    attempt: int = 1,
    origin: Origin | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Run a job from its images to its registered model, on the cluster that this process belongs to.

    Args:
        job: its id.
        spec: what to do.
        settings: where everything is.
        attempt: which attempt at the job it is.
        origin: the checkpoint of another job that it starts with.
        workers: how many were reserved for it; as many as the spec asks for by default.

    Returns:
        ``{"model": name/version, "metrics": {…}}``; the model is None where the job registers none.

    Raises:
        SupersededError: a later attempt has begun.
        MongeError: the job failed; its MLflow run is then FAILED, and KILLED where this process was told to stop.
    """
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGALRM, _leave)
    uri = settings.address("mlflow_uri")
    fence = Fence(jobs_address(settings), job, attempt, settings)
    _claim(fence)
    try:
        return _run(job, spec, settings, attempt, origin, workers)
    except (KeyboardInterrupt, SystemExit):
        signal.setitimer(signal.ITIMER_REAL, 0)
        if fence.holds():
            _close(uri, job, spec, "KILLED")
        raise
    except MongeError:
        if fence.holds():
            _close(uri, job, spec, "FAILED")
        raise


def _claim(fence: Fence) -> None:
    """Begin, once the storage takes the mark of this attempt: an attempt that fails for it would only be repeated."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            fence.claim()
        except StorageError as error:
            if isinstance(error, ObjectNotFoundError) or time.monotonic() > until:
                raise
            report_stage(f"waiting for the storage: {error.args[0]}")
            time.sleep(PAUSE)
        else:
            return


def _run(
    job: str, spec: JobSpec, settings: Settings, attempt: int, origin: Origin | None, workers: int | None
) -> dict[str, Any]:
    origin = _origin(job, spec, settings, origin)
    # Ray Train and torch take seconds to import; that happens while the data is sharded.
    importing = threading.Thread(target=_import_trainer, daemon=True)
    importing.start()
    report_stage("joining the cluster")
    join_cluster(settings)
    signal.signal(signal.SIGTERM, _stop)  # Ray has set another
    import ray

    # Before the data is read: that may take an hour.
    reserved = spec.workers if workers is None else exactly(spec.workers, workers)
    placement = placement_of(reserved, ray.cluster_resources())
    data = _shard(spec, settings)
    report_stage(f"starting {placement}" + (f": {placement.note}" if placement.note else ""))
    importing.join()
    from services.training.trainer import fit

    outcome = fit(job, spec, data, settings, placement, attempt, origin)
    signal.setitimer(signal.ITIMER_REAL, 0)
    if (images := outcome.get("stopped")) is not None:
        report_stage(f"stopped at image {images:,}, {'with' if outcome['saved'] else 'without'} a checkpoint")
        if _stopped.is_set():
            raise SystemExit(128 + signal.SIGTERM)
        raise ServiceError("a node of the job's workers is to be taken away")
    report_done(outcome["model"])
    return outcome


def _origin(job: str, spec: JobSpec, settings: Settings, origin: Origin | None) -> Origin | None:
    """The origin, with its images as long as the job has no checkpoint of its own, which goes before it.

    Raises:
        CheckpointError: the origin's checkpoint is not kept.
        SpecError: it has seen all images that the job would see.
        StorageError: S3 refuses, fails or does not answer.
    """
    jobs = jobs_address(settings)
    if origin is None or complete_checkpoints(jobs, job, settings):
        return origin
    found, name = find_origin(jobs, origin, settings)
    assert found.images is not None
    spec.require_more(found.images)
    report_stage(f"starting with {name} of {found.job}")
    return found


def _shard(spec: JobSpec, settings: Settings) -> str:
    from services.jobs.plan import require_classes
    from services.sharding.dataset import dataset_address, shard_dataset

    address = dataset_address(settings.home, spec.data, settings.storage)
    is_there = spec.data.source.rstrip("/") == address
    report_stage(f"reading shards of {address}" if is_there else f"sharding {spec.data.source} into {address}")
    manifest = shard_dataset(spec.data, address, settings.home / "cache", on_progress=_shard_progress)
    require_classes(spec, manifest.classes)
    if manifest.quarantined:
        images = "image" if manifest.quarantined == 1 else "images"
        report_stage(f"set aside {manifest.quarantined} {images}, listed in {address}/{QUARANTINE}")
    return address


def _import_trainer() -> None:
    import services.training.trainer  # noqa: F401


def _close(uri: str, job: str, spec: JobSpec, status: str) -> None:
    """Close the job's MLflow run; the error that ended the job matters more than one of MLflow's."""
    from services.tracking.run import Run, find_run, mark_killed

    with contextlib.suppress(ServiceError):
        if status == "FAILED":
            run = Run.open(uri, job, spec)
            report_run(run.run_id, run.experiment_id)  # its workers may have failed before it was open
            run.close("FAILED")
        elif run_id := find_run(uri, job):
            mark_killed(uri, run_id)


_stopped = threading.Event()
"""Set once this process was told to stop."""


def _stop(signum: int, frame: FrameType | None) -> None:
    if _stopped.is_set():
        _leave(signum, frame)
    _stopped.set()
    # Not here: the signal may have come in the midst of one of Ray's calls.
    threading.Thread(target=_stop_workers, daemon=True).start()


def _stop_workers() -> None:
    """Let workers that train save a checkpoint; what else goes on is ended at once."""
    asked = False
    with contextlib.suppress(Exception):  # there is no cluster, or not yet
        from services.training.stopping import ask_to_stop

        asked = ask_to_stop()
    signal.setitimer(signal.ITIMER_REAL, LAST_STEP if asked else 1e-3)  # 0 would be never


def _leave(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def _shard_progress(done: int, total: int) -> None:
    report_stage(f"sharded {done:,}/{total:,} images")


def can_retry_job(error: MongeError) -> bool:
    """Whether another attempt may succeed: a service or a node is away, and nothing is wrong with the job."""
    return isinstance(error, ServiceError) and not isinstance(error, ModelNotFoundError | ObjectNotFoundError)


def main() -> int:
    """Run one attempt; 0 when the job has finished."""
    parser = argparse.ArgumentParser(prog="python -m services.jobs.driver", description="Run one training job.")
    parser.add_argument("--job", required=True, help="id of the job")
    parser.add_argument("--attempt", type=int, default=1, help="which attempt it is")
    parser.add_argument("--workers", type=int, help="how many were reserved for it")
    parser.add_argument("--spec", required=True, help="the resolved spec, as JSON")
    parser.add_argument("--from", dest="origin", type=Origin.parse, help="JOB[@IMAGES] whose checkpoint it starts with")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    try:
        spec = parse_spec(json.loads(arguments.spec))
        run_job(arguments.job, spec, load_settings(), arguments.attempt, arguments.origin, arguments.workers)
    except MongeError as error:
        report_error(error, final=not can_retry_job(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
