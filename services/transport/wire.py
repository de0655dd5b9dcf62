"""Serialisation of problems, shares and plans as .npz or JSON; received data cannot run code."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.errors import ProblemError
from pipelines.spec import CostName
from pipelines.transport.plan import Certificate, RowBlock, TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import SolverName
from services.transport.npz import read_npz, write_npz
from services.transport.rendezvous import RankShare

JSON = "application/json"
NPZ = "application/x-npz"
Points = Annotated[list[list[float]], Field(min_length=1, description="one row per point")]
Costs = Annotated[
    list[list[float | None]],
    Field(min_length=1, description="costs, (n, m); null forbids a pair"),
]
Weights = Annotated[list[float], Field(min_length=1, description="one weight ≥ 0 per point; uniform by default")]
Label = Annotated[str, Field(min_length=1, max_length=256)]


class PlanTerms(BaseModel):
    """Parameters of a problem other than its arrays."""

    model_config = ConfigDict(extra="forbid")

    cost: CostName = "squared-euclidean"
    epsilon: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="regularisation; 0 for the exact problem"
    )
    power: float = Field(default=2.0, gt=0, allow_inf_nan=False, description="exponent of the cost `power`")
    solver: SolverName = "auto"


class ProblemTerms(PlanTerms):
    """Parameters of a problem from a single sender."""

    marginal_penalty: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="for an unbalanced plan; requires epsilon > 0"
    )


class PlanRequest(ProblemTerms):
    """A transport problem: points x and y, or a cost matrix."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"x": [[0.0], [1.0]], "y": [[1.1], [0.2]]}]}
    )

    x: Points | None = None
    y: Points | None = None
    matrix: Costs | None = None
    a: Weights | None = None
    b: Weights | None = None


class ShareTerms(PlanTerms):
    """Parameters of a share other than its points."""

    job: Label = Field(description="name of the job; new for each attempt")
    key: Label = Field(description="name of the problem within the job")
    rank: int = Field(ge=0)
    world: int = Field(ge=1)
    ticket: str = Field(default="", max_length=64, description="token that stays the same when a call is repeated")
    number: int = Field(default=0, ge=0, description="number of the call among those of this rank")
    received: int = Field(default=0, ge=0, description="number below which no call of this rank is repeated")
    deadline: float = Field(default=60.0, ge=0, allow_inf_nan=False, description="seconds to wait for other ranks")


class ShareRequest(ShareTerms):
    """One rank's share of a global problem."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"job": "digits/1", "key": "step 1", "rank": 0, "world": 1, "x": [[0.0], [1.0]], "y": [[1.1], [0.2]]}
            ]
        },
    )

    x: list[list[float]]
    y: list[list[float]]
    b: list[float] | None = Field(default=None, description="weights of y, from all ranks or from none")


Terms = TypeVar("Terms", ProblemTerms, ShareTerms)


def read_problem(body: bytes, kind: str, limit: int) -> tuple[TransportProblem, SolverName]:
    """Return the problem in a request.

    Args:
        body: body of the request.
        kind: content type, :data:`JSON` or :data:`NPZ`.
        limit: maximum size of the unpacked arrays in bytes.

    Raises:
        ProblemError: a field is invalid; the message starts with its name.
        TooLargeError: the arrays exceed the limit.
    """
    arrays, terms = _read(body, kind, limit, ProblemTerms, PlanRequest, ("x", "y", "matrix", "a", "b"))
    weights: dict[str, Any] = {"a": arrays.get("a"), "b": arrays.get("b")}
    if ("matrix" in arrays) == ("x" in arrays or "y" in arrays):
        raise ProblemError(
            f"matrix: received the fields {', '.join(arrays) or 'none'}", hint="send x and y, or matrix, but not both"
        )
    regularisation: dict[str, Any] = {"epsilon": terms.epsilon, "marginal_penalty": terms.marginal_penalty}
    if "matrix" in arrays:
        return TransportProblem.from_cost(arrays["matrix"], **regularisation, **weights), terms.solver
    for side in "xy":
        if side not in arrays:
            raise ProblemError(f"{side}: missing", hint="send x and y, or matrix")
    points: dict[str, Any] = {"cost": terms.cost, "power": terms.power}
    return TransportProblem.between(arrays["x"], arrays["y"], **points, **regularisation, **weights), terms.solver


def read_share(body: bytes, kind: str, limit: int) -> tuple[RankShare, float]:
    """Return the share in a request, and the seconds that its rank waits. See :func:`read_problem`."""
    arrays, terms = _read(body, kind, limit, ShareTerms, ShareRequest, ("x", "y", "b"))
    points: dict[str, Any] = {}
    for side in "xy":
        if side not in arrays or arrays[side].ndim < 1:
            raise ProblemError(f"{side}: missing", hint="send x and y, one row per point")
        points[side] = arrays[side].reshape(len(arrays[side]), math.prod(arrays[side].shape[1:]))
    return RankShare(**points, b=arrays.get("b"), **terms.model_dump(exclude={"deadline"})), terms.deadline


def write_plan(plan: TransportPlan, kind: str, *, potentials: bool = False, dense: bool = False) -> bytes:
    """Return a plan as the body of a response; a plan represented by its potentials always includes them."""
    answer: dict[str, Any] = {"shape": np.array(plan.shape)}
    if plan.assignment is not None:
        answer["assignment"] = plan.assignment
    elif plan.rows is not None:
        answer |= {"rows": plan.rows, "columns": plan.columns, "mass": plan.mass}
    else:
        potentials = True
    if potentials and plan.f is not None:
        answer |= {"f": plan.f, "g": plan.g}
    if dense:
        answer["dense"] = plan.dense()
    return _write(answer, plan.certificate, kind)


def write_rows(block: RowBlock, kind: str) -> bytes:
    """Return the rows of a rank as the body of a response."""
    answer = {"rows": block.rows, "columns": block.columns, "mass": block.mass, "waited": np.float64(block.waited)}
    return _write(answer, block.certificate, kind)


def read_plan(body: bytes, kind: str = NPZ) -> TransportPlan:
    """Return the plan in a response.

    Raises:
        ProblemError: the body is not a plan.
    """
    try:
        answer, certificate = _read_answer(body) if kind == NPZ else _read_listed(body)
        n, m = answer.pop("shape").tolist()
        answer.pop("dense", None)
        return TransportPlan((n, m), certificate, **answer)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ProblemError(
            f"plan: not a response of the transport service: {error!r}"[:300],
            hint="use the response of POST /v1/plans?potentials=true",
        ) from None


def read_rows(body: bytes) -> RowBlock:
    """Return the rows in an .npz response."""
    answer, certificate = _read_answer(body)
    waited = float(answer.pop("waited"))
    return RowBlock(certificate=certificate, waited=waited, **answer)


def _read(
    body: bytes, kind: str, limit: int, terms: type[Terms], request: type[BaseModel], names: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], Terms]:
    """Return the arrays and the other parameters of a request."""
    try:
        if kind == JSON:
            document = request.model_validate_json(body)
            arrays = {name: getattr(document, name) for name in names if getattr(document, name) is not None}
            said = document.model_dump(exclude=set(names))
            return {name: _rectangular(name, rows) for name, rows in arrays.items()}, terms.model_validate(said)
        received = read_npz(body, limit)
        said = {name: value.item() for name, value in received.items() if name not in names and value.ndim == 0}
        for name in names:
            if name in received and received[name].dtype.kind == "U":
                raise ProblemError(f"{name}: expected numbers, received dtype {received[name].dtype}")
        stray = [name for name in received if name not in names and name not in said]
        if stray:
            raise ProblemError(f"{stray[0][:64]}: unknown array", hint=f"use {', '.join(names)}")
        return {name: received[name] for name in names if name in received}, terms.model_validate(said)
    except ValidationError as error:
        first = error.errors()[0]
        where = str(first["loc"][0])[:64] if first["loc"] else "body"
        raise ProblemError(f"{where}: {first['msg']}"[:500]) from None


def _rectangular(name: str, rows: list[Any]) -> np.ndarray:
    if name == "matrix":
        rows = [[math.inf if cost is None else cost for cost in row] for row in rows]
    try:
        return np.array(rows, dtype=np.float64)
    except ValueError:
        raise ProblemError(f"{name}: received rows of different lengths") from None


def _write(answer: dict[str, Any], certificate: Certificate, kind: str) -> bytes:
    if kind == NPZ:
        return write_npz(answer | {"certificate": np.array(json.dumps(certificate.as_dict()))})
    listed: dict[str, Any] = {name: _listed(value) for name, value in answer.items()}
    return json.dumps(listed | {"certificate": certificate.as_dict()}, allow_nan=False).encode()


def _listed(value: np.ndarray) -> Any:
    """Return an array as nested lists; JSON has no infinity, which the potential of a point without mass may be."""
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        return np.where(np.isfinite(value), value, None).tolist()  # type: ignore[call-overload]
    return value.tolist()


def _read_answer(body: bytes) -> tuple[dict[str, Any], Certificate]:
    answer: dict[str, Any] = dict(read_npz(body, limit=len(body)))
    return answer, _certificate(json.loads(str(answer.pop("certificate"))))


def _read_listed(body: bytes) -> tuple[dict[str, Any], Certificate]:
    """Return the arrays and the certificate of a JSON response."""
    answer: dict[str, Any] = json.loads(body)
    certificate = _certificate(answer.pop("certificate"))
    whole = ("shape", "assignment", "rows", "columns")
    kinds = {name: np.int64 if name in whole else np.float64 for name in answer}
    return {name: np.array(value, kinds[name]) for name, value in answer.items()}, certificate


def _certificate(stated: dict[str, Any]) -> Certificate:
    return Certificate(**{field.name: stated[field.name] for field in fields(Certificate)})
