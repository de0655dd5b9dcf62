"""Fixtures of the tuning tests."""

from tests.services.tracking.stores import empty_store, uri

__all__ = ["empty_store", "uri"]
