"""``monge doctor``: check the installation and the services."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from pipelines.errors import MongeError
from services.platform import local
from services.settings import Settings

PACKAGES = ("torch", "ray", "mlflow", "pot", "lapx", "boto3", "pydantic", "fastapi", "uvicorn")
LEAST_FREE_GIB = 2


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        what: name of the check.
        found: result.
        ok: whether the check passed.
        hint: what to do if the check failed.
        optional: whether Monge also works if the check fails.
    """

    what: str
    found: str
    ok: bool
    hint: str = ""
    optional: bool = False


def check_machine(settings: Settings) -> list[Finding]:
    """Check Python, packages, CPUs and GPUs, the exact solver, the disk and the services, in this order."""
    return [*_python(), *_processors(), _exact_solver(), _disk(settings), *_services(settings)]


def _python() -> list[Finding]:
    current = ".".join(map(str, sys.version_info[:3]))
    findings = [Finding("Python", current, sys.version_info >= (3, 11), "" if sys.version_info >= (3, 11) else "3.11+")]
    for package in PACKAGES:
        try:
            findings.append(Finding(package, version(package), True))
        except PackageNotFoundError:
            findings.append(Finding(package, "missing", False, f"pip install {package}"))
    return findings


def _processors() -> list[Finding]:
    import torch

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [
        Finding("CPUs", str(cpus), cpus >= 2, "" if cpus >= 2 else "two workers share one CPU", optional=True),
        Finding("GPUs", ", ".join(gpus) or "none: jobs run on CPUs", True, optional=True),
    ]


def _exact_solver() -> Finding:
    from pipelines.transport import native

    try:
        found = native.implementation()
    except MongeError as error:
        return Finding("exact plans", str(error.args[0]), False, error.hint or "")
    hint = (
        "" if found.name == "native" else "install a C++ compiler and reinstall Monge: plans are several times faster"
    )
    return Finding("exact plans", str(found), not hint, hint, optional=True)


def _disk(settings: Settings) -> Finding:
    existing = next(
        folder for folder in [settings.home.absolute(), *settings.home.absolute().parents] if folder.exists()
    )
    free = shutil.disk_usage(existing).free / 2**30
    return Finding(
        f"disk of {settings.home}",
        f"{free:.1f} GiB free",
        free >= LEAST_FREE_GIB,
        "" if free >= LEAST_FREE_GIB else "free some space, or set MONGE_HOME to a larger disk",
    )


def _services(settings: Settings) -> list[Finding]:
    try:
        found = local.status(settings)
    except MongeError as error:
        return [Finding("platform", str(error.args[0]), False, error.hint or "")]
    return [
        Finding(
            service.name,
            _state(service),
            service.healthy,
            "" if service.healthy else _hint(service),
            optional=service.url is None,
        )
        for service in found
    ]


def _state(service: local.Health) -> str:
    if service.url is None:
        return "not started"
    return f"answers at {service.url}" if service.healthy else f"does not answer at {service.url}"


def _hint(service: local.Health) -> str:
    if service.named_by:
        return f"start the service there, or change {service.named_by}"
    return "monge up" if service.pid is None else "monge down, then monge up"
