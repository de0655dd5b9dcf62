"""What is checked of a job before it is accepted."""

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
"""Plans that are made at a time: each is a process of its own."""

PLAN_SECONDS = 120.0
"""Seconds that a plan may take: it lists all images of a folder."""


class Admission:
    """Checks jobs by what this machine sees: the cluster's, or one that shares its folders.

    Args:
        settings: where everything that Monge writes lies.
        version: ``NAME/VERSION`` of a registered model by any of its names; raises where there is none.
    """

    def __init__(self, settings: Settings, version: Callable[[str], str]) -> None:
        self._settings, self._version = settings, version
        self._plans = threading.BoundedSemaphore(PLANS)

    def check(self, asked: Submission, cluster: Cluster) -> JobSpec:
        """The spec of a job, if it may be queued.

        Raises:
            SpecError: the spec is wrong, a file that it names is not there, or the cluster has too few nodes.
            SourceError: its images cannot be found.
            ModelNotFoundError: a model that it uses is not registered.
            ServiceError: MLflow cannot be reached to ask for it.
        """
        spec = read_spec(asked)
        require_source(spec.data.source)
        for field, file in named_files(spec):
            if not Path(file).is_absolute() or not Path(file).is_file():
                raise SpecError(f"{field}: {file} is no file that the cluster sees", hint="name it by a shared folder")
        # By version: what the job is compared with stays the same at each of its attempts.
        spec = spec.with_versions(self._version)
        if not asked.wait and not cluster.away and (never := policy.refusal(spec.workers, cluster)) is not None:
            raise SpecError(never, hint="ask for less, or submit it with `--wait` if nodes will come")
        return spec

    def origin(self, asked: Submission, spec: JobSpec, find: Find) -> Origin | None:
        """The checkpoint that a job starts with, if it continues another one and may; see :func:`require_origin`."""
        return None if asked.origin is None else require_origin(asked.origin, spec, find, self._settings)

    def plan(self, asked: Submission, cluster: Cluster, find: Find) -> DryRun:
        """What a job would work on, and on what.

        Raises:
            MongeError: as :meth:`check` and :meth:`origin`; its network cannot take such images, or there is one class
                alone.
            BusyError: others are planning.
        """
        spec = self.check(asked, cluster)
        origin = self.origin(asked, spec, find)
        if not self._plans.acquire(timeout=PLAN_SECONDS):
            raise BusyError("other jobs are being looked at", hint="ask again in a minute", retry_after=30.0)
        try:
            lines = self._lines(spec)
        finally:
            self._plans.release()
        continued = [] if origin is None else [f"from: {origin}"]
        return DryRun(lines=[*lines, *continued, f"workers: {_workers(spec, cluster)}"])

    def _lines(self, spec: JobSpec) -> list[str]:
        # A process of its own: it imports torch, and decodes what strangers may have written.
        try:
            done = subprocess.run(
                [sys.executable, "-m", "services.jobs.plan", str(self._settings.home / "cache")],
                input=spec.model_dump_json().encode(),
                capture_output=True,
                timeout=PLAN_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return [f"data: {spec.data.source}, which takes more than {PLAN_SECONDS:g} s to list"]
        if done.returncode == 1:
            raise read_error(done.stdout, 422, "the look at the job's data")
        if done.returncode != 0:
            reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise ServiceError(f"the job's data could not be looked at: {' '.join(reason)}")
        return [str(line) for line in json.loads(done.stdout)["lines"]]


def read_spec(asked: Submission) -> JobSpec:
    """The spec of a submission, with its overrides.

    Raises:
        SpecError: it is not one.
    """
    document: Any = asked.spec
    if isinstance(document, str):
        try:
            document = yaml.safe_load(document)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise SpecError(f"spec: not YAML: {error}") from None
    if not isinstance(document, dict):
        raise SpecError("spec: a mapping with name, data, model, objective and train expected")
    return parse_spec(apply_overrides(document, asked.overrides))


def require_source(source: str) -> None:
    """Refuse a source that a job on the cluster could not read.

    Raises:
        SourceError: it is neither in S3, nor in the catalogue, nor a folder or file that is seen here.
        SpecError: its address in S3 is wrong.
    """
    if source.startswith(SCHEME):
        split_address(source)
        return
    path = Path(source).expanduser()
    if source in NAMES or (path.is_absolute() and path.exists()):
        return
    if path.is_absolute():
        raise SourceError(
            f"{source} is not seen on the cluster",
            hint="put the images into S3, or into a folder that the cluster shares under the same path",
        )
    raise SourceError(
        f"{source!r} is neither an absolute path nor in the catalogue ({', '.join(sorted(NAMES))})",
        hint="give the whole path of a folder, or an address in S3",
    )


def _workers(spec: JobSpec, cluster: Cluster) -> str:
    if cluster.away:
        return f"{spec.workers.count}, once the cluster answers ({cluster.away})"
    if policy.refusal(spec.workers, cluster) is not None:
        return f"{spec.workers.count}, once there are nodes for them"
    placement = placement_of(spec.workers, cluster.resources)
    return str(placement) + (f": {placement.note}" if placement.note else "")
