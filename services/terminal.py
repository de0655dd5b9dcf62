"""Terminal output of commands."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.table import Table

LONGEST_LINE = 160
"""Width of a table in columns if the output is not a terminal."""

OnProgress = Callable[[int, int], None]
"""Called with the work done so far and the total work."""

console = Console()
errors = Console(stderr=True)


def say(text: str) -> None:
    """Print a line without wrapping, so that commands in it can be copied."""
    console.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)


def show_table(table: Table) -> None:
    """Print a table as wide as the terminal; if the output is not a terminal, print each row on one line."""
    wide = console if console.is_terminal else Console(file=console.file, width=LONGEST_LINE)
    wide.print(table)
