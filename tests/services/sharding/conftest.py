from __future__ import annotations

from tests.services.storage.conftest import keys, moto_port, server, settings

__all__ = ["keys", "moto_port", "server", "settings"]
