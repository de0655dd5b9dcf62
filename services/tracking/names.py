"""Model references: ``NAME`` (the version under the alias ``live``), ``NAME@ALIAS`` or ``NAME/VERSION``."""

from __future__ import annotations

import re

from pipelines.errors import ModelNotFoundError

LIVE = "live"
"""Alias that a bare name refers to."""

_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]{0,127})(?:@(?P<alias>[\w-]{1,64})|/(?P<version>[0-9]{1,9}))?")


def split_name(model: str) -> tuple[str, str | None, int | None]:
    """Split ``NAME``, ``NAME@ALIAS`` or ``NAME/VERSION`` into (name, alias, version); ``NAME`` has the alias ``live``.

    Raises:
        ModelNotFoundError: the reference is invalid.
    """
    match = _NAME.fullmatch(model)
    if match is None:
        raise ModelNotFoundError(
            f"{model!r} is not a valid model reference", hint="use NAME, NAME@ALIAS or NAME/VERSION, such as cats@live"
        )
    version = int(match["version"]) if match["version"] else None
    return match["name"], None if version is not None else match["alias"] or LIVE, version
