"""Tables that commands print."""

from __future__ import annotations

import io

import pytest
from latentflow.internal.tables import print_table, print_whole
from rich.console import Console
from rich.table import Table

REASON = "file.safetensors cannot be used: " + "a long reason, " * 40 + "end"


def table() -> Table:
    made = Table("input", "value", box=None, pad_edge=False)
    made.add_row("LoRAs", "neon")
    made.add_row("unusable LoRA", REASON)
    return made


def test_a_table_has_one_line_for_each_row_where_the_output_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    file = io.StringIO()
    print_table(table(), console=Console(file=file))
    assert file.getvalue() == f"input          value\nLoRAs          neon\nunusable LoRA  {REASON}\n"


def test_a_table_fits_a_terminal_unless_it_has_to_be_whole() -> None:
    fitting, whole = io.StringIO(), io.StringIO()
    print_table(table(), console=Console(file=fitting, force_terminal=True, color_system=None, width=60))
    assert max(map(len, fitting.getvalue().splitlines())) <= 60
    print_whole(table(), console=Console(file=whole, force_terminal=True, color_system=None, width=60))
    assert REASON in whole.getvalue()
