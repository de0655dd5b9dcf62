"""More replicas while there is a crowd: a policy that decides, and a thread that does what it says.

Spare replicas take problems of their own, never shares: the ranks of a job must meet at one place, so that the replicas
of the service's start alone hold meetings. Clients hear of a spare one only when it answers.
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
"""Seconds from one look at the replicas to the next."""

REPORTING = 5.0
"""Seconds for a replica to tell its load; one that does not is left out of that look."""

STARTING = 60.0
"""Seconds for a spare replica to come up."""

LEAVING = 60.0
"""Seconds for a spare replica to finish what it has."""


@dataclass
class Policy:
    """When a replica is added and when one goes.

    Attributes:
        most: spare replicas at a time.
        crowd: problems for each replica, waiting or being solved, at which another one is wanted.
        quiet: seconds without any problem after which a spare replica goes.
    """

    most: int
    crowd: float = 4.0
    quiet: float = 60.0
    _quiet_since: float | None = field(default=None, init=False)

    def decide(self, loads: Sequence[int], spares: int, now: float) -> int:
        """How many replicas to add: 1, 0 or −1.

        Args:
            loads: of each replica that answers.
            spares: how many spare ones there are.
            now: seconds on any clock that only goes forward.
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
    """Looks at the replicas now and then, and adds or ends spare ones, as far as nodes offer the resource.

    Args:
        permanent: names of the replicas that stay.
        policy: decides.
        resource: how much of the ``transport`` resource a spare one takes.
        publish: hears the names of the spare ones whenever they change.
        looking: seconds between looks.
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
            # A replica that is restarting must not end the watch over the others.
            with contextlib.suppress(RayError, ServiceError):
                self._look()

    def _look(self) -> None:
        loads = _answers([*self._permanent, *self._spares], "load")
        change = self._policy.decide(loads, len(self._spares), time.monotonic()) if loads else 0
        if change > 0 and ray.available_resources().get(RESOURCE, 0.0) >= self._resource:
            self._add()
        elif change < 0:
            self._end()
        # Again at each look: a replica that restarted has forgotten.
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
    """What those replicas say that answer."""
    answers = []
    for name in names:
        with contextlib.suppress(RayError, ServiceError):
            answers.append(ray.get(getattr(handle(name), method).remote(*arguments), timeout=REPORTING))
    return answers
