"""The few collectives that Monge needs; each is the identity in a process of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist


def rank() -> int:
    """This process's rank, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of ranks, 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


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
    dist.all_gather(counts, count)
    sizes = [int(c) for c in counts]
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


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


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over ranks, in place; returns it."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


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
    return _Sum.apply(values) if world_size() > 1 else values


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
    dist.all_reduce(flat)
    for gradient, total in zip(gradients, torch._utils._unflatten_dense_tensors(flat, gradients), strict=True):
        gradient.copy_(total)
