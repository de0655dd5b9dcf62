"""How a model is named: ``NAME`` (the version under the alias ``live``), ``NAME@ALIAS`` or ``NAME/VERSION``."""

from __future__ import annotations

import re

from pipelines.errors import ModelNotFoundError

LIVE = "live"
"""The alias that a bare name stands for."""

_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]{0,127})(?:@(?P<alias>[\w-]{1,64})|/(?P<version>[0-9]{1,9}))?")


def split_name(model: str) -> tuple[str, str | None, int | None]:
    """``NAME``, ``NAME@ALIAS`` or ``NAME/VERSION`` as (name, alias, version); a bare name has the alias ``live``.

    Raises:
        ModelNotFoundError: it is none of these.
    """
    match = _NAME.fullmatch(model)
    if match is None:
        raise ModelNotFoundError(
            f"{model!r} cannot name a model", hint="write NAME, NAME@ALIAS or NAME/VERSION, as in cats@live"
        )
    version = int(match["version"]) if match["version"] else None
    return match["name"], None if version is not None else match["alias"] or LIVE, version
