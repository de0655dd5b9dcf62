"""Verification of a plan in a file."""

from __future__ import annotations

from pathlib import Path

from pipelines.errors import ProblemError
from pipelines.transport.plan import Certificate
from pipelines.transport.verify import verify
from services.transport import wire


def verify_files(problem: Path, plan: Path) -> Certificate:
    """Verify a response of ``POST /v1/plans?potentials=true`` against its request.

    Args:
        problem: file with the body of the request, JSON or .npz.
        plan: file with the body of the response, JSON or .npz.

    Raises:
        ProblemError: a file is missing or invalid, or the plan has no potentials or belongs to another problem.
        CertificateError: the certificate does not match the plan.
    """
    body = _content("problem", problem)
    asked, _ = wire.read_problem(body, _kind(body), limit=2**63)
    answer = _content("plan", plan)
    return verify(asked, wire.read_plan(answer, _kind(answer)))


def _content(name: str, file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ProblemError(f"{name}: {file}: {error.strerror}", hint="use a readable file") from None


def _kind(body: bytes) -> str:
    return wire.NPZ if body.startswith(b"PK") else wire.JSON
