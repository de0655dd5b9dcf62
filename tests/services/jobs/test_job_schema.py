"""The API conforms to its OpenAPI document: all responses to generated requests with real ids are documented."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from services.jobs.api import build_app
from services.jobs.store import JobStore
from services.tokens import Role
from tests.services.jobs.standin import JobService

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 25


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[JobService, str]]:
    """Run a job service; yield it with the secret of an administrator."""
    folder = tmp_path_factory.mktemp("jobs")
    service = JobService(folder, JobStore(f"sqlite:///{folder / 'jobs.db'}"))
    service.step()
    yield service, service.token("fuzz", Role.ADMIN).secret
    service.close()


ROUTES = [
    ("POST", "/v1/jobs"),
    ("GET", "/v1/jobs"),
    ("GET", "/v1/jobs/{job}"),
    ("DELETE", "/v1/jobs/{job}"),
    ("POST", "/v1/jobs/{job}/retry"),
    ("GET", "/v1/jobs/{job}/logs"),
    ("GET", "/v1/jobs/{job}/events"),
    ("GET", "/v1/cluster"),
    ("POST", "/v1/tokens"),
    ("GET", "/v1/tokens"),
    ("GET", "/v1/tokens/self"),
    ("DELETE", "/v1/tokens/{name}"),
    ("GET", "/health"),
    ("GET", "/ready"),
]
"""All operations except streams, which may not end, and plans, which start processes."""


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_answer_is_described(method: str, path: str, served: tuple[JobService, str]) -> None:
    service, secret = served
    operation = schemathesis.openapi.from_asgi("/openapi.json", build_app(service.service()))[path][method]
    job = service.submit("somebody")
    headers = {"Authorization": f"Bearer {secret}", "Host": "localhost"}

    @given(case=operation.as_strategy(), real=st.booleans())
    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def asked(case: schemathesis.Case, real: bool) -> None:
        if real and "job" in case.path_parameters:
            case.path_parameters["job"] = job
        case.validate_response(case.call(headers=headers), checks=CHECKS)

    asked()
