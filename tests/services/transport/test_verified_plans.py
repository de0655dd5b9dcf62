"""Plans over HTTP are correct for numbers of any size, and clients can verify them."""

import dataclasses
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from typer.testing import CliRunner

from pipelines.errors import CertificateError
from pipelines.transport.plan import TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import solve
from services.cli import app
from services.transport.app import build_app
from services.transport.backend import LocalBackend
from services.transport.client import HttpPlanner
from services.transport.engine import Engine


@contextmanager
def served(engine: Engine) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(build_app(LocalBackend(engine)), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(Engine()) as address:
        yield address


def lying(problem: TransportProblem, solver: Any = "auto") -> TransportPlan:
    """Return the plan for the points in another order, with a certificate that matches it."""
    assert problem.x is not None
    return solve(dataclasses.replace(problem, x=problem.x[::-1].copy()), solver)


def ask(url: str, problem: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{url}/v1/plans?potentials=true", json=problem, trust_env=False)


FAR = {
    "x": [[1.7e9 + step] for step in (0.0, 10.0, 20.0, 30.0)],
    "y": [[1.7e9 + step] for step in (31.0, 21.0, 11.0, 1.0)],
}


def test_points_far_from_the_origin_as_json(url: str) -> None:
    answer = ask(url, FAR).json()
    assert answer["assignment"] == [3, 2, 1, 0]
    assert answer["certificate"]["primal"] == pytest.approx(1.0, rel=1e-12)


def test_very_small_points_have_an_entropic_plan(url: str) -> None:
    rng = np.random.default_rng(0)
    x, y = 1e-20 * rng.standard_normal((2, 12, 2))
    answer = ask(url, {"x": x.tolist(), "y": y.tolist(), "epsilon": 1e-41})
    assert answer.status_code == 200
    assert answer.json()["certificate"]["marginal_error"] <= 1e-3


def test_null_forbids_a_pair(url: str) -> None:
    answer = ask(url, {"matrix": [[1, None], [2, 3]]}).json()
    assert answer["assignment"] == [0, 1]
    refused = ask(url, {"matrix": [[1, None], [2, None]]})
    assert refused.status_code == 422
    assert refused.json()["field"] == "matrix"
    assert "infeasible" in refused.json()["message"]


@pytest.mark.parametrize(
    "problem",
    [
        {"matrix": [[1, 2], [3]]},
        {"x": [[1, 2], [3]], "y": [[1, 2]]},
        {"x": [[1e200], [2e300]], "y": [[1], [2]]},
        {"x": [[None]], "y": [[1]]},
    ],
)
def test_what_is_no_problem_is_said_to_be_none(url: str, problem: dict[str, Any]) -> None:
    answer = ask(url, problem)
    assert answer.status_code == 422
    assert answer.json()["hint"] or answer.json()["field"]


PROBLEMS = [
    TransportProblem.between(*np.random.default_rng(1).standard_normal((2, 30, 4))),
    TransportProblem.between(np.random.default_rng(2).standard_normal((20, 4)), np.eye(4)),
    TransportProblem.between(*np.random.default_rng(3).standard_normal((2, 30, 4)), epsilon=0.5),
]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_client_may_verify_what_comes_back(url: str, problem: TransportProblem) -> None:
    planner = HttpPlanner(url, verify=True)
    np.testing.assert_array_equal(planner.plan(problem).dense(), solve(problem).dense())
    planner.close()


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_service_that_lies_is_caught(problem: TransportProblem) -> None:
    with served(Engine(solver=lying)) as url:
        trusting, careful = HttpPlanner(url), HttpPlanner(url, verify=True)
        assert trusting.plan(problem).certificate.converged
        with pytest.raises(CertificateError, match="is not what its certificate says"):
            careful.plan(problem)
        trusting.close()
        careful.close()


def test_the_command_verifies_files(url: str, tmp_path: Path) -> None:
    problem, plan = tmp_path / "problem.json", tmp_path / "plan.json"
    problem.write_text(json.dumps(FAR))
    answer = ask(url, FAR).json()
    plan.write_text(json.dumps(answer))
    shown = CliRunner().invoke(app, ["transport", "verify", str(problem), str(plan)])
    assert shown.exit_code == 0, shown.output
    assert "costs at most 1" in shown.output
    assert "no plan costs less than 1" in shown.output

    plan.write_text(json.dumps(answer | {"assignment": [0, 3, 2, 1]}))
    assert refused(problem, plan) == "CertificateError"
    plan.write_text(json.dumps({name: answer[name] for name in ("shape", "assignment", "certificate")}))
    assert refused(problem, plan) == "ProblemError"
    plan.write_text("[]")
    assert refused(problem, plan) == "ProblemError"
    assert refused(problem, tmp_path / "missing") == "ProblemError"


def refused(problem: Path, plan: Path) -> str:
    found = CliRunner().invoke(app, ["transport", "verify", str(problem), str(plan)])
    assert found.exit_code != 0
    assert found.exception is not None
    return type(found.exception).__name__
