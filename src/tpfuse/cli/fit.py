"""Tables that fit the console: wrapped between words where that is enough, else as text, a paragraph a row."""

from __future__ import annotations

from collections.abc import Iterable

from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_BORDERS = 3  # of a column, and one more at the end


def show(console: Console, table: Table) -> None:
    """Print a table without ever breaking a word: names are there to be read and copied."""
    columns = [[_text(column.header), *map(_text, column.cells)] for column in table.columns]
    least = [max(_lengths(word for cell in cells for word in cell.plain.split())) for cells in columns]
    widths = [max(_lengths(cell.plain for cell in cells)) for cells in columns]
    room = console.width - _BORDERS * len(columns) - 1
    if sum(least) > room:
        _paragraphs(console, table, columns)
        return
    while sum(widths) > room:
        most = max(range(len(widths)), key=lambda i: widths[i] - least[i])
        widths[most] -= 1
    for column, width in zip(table.columns, widths, strict=True):
        column.width = width
    console.print(table, highlight=False)


def _paragraphs(console: Console, table: Table, columns: list[list[Text]]) -> None:
    """The first cell as a heading, below it the others behind their columns' names, as many on a line as fit."""
    if table.title:
        console.print(f"[bold]{table.title}[/bold]", highlight=False)
    (_, *headings), *others = columns
    for i, heading in enumerate(headings, 1):
        if heading.plain:
            console.print(heading)
        lines: list[Text] = []
        for name, cell in ((cells[0].plain, cells[i]) for cells in others if cells[i].plain):
            told = Text.assemble((f"{name}: " if name else "", "dim"), cell)
            if lines and lines[-1].cell_len + told.cell_len + 4 <= console.width:
                lines[-1] = Text("  ").join([lines[-1], told])
            else:
                lines.append(told)
        for line in lines:
            console.print(Padding(line, (0, 0, 0, 2)), highlight=False)


def _text(cell: object) -> Text:
    return Text.from_markup(str(cell))


def _lengths(texts: Iterable[str]) -> list[int]:
    return [0, *map(cell_len, texts)]
