"""What the service refuses."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Bounds on what the service takes in, so that no client can take its memory or all of its time.

    Attributes:
        points: most points on one side of a problem.
        input_bytes: most bytes of one problem's points, costs and weights.
        queue: most problems that wait.
        queue_per_client: most of them of one client.
        queued_bytes: most bytes of all problems that wait, shares of global problems included.
        cache_bytes: bytes of plans kept for repeated problems; 0 keeps none.
        kept_bytes: most bytes of global plans that are kept for ranks whose answer may have been lost.
        world: most ranks of one job.
        deadline: most seconds that a share may wait for the others.
        json_bytes: most bytes of a JSON request, which takes ten times as much memory once parsed.
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
