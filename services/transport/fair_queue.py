"""A queue in which clients take turns."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """First in, first out for each client; clients take turns."""

    def __init__(self) -> None:
        self._lanes: OrderedDict[str, deque[Item]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def waiting(self, client: str) -> int:
        """Return the number of waiting items of a client."""
        return len(self._lanes.get(client, ()))

    def put(self, client: str, item: Item) -> None:
        """Add an item after the client's other items."""
        self._lanes.setdefault(client, deque()).append(item)
        self._length += 1

    def peek(self) -> Item:
        """Return the item that :meth:`take` would return.

        Raises:
            StopIteration: the queue is empty.
        """
        return next(iter(self._lanes.values()))[0]

    def take(self) -> Item:
        """Remove and return the oldest item of the client whose turn it is.

        Raises:
            KeyError: the queue is empty.
        """
        client, lane = self._lanes.popitem(last=False)
        item = lane.popleft()
        self._length -= 1
        if lane:
            self._lanes[client] = lane
        return item

    def remove(self, client: str, item: Item) -> bool:
        """Remove an item; return whether it was in the queue."""
        lane = self._lanes.get(client, deque())
        if item not in lane:
            return False
        lane.remove(item)
        self._length -= 1
        if not lane:
            del self._lanes[client]
        return True
