"""A built package contains the example specs and the ``py.typed`` files."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
from pathlib import Path
from services import examples
print(examples.__file__, *examples.copy(Path("here")))
"""
NEEDED = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE")


def test_a_built_package_finds_its_example_specs(tmp_path: Path) -> None:
    source, built = tmp_path / "source", tmp_path / "built"
    for folder in ("pipelines", "services", "configs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in NEEDED:
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(built)]
    subprocess.run(build, cwd=source, check=True, capture_output=True, text=True)
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=built,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert Path(found[0]).is_relative_to(built)
    assert all((built / package / "py.typed").is_file() for package in ("pipelines", "services"))
    assert [Path(name).name for name in found[1:]] == sorted(file.name for file in (ROOT / "configs").glob("*.yaml"))
