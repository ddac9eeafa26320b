"""Names of tests are claims that fit on a line."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from support.paths import ROOT

MOST_CHARACTERS = 80
FILES = sorted(path for folder in ("tests", "e2e") for path in (ROOT / folder).rglob("test_*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_of_tests_have_at_most_80_characters(path: Path) -> None:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    names = [node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, functions)]
    assert [name for name in names if name.startswith("test_") and len(name) > MOST_CHARACTERS] == []
