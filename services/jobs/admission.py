"""Checks of a job before it is accepted."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from pipelines.data.catalogue import NAMES
from pipelines.errors import BusyError, ServiceError, SourceError, SpecError
from pipelines.spec import JobSpec, apply_overrides, parse_spec
from services.error_documents import read_error
from services.jobs import policy
from services.jobs.continuing import Find, require_origin
from services.jobs.documents import DryRun, Submission
from services.jobs.paths import named_files
from services.jobs.policy import Cluster
from services.settings import Settings
from services.storage.objects import SCHEME, split_address
from services.training.origin import Origin
from services.training.placement import placement_of

PLANS = 2
"""Maximum number of concurrent plans; each runs in its own process."""

PLAN_SECONDS = 120.0
"""Time limit of a plan in seconds; a plan lists all images of a folder."""


class Admission:
    """Check jobs on this machine, which must be part of the cluster or share its folders.

    Args:
        settings: settings with the home folder of Monge.
        version: function that resolves a reference to a registered model to ``NAME/VERSION``; raises if not found.
    """

    def __init__(self, settings: Settings, version: Callable[[str], str]) -> None:
        self._settings, self._version = settings, version
        self._plans = threading.BoundedSemaphore(PLANS)

    def check(self, asked: Submission, cluster: Cluster) -> JobSpec:
        """Return the spec of a job if it may be queued.

        Raises:
            SpecError: the spec is invalid, a file that it names does not exist, or the cluster is too small.
            SourceError: the images of the job do not exist.
            ModelNotFoundError: a model that it uses is not registered.
            ServiceError: MLflow is unreachable.
        """
        spec = read_spec(asked)
        require_source(spec.data.source)
        for field, file in named_files(spec):
            if not Path(file).is_absolute() or not Path(file).is_file():
                raise SpecError(f"{field}: {file} does not exist on the cluster", hint="put it in a shared folder")
        # Store the version, not the alias: the job is compared with the same model at each attempt.
        spec = spec.with_versions(self._version)
        if not asked.wait and not cluster.away and (never := policy.refusal(spec.workers, cluster)) is not None:
            raise SpecError(never, hint="request less, or add `--wait` to queue the job until nodes join")
        return spec

    def origin(self, asked: Submission, spec: JobSpec, find: Find) -> Origin | None:
        """Return the checkpoint that a job continues from, if any; see :func:`require_origin`."""
        return None if asked.origin is None else require_origin(asked.origin, spec, find, self._settings)

    def plan(self, asked: Submission, cluster: Cluster, find: Find) -> DryRun:
        """Return a summary of the job: its data, its network, and the workers it would get.

        Raises:
            MongeError: as :meth:`check` and :meth:`origin`; the network does not accept images of this size, or the
                data has only one class.
            BusyError: too many other plans are running.
        """
        spec = self.check(asked, cluster)
        origin = self.origin(asked, spec, find)
        if not self._plans.acquire(timeout=PLAN_SECONDS):
            raise BusyError("the job service is busy with other plans", hint="try again in a minute", retry_after=30.0)
        try:
            lines = self._lines(spec)
        finally:
            self._plans.release()
        continued = [] if origin is None else [f"from: {origin}"]
        return DryRun(lines=[*lines, *continued, f"workers: {_workers(spec, cluster)}"])

    def _lines(self, spec: JobSpec) -> list[str]:
        # In a separate process: it imports torch and decodes untrusted files.
        try:
            done = subprocess.run(
                [sys.executable, "-m", "services.jobs.plan", str(self._settings.home / "cache")],
                input=spec.model_dump_json().encode(),
                capture_output=True,
                timeout=PLAN_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return [f"data: {spec.data.source}, not listed within {PLAN_SECONDS:g} s"]
        if done.returncode == 1:
            raise read_error(done.stdout, 422, "the check of the job's data")
        if done.returncode != 0:
            reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise ServiceError(f"the check of the job's data failed: {' '.join(reason)}")
        return [str(line) for line in json.loads(done.stdout)["lines"]]


def read_spec(asked: Submission) -> JobSpec:
    """Return the spec of a submission, with its overrides applied.

    Raises:
        SpecError: the spec is invalid.
    """
    document: Any = asked.spec
    if isinstance(document, str):
        try:
            document = yaml.safe_load(document)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise SpecError(f"spec: not YAML: {error}") from None
    if not isinstance(document, dict):
        raise SpecError("spec: expected a mapping with name, data, model, objective and train")
    return parse_spec(apply_overrides(document, asked.overrides))


def require_source(source: str) -> None:
    """Raise if a job on the cluster could not read a source.

    Raises:
        SourceError: the source is not in S3, not in the catalogue, and does not exist as a file or folder.
        SpecError: the S3 address is invalid.
    """
    if source.startswith(SCHEME):
        split_address(source)
        return
    path = Path(source).expanduser()
    if source in NAMES or (path.is_absolute() and path.exists()):
        return
    if path.is_absolute():
        raise SourceError(
            f"{source} does not exist on the cluster",
            hint="put the images in S3, or in a folder that is mounted under the same path on the cluster",
        )
    raise SourceError(
        f"{source!r} is neither an absolute path nor a name in the catalogue",
        hint=f"use the absolute path of a folder, an S3 address, or one of {', '.join(sorted(NAMES))}",
    )


def _workers(spec: JobSpec, cluster: Cluster) -> str:
    if cluster.away:
        return f"{spec.workers.count}, placed when the cluster is reachable ({cluster.away})"
    if policy.refusal(spec.workers, cluster) is not None:
        return f"{spec.workers.count}, placed when enough nodes join"
    placement = placement_of(spec.workers, cluster.resources)
    return str(placement) + (f": {placement.note}" if placement.note else "")
