"""Autoscaling of replicas: a policy that decides, and a thread that applies the decisions.

Spare replicas solve problems but hold no meetings: the ranks of a job must meet at one replica, so only the permanent
replicas hold meetings. Clients learn of a spare replica only after it responds.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from pipelines.errors import ServiceError
from services.transport.actor import RESOURCE, SPARE, create, handle, stop_replicas, wait_for

LOOKING = 1.0
"""Seconds between checks of the replicas."""

REPORTING = 5.0
"""Timeout of a replica's load report in seconds; a replica without a report is skipped."""

STARTING = 60.0
"""Time limit for the start of a spare replica in seconds."""

LEAVING = 60.0
"""Time limit for a spare replica to finish its work in seconds."""


@dataclass
class Policy:
    """Scaling policy.

    Attributes:
        most: maximum number of spare replicas.
        crowd: number of problems per replica, waiting or being solved, at which a replica is added.
        quiet: seconds without problems after which a spare replica is removed.
    """

    most: int
    crowd: float = 4.0
    quiet: float = 60.0
    _quiet_since: float | None = field(default=None, init=False)

    def decide(self, loads: Sequence[int], spares: int, now: float) -> int:
        """Return the number of replicas to add: 1, 0 or −1.

        Args:
            loads: load of each replica that responds.
            spares: number of spare replicas.
            now: time in seconds on a monotonic clock.
        """
        if sum(loads):
            self._quiet_since = None
            return int(sum(loads) >= self.crowd * len(loads) and spares < self.most)
        if self._quiet_since is None:
            self._quiet_since = now
        if spares == 0 or now - self._quiet_since < self.quiet:
            return 0
        self._quiet_since = now
        return -1


class Scaler:
    """Checks the replicas periodically, and adds or removes spare ones within the resources of the nodes.

    Args:
        permanent: names of the permanent replicas.
        policy: scaling policy.
        resource: amount of the ``transport`` resource of a spare replica.
        publish: called with the names of the spare replicas when they change.
        looking: seconds between checks.
    """

    def __init__(
        self,
        permanent: Sequence[str],
        policy: Policy,
        resource: float,
        publish: Callable[[list[str]], None],
        looking: float = LOOKING,
    ) -> None:
        self._permanent, self._policy, self._resource = list(permanent), policy, resource
        self._publish, self._looking = publish, looking
        self._spares: list[str] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scaling", daemon=True)

    def __enter__(self) -> Scaler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(STARTING + REPORTING)
        stop_replicas(self._spares)

    def _run(self) -> None:
        while not self._stopped.wait(self._looking):
            # An error of a restarting replica must not stop the checks of the others.
            with contextlib.suppress(RayError, ServiceError):
                self._look()

    def _look(self) -> None:
        loads = _answers([*self._permanent, *self._spares], "load")
        change = self._policy.decide(loads, len(self._spares), time.monotonic()) if loads else 0
        if change > 0 and ray.available_resources().get(RESOURCE, 0.0) >= self._resource:
            self._add()
        elif change < 0:
            self._end()
        # At each check: a restarted replica has lost the list.
        _answers(self._permanent, "publish", self._spares)

    def _add(self) -> None:
        name = next(name for k in range(len(self._spares) + 1) if (name := f"{SPARE}-{k}") not in self._spares)
        actor = create(name, self._resource)
        fault = wait_for(actor, time.monotonic() + STARTING)
        if fault is not None:
            stop_replicas([name])
            return
        self._spares.append(name)
        self._publish(list(self._spares))

    def _end(self) -> None:
        name = self._spares.pop()
        self._publish(list(self._spares))
        _answers(self._permanent, "publish", self._spares)
        until = time.monotonic() + LEAVING
        while any(_answers([name], "load")) and time.monotonic() < until and not self._stopped.wait(0.1):
            pass
        stop_replicas([name])


def _answers(names: Sequence[str], method: str, *arguments: Any) -> list[Any]:
    """Return the responses of the replicas that respond."""
    answers = []
    for name in names:
        with contextlib.suppress(RayError, ServiceError):
            answers.append(ray.get(getattr(handle(name), method).remote(*arguments), timeout=REPORTING))
    return answers
