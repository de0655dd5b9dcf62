"""Loss curves are those on file; see ``curves.py`` for how to rewrite them."""

from pathlib import Path

import pytest
from curves import FOLDER, KINDS, curves, dataset

TOLERANCE = 1e-5
"""Relative difference between two CPUs that is rounding: kernels for SSE, AVX2 and AVX-512 were seen to differ by 2e-7
at most. On one machine the curves are the same bit for bit; ``unit/training`` holds them to that."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_curve_is_the_one_on_file(tmp_path: Path, kind: str) -> None:
    found = curves(kind, dataset(kind, tmp_path)).splitlines()
    kept = (FOLDER / f"{kind}.txt").read_text().splitlines()
    assert len(found) == len(kept) == 13
    for line, expected in zip(found, kept, strict=True):
        assert _words(line) == _words(expected)
        assert _numbers(line) == pytest.approx(_numbers(expected), rel=TOLERANCE), f"{line}\nis not\n{expected}"


def _words(line: str) -> list[str]:
    return [word for word in line.split() if not _is_number(word)]


def _numbers(line: str) -> list[float]:
    return [float(word) for word in line.split() if _is_number(word)]


def _is_number(word: str) -> bool:
    return word.replace(".", "", 1).replace("e-", "", 1).isdigit()
