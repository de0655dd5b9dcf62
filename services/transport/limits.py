"""Limits of the transport service."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Limits on requests, so that no client can exhaust the memory or the solver time of the service.

    Attributes:
        points: maximum number of points on one side of a problem.
        input_bytes: maximum size of the points, costs and weights of a problem, in bytes.
        queue: maximum number of waiting problems.
        queue_per_client: maximum number of waiting problems per client.
        queued_bytes: maximum size of all waiting problems in bytes, including shares of global problems.
        cache_bytes: size of the plan cache in bytes; 0 disables it.
        kept_bytes: maximum size in bytes of global plans kept for ranks that may repeat a lost call.
        world: maximum number of ranks of a job.
        deadline: maximum time that a share waits for the others, in seconds.
        json_bytes: maximum size of a JSON request in bytes; parsing takes ten times as much memory.
    """

    points: int = 16_384
    input_bytes: int = 256 * MIB
    queue: int = 256
    queue_per_client: int = 64
    queued_bytes: int = 1024 * MIB
    cache_bytes: int = 128 * MIB
    kept_bytes: int = 128 * MIB
    world: int = 1024
    deadline: float = 3600.0
    json_bytes: int = 8 * MIB
