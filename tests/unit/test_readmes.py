"""The READMEs are correct about settings, files and links."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
import yaml

from services.settings import Settings

ROOT = Path(__file__).parents[2]
READMES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        ROOT / "pipelines/README.md",
        *ROOT.glob("services/*/README.md"),
        *ROOT.glob("infra/*/README.md"),
    ]
)
SERVICES = ("jobs", "platform", "serving", "sharding", "storage", "tracking", "training", "transport", "tuning")
OF_MONGE_UP = "of `monge up`"
OF_HOME = {
    "STORAGE": "the home folder",
    "SHARD_CACHE": "`cache/shards` of the home",
    "TOKEN": "`token` in the home folder",
    "MLFLOW_PUBLIC_URI": "`MONGE_MLFLOW_URI`",
    "JOBS_STORE": "SQLite in the home folder",
    "JOB_PYTHON": "`python` of the cluster",
}
"""Text for a setting without value, unless the default is the address of the platform in the home folder."""
OF_BOTO3 = "of boto3"
"""Default of settings that boto3 reads from its own variables and files."""


@pytest.fixture(params=READMES, ids=lambda path: str(path.relative_to(ROOT)))
def readme(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_teaches_itself_briefly(service: str) -> None:
    assert 40 <= len((ROOT / "services" / service / "README.md").read_text().splitlines()) <= 110


@pytest.mark.parametrize("service", SERVICES)
def test_settings_have_the_defaults_that_are_told(service: str) -> None:
    text = (ROOT / "services" / service / "README.md").read_text()
    rows = re.findall(r"^\| `MONGE_(\w+)` \| (.*?) \| .* \|$", text, flags=re.MULTILINE)
    assert rows
    for name, told in rows:
        default = Settings.model_fields[name.lower()].default
        unset = OF_BOTO3 if name.startswith("S3_") else OF_MONGE_UP
        assert told == (OF_HOME.get(name, unset) if default is None else str(default)), name


def test_variables_exist(readme: Path) -> None:
    for name in re.findall(r"\bMONGE_([A-Z_]+)\b", readme.read_text()):
        assert name.lower() in Settings.model_fields, name


def test_links_lead_somewhere(readme: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", readme.read_text()):
        assert (readme.parent / target).exists(), target


def test_python_is_python_and_imports_what_exists(readme: Path) -> None:
    for block in _blocks(readme, "python"):
        for statement in ast.walk(ast.parse(block)):
            if isinstance(statement, ast.ImportFrom) and str(statement.module).startswith(("pipelines", "services")):
                defined = vars(importlib.import_module(str(statement.module)))
                assert {alias.name for alias in statement.names} <= set(defined), statement.module


def test_yaml_is_yaml(readme: Path) -> None:
    for block in _blocks(readme, "yaml"):
        assert isinstance(yaml.safe_load(block), dict)


def test_the_map_of_the_house_is_complete() -> None:
    house, layout = _blocks(ROOT / "CONTRIBUTING.md", "")
    assert _drawn(house, "pipelines/") == _parts("pipelines")
    # A folder without a module of its own is not a room yet.
    assert _drawn(house, "services/") == _parts("services")
    for folder in ("configs/", "docs/", "benchmarks/", "infra/", ".ci/"):
        assert f"\n{folder}" in house
        assert (ROOT / folder).is_dir()
    tests = {f"{path.name}/" for path in (ROOT / "tests").iterdir() if any(path.rglob("test_*.py"))}
    assert _drawn(layout, "tests/") >= tests


def _blocks(path: Path, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [block for name, block in fenced if name == language]


def _drawn(house: str, room: str) -> set[str]:
    """Return the indented names below a folder in the overview."""
    below = house.split(f"{room} ", 1)[1].splitlines()[1:]
    names = set()
    for line in below:
        if not line.startswith("  "):
            break
        names.add(line.split()[0])
    return names


def _parts(package: str) -> set[str]:
    """Return the modules and non-empty folders of a package."""
    found = set()
    for path in (ROOT / package).iterdir():
        if path.suffix == ".py" and path.name != "__init__.py":
            found.add(path.name)
        elif path.is_dir() and any(file.stat().st_size for file in path.rglob("*.py")):
            found.add(f"{path.name}/")
    return found
