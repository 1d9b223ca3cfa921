"""Numbers and tables for people: plain text, aligned, no boxes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")


def short_bytes(count: float) -> str:
    """Bytes in decimal units, three digits: ``269 MB``."""
    value = float(count)
    for unit in _BYTE_UNITS[:-1]:
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} {_BYTE_UNITS[-1]}"


def short_count(count: float) -> str:
    """A number of parameters, as model names write it: ``134.5M``, ``1.71B``."""
    for size, letter, digits in ((1e9, "B", 2), (1e6, "M", 1), (1e3, "k", 1)):
        if count >= size:
            return f"{count / size:.{digits}f}{letter}"
    return str(int(count))


def pairs_table(rows: Iterable[tuple[str, str]]) -> Table:
    """Two columns: what, and its value."""
    table = _grid()
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(name, value)
    return table


def columns_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A named column on the left and right-aligned columns of numbers."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="bold")
    table.add_column(header[0], style="dim", no_wrap=True)
    for name in header[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _grid() -> Table:
    from rich.table import Table

    return Table.grid(padding=(0, 3, 0, 0))
