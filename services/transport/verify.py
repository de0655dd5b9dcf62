"""Verify a plan that lies in a file, as a service answered it."""

from __future__ import annotations

from pathlib import Path

from pipelines.errors import ProblemError
from pipelines.transport.plan import Certificate
from pipelines.transport.verify import verify
from services.transport import wire


def verify_files(problem: Path, plan: Path) -> Certificate:
    """Verify an answer of ``POST /v1/plans?potentials=true`` against its request.

    Args:
        problem: the body of the request, JSON or .npz.
        plan: that of the answer, JSON or .npz.

    Raises:
        ProblemError: a file is missing or is neither; the plan has no potentials, or is of another problem.
        CertificateError: the plan is not what its certificate says.
    """
    body = _content("problem", problem)
    asked, _ = wire.read_problem(body, _kind(body), limit=2**63)
    answer = _content("plan", plan)
    return verify(asked, wire.read_plan(answer, _kind(answer)))


def _content(name: str, file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ProblemError(f"{name}: {file}: {error.strerror}", hint="name a file that can be read") from None


def _kind(body: bytes) -> str:
    return wire.NPZ if body.startswith(b"PK") else wire.JSON
