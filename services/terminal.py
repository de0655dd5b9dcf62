"""What commands write on a terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.table import Table

LONGEST_LINE = 160
"""Columns of a table that is no terminal's: for another program to read."""

OnProgress = Callable[[int, int], None]
"""Called with the work done so far and the work in all."""

console = Console()
errors = Console(stderr=True)


def say(text: str) -> None:
    """Print a line whole: commands in it are there to be copied."""
    console.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)


def show_table(table: Table) -> None:
    """Print a table: as wide as the terminal, or wide enough for another program to find a row in one line."""
    wide = console if console.is_terminal else Console(file=console.file, width=LONGEST_LINE)
    wide.print(table)
