"""How workers hear that they are to stop at their next step: from their job's driver, or because their node leaves.

The driver tells them through the key-value store of the Ray cluster.
"""

from __future__ import annotations

import logging
import threading
from contextlib import suppress

import ray
from ray._private.state import state as cluster
from ray.experimental import internal_kv

POLLING = 0.5
"""Seconds between two looks of a worker."""

LISTENS, ASKED = b"listens", b"asked"

_NAMESPACE = b"monge-stop"

log = logging.getLogger(__name__)


def ask_to_stop() -> bool:
    """Ask the workers of this Ray job to save a checkpoint at their next step, and to stop.

    Returns:
        Whether they train, and so will hear of it.
    """
    if not ray.is_initialized() or _read() != LISTENS:
        return False
    _write(ASKED)
    return True


class StopRequest:
    """Whether this worker was asked to stop, by its driver or because its node is to be taken away.

    Args:
        first: whether it is the one that tells the driver, on entering, that the workers train, and on leaving that
            they do no more.
    """

    def __init__(self, first: bool) -> None:
        self._first = first
        self.asked = False
        """Whether the run is to stop."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="stop request", daemon=True)

    def __enter__(self) -> StopRequest:
        if self._first and _read() != ASKED:  # which may be meant for workers that died meanwhile
            _write(LISTENS)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=5 * POLLING)
        with suppress(Exception):  # the head may be away; what ended the training matters more
            if self._first and (kind is None or _read() != ASKED):
                _write(b"")

    def _poll(self) -> None:
        while not self.asked and not self._over.wait(POLLING):
            try:
                self.asked = (self._first and _read() == ASKED) or node_leaves()
            except Exception as error:  # the head of the cluster is unreachable: a later look may reach it
                log.debug("cannot ask whether to stop: %s", error)


def node_leaves() -> bool:
    """Whether the cluster is about to lose the node of this process, as a cloud says before it takes one away."""
    return ray.get_runtime_context().get_node_id() in cluster.get_draining_nodes()


def _key() -> bytes:
    return str(ray.get_runtime_context().get_job_id()).encode()


def _read() -> bytes:
    return bytes(internal_kv._internal_kv_get(_key(), namespace=_NAMESPACE) or b"")


def _write(value: bytes) -> None:
    internal_kv._internal_kv_put(_key(), value, namespace=_NAMESPACE)
