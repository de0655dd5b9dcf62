"""The example job specs of ``configs/``, in a checkout or next to the installed package."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipelines.errors import SpecError

_INSTALLED = Path(__file__).parent / "configs"
_CHECKOUT = Path(__file__).parents[1] / "configs"


def folder() -> Path:
    """Return the folder of the example specs. ``setup.py`` copies them into wheels."""
    return _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT


def copy(target: Path, overwrite: bool = False) -> list[Path]:
    """Copy the example specs and their JSON schema into a folder.

    Args:
        target: target folder, created if it does not exist.
        overwrite: whether to replace files that differ.

    Returns:
        The copied specs, sorted; the schema is not included.

    Raises:
        SpecError: a file in ``target`` differs from the example of the same name. No file is copied.
    """
    found = sorted([*folder().glob("*.yaml"), *folder().glob("*.json")])
    if not overwrite:
        changed = [file.name for file in found if _differs(file, target / file.name)]
        if changed:
            raise SpecError(
                f"{target} contains different versions of: {', '.join(changed)}",
                hint="use another folder, or add --overwrite",
            )
    target.mkdir(parents=True, exist_ok=True)
    copied = [Path(shutil.copyfile(file, target / file.name)) for file in found]
    return [file for file in copied if file.suffix == ".yaml"]


def _differs(file: Path, target: Path) -> bool:
    return target.exists() and target.read_bytes() != file.read_bytes()
