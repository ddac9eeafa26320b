"""Every reason of an error stands in the catalogue, which documents it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from latentflow.errors import CLASSES, LatentflowError
from latentflow.reasons import Reason

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for component in ("client", "nodes", "gateway", "scheduler", "operator", "local")
    for path in (ROOT / component).rglob("*.py")
    if path.name != "reasons.py" and path.parent.name != "v1"
)


def literals(tree: ast.AST) -> Iterator[int]:
    """Lines on which a reason of an error is a string: given to an error class, or compared with an error's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Error"):
            for keyword in node.keywords:
                if keyword.arg == "reason" and isinstance(keyword.value, ast.Constant):
                    yield node.lineno
        elif (
            isinstance(node, ast.Compare)
            and ast.unparse(node.left).endswith("error.reason")
            and any(isinstance(one, ast.Constant) for one in node.comparators)
        ):
            yield node.lineno


def test_no_reason_of_an_error_is_written_as_a_string() -> None:
    assert list(literals(ast.parse("raise NotFoundError('x', reason='GONE')"))) == [1]
    assert list(literals(ast.parse("error.reason == 'GONE'"))) == [1]
    found = [f"{path.relative_to(ROOT)}:{line}" for path in SOURCES for line in literals(ast.parse(path.read_text()))]
    assert found == []


def test_every_reason_of_the_catalogue_is_used() -> None:
    used = {
        node.attr
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "Reason"
    }
    assert set(Reason.__members__) - used == set()


def test_a_reason_is_its_name_and_is_documented_in_whole_sentences() -> None:
    for name, reason in Reason.__members__.items():
        assert reason == reason.value == name
        for text in (reason.meaning, reason.remedy):
            assert text[0].isupper() or text[0] == "`"
            assert text.endswith(".")


def test_every_error_class_has_its_own_status_code_and_default_reason() -> None:
    def below(kind: type[LatentflowError]) -> set[type[LatentflowError]]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    ours = {kind for kind in below(LatentflowError) if kind.__module__ == "latentflow.errors"}
    assert set(CLASSES) == ours - {LatentflowError}
    assert len({kind.code for kind in CLASSES}) == len({kind.default_reason for kind in CLASSES}) == len(CLASSES)
