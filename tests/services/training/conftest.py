"""Fixtures of tests that need an MLflow store."""

from tests.services.tracking.stores import empty_store, uri

__all__ = ["empty_store", "uri"]
