"""Tables in text, by rich: as wide as they need to be, plain wherever the output is no terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import StringIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def render(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> str:
    """A table as text. A column whose name starts with ">" is aligned to the right."""
    table = Table(box=SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.lstrip(">"), justify="right" if right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    text = StringIO()
    Console(file=text, width=200, markup=False, highlight=False, emoji=False).print(table)
    lines = (line.rstrip() for line in text.getvalue().splitlines())
    return "\n".join(lines).strip("\n")
