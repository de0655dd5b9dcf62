"""Collectives, each the identity in a single process, and agreement of all ranks on an error.

If one rank fails, the others wait for it in the next collective. Within :func:`agree` they are interrupted, and all
ranks raise the same error.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from pipelines import errors
from pipelines.errors import MongeError, RankError

GRACE = 5.0
"""Seconds that a rank waits after a failure for the others to report that they are alive and to read the error."""

_FAILURE = "monge/failure"
_OPERATIONS = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}


def rank() -> int:
    """Rank of this process; 0 in a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 in a single process."""
    return dist.get_world_size() if dist.is_initialized() else 1


def block_share(count: int, block: int) -> slice:
    """This rank's part of ``count`` rows, in whole blocks if there are enough of them for every rank.

    Computations on whole blocks give bitwise the same results for any number of ranks.
    """
    world = world_size()
    block = max(1, min(block, -(-count // world)))
    blocks = -(-count // block)
    first, last = (blocks * number // world for number in (rank(), rank() + 1))
    return slice(min(first * block, count), min(last * block, count))


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Gather the rows of all ranks, in rank order, on every rank. Ranks may hold different numbers of rows.

    Args:
        rows: this rank's rows, (k, ...); all axes but the first are the same on every rank.

    Returns:
        The rows of all ranks, (sum of k, ...), without gradient.
    """
    rows = rows.detach().contiguous()
    if world_size() == 1:
        return rows
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(world_size())]
    _collective(dist.all_gather, counts, count)
    sizes = [int(c) for c in counts]
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    _collective(dist.all_gather, parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def gather_parts(count: int, block: int, make: Callable[[slice], Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """Compute tensors of ``count`` rows, each rank its :func:`block_share`, and gather them on every rank.

    Args:
        count: total number of rows, ≥ 1.
        block: number of rows computed at once.
        make: function that computes a slice of the rows of each tensor.
    """
    part = block_share(count, block)
    # A rank without a part still computes one row, to know the shape.
    made = make(slice(part.start, max(part.stop, part.start + 1)))
    return [gather_rows(rows[: part.stop - part.start]) for rows in made]


def gather_rows_with_gradient(rows: torch.Tensor) -> torch.Tensor:
    """Gather rows like :func:`gather_rows`, differentiable with respect to this rank's own rows.

    If every rank computes the same scalar from all rows, its gradient with respect to a parameter is the sum over ranks
    of the gradients through their own rows, which :func:`sum_gradients` computes.
    """
    gathered = gather_rows(rows)
    if world_size() == 1:
        return rows
    sizes = gather_rows(torch.tensor([len(rows)], device=rows.device)).tolist()
    start = sum(sizes[: rank()])
    return torch.cat([gathered[:start], rows, gathered[start + len(rows) :]])


def reduce_over_ranks(values: torch.Tensor, by: Literal["sum", "min", "max"]) -> torch.Tensor:
    """Reduce a tensor over ranks in place by sum, minimum or maximum, and return it."""
    if world_size() > 1:
        _collective(dist.all_reduce, values, _OPERATIONS[by])
    return values


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over ranks in place, and return it."""
    return reduce_over_ranks(values, "sum")


def from_first_rank(text: str) -> str:
    """Broadcast the text of rank 0 to every rank."""
    found = [text]
    if world_size() > 1:
        _collective(dist.broadcast_object_list, found, src=0)
    return found[0]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: torch.Tensor) -> torch.Tensor:
        return sum_over_ranks(values.clone())

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (gradient,) = gradients
        return sum_over_ranks(gradient.clone())


def sum_with_gradient(values: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over ranks; the backward pass sums the gradients of all ranks' losses."""
    return _Sum.apply(values) if world_size() > 1 else values  # type: ignore[no-untyped-call]


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sum the gradients over ranks, in one all-reduce.

    Losses are sums over the rank's samples divided by the size of the *global* batch, so the sum over ranks is the
    gradient of the global mean, for any number of ranks and any sizes of their shares.
    """
    gradients = []
    for parameter in parameters:
        if parameter.requires_grad:
            # A rank whose share did not use a parameter still takes part in the sum. A single process sets the zero
            # too, because optimizers skip parameters without a gradient but update those with a zero gradient.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    if world_size() == 1 or not gradients:
        return
    flat = torch._utils._flatten_dense_tensors(gradients)
    _collective(dist.all_reduce, flat)
    for gradient, total in zip(gradients, torch._utils._unflatten_dense_tensors(flat, gradients), strict=True):
        gradient.copy_(total)


@contextmanager
def agree(place: str) -> Iterator[None]:
    """Exit a block with the same outcome on every rank: success, or one error.

    If a rank raises an error, it publishes the error in the store of the process group and closes the group. Ranks that
    wait in a collective return at once (with NCCL, after the timeout of the group), read the error and raise it too.
    The deadline is the timeout of the group. After an error the group is closed, and the ranks must be restarted.
    Blocks may be nested; the innermost one sets the place in the message.

    Args:
        place: description of the block, as in "while {place}".

    Raises:
        MongeError: the first error of any rank, with the same type and message on all ranks.
        RankError: another rank failed with an error that is not a MongeError, was lost, or missed the deadline.
        Exception: this rank's own error that is not a MongeError.
    """
    try:
        yield
        if world_size() > 1:
            reduce_over_ranks(torch.zeros(1, device=_control_device()), "sum")
    except Exception as error:
        shared = _shared(place, error)
        if shared is error:
            raise
        raise shared from error


def _control_device() -> torch.device:
    """Device of the tensors of a barrier: the CPU if the backend of the group supports it."""
    return torch.device("cpu" if "cpu" in dist.get_backend_config() else "cuda")


def _collective(operation: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    try:
        operation(*arguments, **options)
    except RuntimeError as error:
        # Gloo's messages begin with a source location and end with advice.
        message = re.sub(r"^\[\S+\] ", "", str(error)).partition(". ")[0].partition("\n")[0]
        raise RankError(f"a collective failed: {message}") from error


def _shared(place: str, error: Exception) -> Exception:
    """The error that all ranks raise after one of them has failed."""
    if world_size() == 1:
        return error  # a single process, or an inner block has already shared the error
    me, others = rank(), [other for other in range(world_size()) if other != rank()]
    store = dist.distributed_c10d._get_default_store()
    try:
        store.set_timeout(timedelta(seconds=GRACE))
        if isinstance(error, RankError) and not store.check([_FAILURE]):
            others = _answering(store, others)
            error = _lost(place, error, others)
        # The return value confirms the write, so no rank sees the group closed before the error is published.
        first = json.loads(store.compare_set(_FAILURE, "", json.dumps(_document(place, error))))
        _close_group()
        if first["rank"] != me:
            error = _read(first, error)
        store.set(f"monge/read/{me}", "")
        if me == 0:  # this process may host the store
            _wait(lambda: store.check([f"monge/read/{other}" for other in others]))
    except RuntimeError as lost:
        _close_group()
        if isinstance(error, RankError):
            return RankError(f"rank 0 was lost while {place}: {lost}", hint="read the log of that worker")
    return error


def _answering(store: dist.Store, others: list[int]) -> list[int]:  # type: ignore[name-defined]
    """The other ranks whose collective also failed; a dead or busy rank does not report."""
    store.set(f"monge/alive/{rank()}", "")
    _wait(lambda: store.check([_FAILURE]) or store.check([f"monge/alive/{other}" for other in others]))
    return [other for other in others if store.check([f"monge/alive/{other}"])]


def _lost(place: str, error: RankError, answering: list[int]) -> RankError:
    silent = [str(other) for other in range(world_size()) if other not in (rank(), *answering)]
    who = f"rank{'s' * (len(silent) > 1)} {', '.join(silent)}" if silent else "a rank"
    return RankError(
        f"{who} was lost or came too late while {place}: {error.args[0]}",
        hint="read the workers' logs; slow ones need a larger MONGE_RANK_DEADLINE",
    )


def _document(place: str, error: Exception) -> dict[str, Any]:
    if isinstance(error, MongeError):
        return {"rank": rank(), "error": type(error).__name__, "message": error.args[0], "hint": error.hint}
    message = f"rank {rank()} failed while {place}: {type(error).__name__}: {error}"
    return {"rank": rank(), "error": "RankError", "message": message, "hint": "read the log of that worker"}


def _read(document: dict[str, Any], own: Exception) -> Exception:
    kind = getattr(errors, document["error"], RankError)
    if type(own) is kind and own.args[0] == document["message"]:
        return own
    return kind(document["message"], hint=document["hint"])


def _close_group() -> None:
    if not dist.is_initialized():
        return
    with suppress(RuntimeError):
        if "nccl" in dist.get_backend_config():
            # A communicator with work in flight cannot be destroyed, only aborted.
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()


def _wait(condition: Callable[[], bool]) -> None:
    """Wait for a condition, for at most :data:`GRACE` seconds."""
    deadline = time.monotonic() + GRACE
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
