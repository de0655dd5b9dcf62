"""Watchdog of workers: publishes the position of each in the Ray cluster, for workers that hang or die.

Must not import torch: Ray Train's controller imports this module.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import FrameType
from typing import Any

import psutil
import ray
from ray.experimental import internal_kv

from pipelines.training.position import Position

EVERY = 1.0
"""Seconds between samples of a worker's main thread."""

IDLE = 0.05
"""Maximum fraction of a CPU at which a process counts as idle."""

FRAMES = 10
"""Number of innermost stack frames to keep."""

STUCK = 70
"""Exit status of a worker that hangs."""

_NAMESPACE = b"monge-watch"

log = logging.getLogger(__name__)


class Watch:
    """Publishes the position and the Python stack of the thread that enters it, and ends a process that hangs.

    A process hangs if its position has not changed for ``deadline`` seconds and it used almost no CPU time, for example
    in a deadlock or a blocking read. Since a thread cannot be woken from outside, the process exits, and Ray Train
    restarts the workers. Ranks that wait for each other have a shorter deadline, which expires first.

    Args:
        position: position of this rank, updated during training.
        rank: rank of this worker.
        deadline: seconds without progress before the process exits.
        publish: function that publishes a sample; by default to Ray's key-value store.
        end: function that ends the process.
    """

    def __init__(
        self,
        position: Position,
        rank: int,
        deadline: float,
        publish: Callable[[int, dict[str, Any]], None] | None = None,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._position, self._rank, self._deadline = position, rank, deadline
        self._publish, self._end = publish or _put, end
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="watch", daemon=True)
        self._watched = 0

    def __enter__(self) -> Watch:
        self._watched = threading.get_ident()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=5 * EVERY)

    def _look_on(self) -> None:
        process = psutil.Process()
        since, used, last = time.monotonic(), _seconds(process), (0, "")
        while not self._over.wait(EVERY):
            now, place = time.monotonic(), (self._position.step, self._position.doing)
            late = now - since > self._deadline
            hangs = late and place == last and _seconds(process) - used <= IDLE * (now - since)
            if place != last or (late and not hangs):
                since, used, last = now, _seconds(process), place
            stack = _stack(sys._current_frames().get(self._watched))
            seen = {"at": time.time(), "step": place[0], "doing": place[1], "stack": stack, "hangs": hangs}
            try:
                self._publish(self._rank, seen)
            except Exception as error:  # the head of the cluster is unreachable: try again at the next sample
                log.debug("cannot publish the position of this rank: %s", error)
            if hangs:
                log.error("no progress for %.0f s %s; exiting", now - since, _where(seen))
                faulthandler.dump_traceback(sys.__stderr__ or 2)
                self._end(STUCK)
                return


def positions() -> list[str]:
    """Return and delete the known positions of all ranks of this Ray job, as log lines."""
    with suppress(Exception):  # the head may be unreachable; the error of the training matters more
        found = sorted(_take(), key=lambda one: one[0])
        return [line for rank, seen in found for line in _lines(rank, seen)]
    return []


def _lines(rank: int, seen: dict[str, Any]) -> Iterator[str]:
    silent = max(0.0, time.time() - seen["at"])
    hung = ", where it hung" if seen["hangs"] else ""
    yield f"rank {rank} was {_where(seen)}{hung}, seen {silent:.0f} s ago"
    yield from (f"    {line}" for line in seen["stack"].splitlines())


def _where(seen: dict[str, Any]) -> str:
    return f"after step {seen['step']}, {seen['doing']}"


def _stack(frame: FrameType | None) -> str:
    """Return the innermost frames of a stack, the innermost first, one per line."""
    frames = traceback.extract_stack(frame)[: -FRAMES - 1 : -1] if frame else []
    return "\n".join(f"{one.filename}:{one.lineno} {one.name}" for one in frames)


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _prefix() -> bytes:
    return f"{ray.get_runtime_context().get_job_id()}/".encode()


def _put(rank: int, seen: dict[str, Any]) -> None:
    if not ray.is_initialized():  # querying the job id would start a cluster
        return
    internal_kv._internal_kv_put(_prefix() + str(rank).encode(), json.dumps(seen).encode(), namespace=_NAMESPACE)


def _take() -> Iterator[tuple[int, dict[str, Any]]]:
    for key in internal_kv._internal_kv_list(_prefix(), namespace=_NAMESPACE):
        if value := internal_kv._internal_kv_get(key, namespace=_NAMESPACE):
            yield int(key.rpartition(b"/")[2]), json.loads(value)
        internal_kv._internal_kv_del(key, namespace=_NAMESPACE)
