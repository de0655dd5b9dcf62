"""An installation without extras imports only what it installs."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions, requires
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipelines", "services")


def normalised(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def test_every_import_is_a_dependency_or_comes_with_one() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    direct = {normalised(requirement) for requirement in declared}
    installed = direct | {
        normalised(requirement)
        for name in direct
        for requirement in requires(name) or []
        if "extra ==" not in requirement
    }
    distributions = packages_distributions()
    missing = {
        f"{file.relative_to(ROOT)} imports {module}"
        for package in PACKAGES
        for file in (ROOT / package).rglob("*.py")
        for module in imported(file)
        if module not in sys.stdlib_module_names
        and module not in PACKAGES
        and not {normalised(name) for name in distributions.get(module, [])} & installed
    }
    assert missing == set()
