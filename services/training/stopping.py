"""Stop requests to workers, from the job's driver or because a node is draining.

The driver sends requests through the key-value store of the Ray cluster.
"""

from __future__ import annotations

import logging
import threading
from contextlib import suppress

import ray
from ray._private.state import state as cluster
from ray.experimental import internal_kv

POLLING = 0.5
"""Polling interval of a worker in seconds."""

LISTENS, ASKED = b"listens", b"asked"

_NAMESPACE = b"monge-stop"

log = logging.getLogger(__name__)


def ask_to_stop() -> bool:
    """Ask the workers of this Ray job to save a checkpoint and stop after their next step.

    Returns:
        Whether the workers are training and will receive the request.
    """
    if not ray.is_initialized() or _read() != LISTENS:
        return False
    _write(ASKED)
    return True


class StopRequest:
    """A request to stop this worker, from its driver or because its node is draining.

    Args:
        first: whether this worker reports to the driver, on entering and on leaving, whether the workers train.
    """

    def __init__(self, first: bool) -> None:
        self._first = first
        self.asked = False
        """Whether the run must stop."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="stop request", daemon=True)

    def __enter__(self) -> StopRequest:
        if self._first and _read() != ASKED:  # which may be for earlier workers
            _write(LISTENS)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=5 * POLLING)
        with suppress(Exception):  # the head may be unreachable; the error of the training matters more
            if self._first and (kind is None or _read() != ASKED):
                _write(b"")

    def _poll(self) -> None:
        while not self.asked and not self._over.wait(POLLING):
            try:
                self.asked = (self._first and _read() == ASKED) or node_leaves()
            except Exception as error:  # the head of the cluster is unreachable: try again at the next poll
                log.debug("cannot poll for a stop request: %s", error)


def node_leaves() -> bool:
    """Return whether the cluster is draining the node of this process, for example before a cloud reclaims it."""
    return ray.get_runtime_context().get_node_id() in cluster.get_draining_nodes()


def _key() -> bytes:
    return str(ray.get_runtime_context().get_job_id()).encode()


def _read() -> bytes:
    return bytes(internal_kv._internal_kv_get(_key(), namespace=_NAMESPACE) or b"")


def _write(value: bytes) -> None:
    internal_kv._internal_kv_put(_key(), value, namespace=_NAMESPACE)
