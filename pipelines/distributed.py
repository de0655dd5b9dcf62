"""The few collectives that Monge needs, each the identity in a process of its own, and how ranks agree on an error.

A rank that fails alone leaves the others waiting for it in the next collective. Within :func:`agree` they are woken,
and all ranks raise the same error.
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
"""Seconds that a rank waits for the others once something has failed: to say that they are alive, to read the error."""

_FAILURE = "monge/failure"
_OPERATIONS = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}


def rank() -> int:
    """This process's rank, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of ranks, 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def block_share(count: int, block: int) -> slice:
    """This rank's part of ``count`` rows, in whole blocks where there are enough of them for every rank.

    Work that is done block by block then gives the same bits in any world.
    """
    world = world_size()
    block = max(1, min(block, -(-count // world)))
    blocks = -(-count // block)
    first, last = (blocks * number // world for number in (rank(), rank() + 1))
    return slice(min(first * block, count), min(last * block, count))


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """All ranks' rows, in rank order, on every rank. Ranks may hold different numbers of rows.

    Args:
        rows: this rank's (k, ...) tensor, equal between ranks past its first axis.

    Returns:
        (sum of k, ...) tensor, without gradient.
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
    """Tensors of ``count`` rows, of which each rank makes its :func:`block_share`; every rank gets them whole.

    Args:
        count: rows in all, ≥ 1.
        block: rows that are made at once.
        make: the rows of a part, of each tensor.
    """
    part = block_share(count, block)
    # A rank without a part makes one row all the same: that tells the shape.
    made = make(slice(part.start, max(part.stop, part.start + 1)))
    return [gather_rows(rows[: part.stop - part.start]) for rows in made]


def gather_rows_with_gradient(rows: torch.Tensor) -> torch.Tensor:
    """All ranks' rows as :func:`gather_rows` gives them, differentiable in this rank's own.

    Where every rank computes the same number from all rows, its gradient in a parameter is the sum over ranks of the
    gradients that pass through their own rows: what :func:`sum_gradients` makes of them.
    """
    gathered = gather_rows(rows)
    if world_size() == 1:
        return rows
    sizes = gather_rows(torch.tensor([len(rows)], device=rows.device)).tolist()
    start = sum(sizes[: rank()])
    return torch.cat([gathered[:start], rows, gathered[start + len(rows) :]])


def reduce_over_ranks(values: torch.Tensor, by: Literal["sum", "min", "max"]) -> torch.Tensor:
    """The sum, minimum or maximum of a tensor over ranks, in place; returns it."""
    if world_size() > 1:
        _collective(dist.all_reduce, values, _OPERATIONS[by])
    return values


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over ranks, in place; returns it."""
    return reduce_over_ranks(values, "sum")


def from_first_rank(text: str) -> str:
    """Rank 0's text, on every rank."""
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
    """The sum of a tensor over ranks, differentiable: each rank's values get the gradients of all ranks' losses."""
    return _Sum.apply(values) if world_size() > 1 else values  # type: ignore[no-untyped-call]


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sum the gradients over ranks, in one message.

    Losses are sums over the rank's samples divided by the *global* batch, so that the sum over ranks is the gradient
    of the global mean, whatever the number of ranks and however unevenly they share the batch.
    """
    gradients = []
    for parameter in parameters:
        if parameter.requires_grad:
            # A rank whose share did not touch a parameter still takes part in the sum; and a process of its own does
            # the same, since optimizers pass over what has no gradient but still move what has one of zero.
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
    """Leave a block together: with success on every rank, or with one error on every rank.

    An error of one rank is published in the process group's store, and the group is closed: ranks that wait in a
    collective wake at once (with NCCL, when their group's timeout has passed), read it and raise it too. The deadline
    is the group's timeout. After an error the group is gone, and the ranks are to be started again. Blocks may be
    nested; the innermost names the place.

    Args:
        place: what the block does, as in "while {place}".

    Raises:
        MongeError: the first error of any rank, of the same type and message on all of them.
        RankError: another rank failed with an error of another kind, was lost, or did not come within the deadline.
        Exception: this rank's own error of another kind.
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
    """Where tensors lie that are sent for the sake of meeting: on the CPU if the group can send from there."""
    return torch.device("cpu" if "cpu" in dist.get_backend_config() else "cuda")


def _collective(operation: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    try:
        operation(*arguments, **options)
    except RuntimeError as error:
        # Gloo's messages begin with a place in its source and end with advice.
        message = re.sub(r"^\[\S+\] ", "", str(error)).partition(". ")[0].partition("\n")[0]
        raise RankError(f"a collective failed: {message}") from error


def _shared(place: str, error: Exception) -> Exception:
    """The error that all ranks raise, once one of them has failed."""
    if world_size() == 1:
        return error  # alone; or a block within this one has shared it
    me, others = rank(), [other for other in range(world_size()) if other != rank()]
    store = dist.distributed_c10d._get_default_store()
    try:
        store.set_timeout(timedelta(seconds=GRACE))
        if isinstance(error, RankError) and not store.check([_FAILURE]):
            others = _answering(store, others)
            error = _lost(place, error, others)
        # The answer shows that it is written: nobody sees the group closed before.
        first = json.loads(store.compare_set(_FAILURE, "", json.dumps(_document(place, error))))
        _close_group()
        if first["rank"] != me:
            error = _read(first, error)
        store.set(f"monge/read/{me}", "")
        if me == 0:  # the store may end with this process
            _wait(lambda: store.check([f"monge/read/{other}" for other in others]))
    except RuntimeError as lost:
        _close_group()
        if isinstance(error, RankError):
            return RankError(f"rank 0 was lost while {place}: {lost}", hint="read the log of that worker")
    return error


def _answering(store: dist.Store, others: list[int]) -> list[int]:  # type: ignore[name-defined]
    """The other ranks whose collective failed as well; a rank that is dead, or busy elsewhere, does not answer."""
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
    """Wait for a condition, no longer than :data:`GRACE`."""
    deadline = time.monotonic() + GRACE
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
