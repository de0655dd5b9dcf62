"""Driver of a job: shards the data, trains, registers the model, and closes the MLflow run.

``python -m services.jobs.driver --job ID --attempt N --spec JSON`` is the command of an attempt.
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
"""Seconds for which the storage may be unreachable at the start of an attempt, and seconds between tries."""

LAST_STEP = 45.0
"""Seconds that workers have for a last step and a checkpoint after the job was asked to stop."""


def run_job(
    job: str,
    spec: JobSpec,
    settings: Settings,
    attempt: int = 1,
    origin: Origin | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Run a job on the current cluster, from its images to its registered model.

    Args:
        job: id of the job.
        spec: spec of the job.
        settings: addresses of the services.
        attempt: number of the attempt.
        origin: checkpoint of another job to start from.
        workers: number of reserved workers; by default the number in the spec.

    Returns:
        ``{"model": name/version, "metrics": {…}}``; the model is None if the job registers none.

    Raises:
        SupersededError: a later attempt has started.
        MongeError: the job failed; its MLflow run is then marked FAILED, or KILLED if this process was asked to stop.
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
    """Mark the attempt in the storage. Wait for the storage: a failed attempt would only be repeated."""
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
    # Ray Train and torch take seconds to import; do it while the data is sharded.
    importing = threading.Thread(target=_import_trainer, daemon=True)
    importing.start()
    report_stage("joining the cluster")
    join_cluster(settings)
    signal.signal(signal.SIGTERM, _stop)  # replaces Ray's handler
    import ray

    # Before the data is read, which may take an hour.
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
        raise ServiceError("a node with workers of the job is draining")
    report_done(outcome["model"])
    return outcome


def _origin(job: str, spec: JobSpec, settings: Settings, origin: Origin | None) -> Origin | None:
    """Return the origin, with its number of images unless the job already has a checkpoint, which takes precedence.

    Raises:
        CheckpointError: the checkpoint of the origin no longer exists.
        SpecError: the origin has already seen all images of the job.
        StorageError: S3 rejects the request, fails or is unreachable.
    """
    jobs = jobs_address(settings)
    if origin is None or complete_checkpoints(jobs, job, settings):
        return origin
    found, name = find_origin(jobs, origin, settings)
    assert found.images is not None
    spec.require_more(found.images)
    report_stage(f"starting from {name} of {found.job}")
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
        report_stage(f"skipped {manifest.quarantined} {images}, listed in {address}/{QUARANTINE}")
    return address


def _import_trainer() -> None:
    import services.training.trainer  # noqa: F401


def _close(uri: str, job: str, spec: JobSpec, status: str) -> None:
    """Close the MLflow run of the job; errors of MLflow are logged, since the job's own error matters more."""
    from services.tracking.run import Run, find_run, mark_killed

    with contextlib.suppress(ServiceError):
        if status == "FAILED":
            run = Run.open(uri, job, spec)
            report_run(run.run_id, run.experiment_id)  # workers may have failed before they opened it
            run.close("FAILED")
        elif run_id := find_run(uri, job):
            mark_killed(uri, run_id)


_stopped = threading.Event()
"""Set after this process was asked to stop."""


def _stop(signum: int, frame: FrameType | None) -> None:
    if _stopped.is_set():
        _leave(signum, frame)
    _stopped.set()
    # Not in the handler: the signal may arrive during one of Ray's calls.
    threading.Thread(target=_stop_workers, daemon=True).start()


def _stop_workers() -> None:
    """Let workers save a checkpoint if they train; end everything else at once."""
    asked = False
    with contextlib.suppress(Exception):  # not connected to a cluster
        from services.training.stopping import ask_to_stop

        asked = ask_to_stop()
    signal.setitimer(signal.ITIMER_REAL, LAST_STEP if asked else 1e-3)  # 0 would disable the timer


def _leave(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def _shard_progress(done: int, total: int) -> None:
    report_stage(f"sharded {done:,}/{total:,} images")


def can_retry_job(error: MongeError) -> bool:
    """Return whether another attempt may succeed: a service or a node failed, not the job."""
    return isinstance(error, ServiceError) and not isinstance(error, ModelNotFoundError | ObjectNotFoundError)


def main() -> int:
    """Run one attempt; return 0 if the job succeeded."""
    parser = argparse.ArgumentParser(prog="python -m services.jobs.driver", description="Run one training job.")
    parser.add_argument("--job", required=True, help="id of the job")
    parser.add_argument("--attempt", type=int, default=1, help="number of the attempt")
    parser.add_argument("--workers", type=int, help="number of reserved workers")
    parser.add_argument("--spec", required=True, help="resolved spec as JSON")
    parser.add_argument("--from", dest="origin", type=Origin.parse, help="JOB[@IMAGES] to start from")
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
