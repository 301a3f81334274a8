"""Figures as a person reads them."""

from __future__ import annotations

from collections.abc import Sequence


def percent(part: float) -> str:
    return f"{100 * part:.0f} %"


def kib(num_bytes: int) -> str:
    return f"{num_bytes / 2**10:,.0f} KiB"


def mib(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 2**20:,.0f} MiB"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell; the first two to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("   " + "  ".join(cells))
