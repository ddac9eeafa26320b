"""Tables printed with each row in one line, so that names, addresses and reasons can be copied and processed.

rich wraps or cuts what is wider than a terminal, and takes a pipe for a terminal of 80 columns.
"""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

# In columns; more than any row has.
_WIDEST = 100_000


def print_table(table: Table, *, console: Console) -> None:
    """Prints a table that fits the terminal; with each row in one line where the output is no terminal."""
    if console.is_terminal:
        console.print(table)
    else:
        print_whole(table, console=console)


def print_whole(table: Table, *, console: Console) -> None:
    """Prints a table with each row in one line, however narrow the terminal is."""
    width = Measurement.get(console, console.options.update(width=_WIDEST), table).maximum
    wide = Console(file=console.file, width=max(console.width, width))
    with wide.capture() as printed:
        wide.print(table, soft_wrap=True)
    # rich pads every row to the width of the widest.
    console.file.write("".join(f"{line.rstrip()}\n" for line in printed.get().splitlines()))
