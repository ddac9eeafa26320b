"""Workflows from YAML, with errors that name file, line, column and field.

All of a file's problems are reported at once, in one InvalidRequestError, before anything is started.
"""

from __future__ import annotations

import difflib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from latentflow.api.parts import API_VERSION, explained
from latentflow.api.workflow import DiffusionWorkflow
from latentflow.errors import InvalidRequestError
from latentflow.reasons import Reason

MAX_BYTES = 1 << 20
# Aliases can make a small file describe a huge tree; no workflow needs as many values.
_MAX_VALUES = 20_000
_MAX_DEPTH = 40
_WORDS: dict[type, str] = {CommentedSeq: "list", str: "text"}


def load_workflows(path: Path | str) -> list[DiffusionWorkflow]:
    """The workflows of a file, at least one. Raises InvalidRequestError that lists all its problems."""
    path = Path(path)
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise _invalid([f"{path}: the file cannot be read: {error.strerror or error}"]) from None
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise _invalid([f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8"]) from None
    return parse_workflows(text, origin=str(path))


def parse_workflows(text: str, *, origin: str = "<text>") -> list[DiffusionWorkflow]:
    """As `load_workflows`, from text. `origin` precedes line and column in errors."""
    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise _invalid([f"{origin}: the file is over {MAX_BYTES >> 20} MiB; a workflow is smaller"])
    documents = _documents(text, origin)
    workflows: list[DiffusionWorkflow] = []
    problems: list[str] = []
    positions: dict[str, str] = {}
    for document in documents:
        found, wrong = _workflow(document, origin)
        problems += wrong
        if found is None:
            continue
        position = _position(document, ("metadata", "name"), origin)
        if found.full_name in positions:
            problems.append(
                f"{position}: metadata.name: {found.full_name} is already defined at {positions[found.full_name]}; rename one"
            )
        positions[found.full_name] = position
        workflows.append(found)
    if problems:
        raise _invalid(problems)
    return workflows


def _documents(text: str, origin: str) -> list[Any]:
    loader = YAML(typ="rt")
    loader.allow_duplicate_keys = False
    try:
        documents = [document for document in loader.load_all(io.StringIO(text)) if document is not None]
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{origin}:{mark.line + 1}:{mark.column + 1}" if mark else origin
        problem = " ".join(str(error.problem or error.context or "not YAML").split())
        raise _invalid([f"{at}: {problem}"]) from None
    except (
        YAMLError,
        ValueError,
        TypeError,
        RecursionError,
        AttributeError,
        KeyError,
        IndexError,
        OverflowError,
    ) as error:
        raise _invalid([f"{origin}: this is not YAML: {' '.join(str(error).split())[:200]}"]) from None
    if not documents:
        raise _invalid([f"{origin}: the file is empty; it has to hold a DiffusionWorkflow"])
    return documents


def _workflow(document: Any, origin: str) -> tuple[DiffusionWorkflow | None, list[str]]:
    if not isinstance(document, CommentedMap):
        return None, [
            f"{origin}: this is not a DiffusionWorkflow but a {_WORDS.get(type(document), 'value')}; write apiVersion, kind, metadata, spec"
        ]
    kind, version = document.get("kind"), document.get("apiVersion")
    if kind != "DiffusionWorkflow":
        return None, [
            f"{_position(document, ('kind',), origin)}: kind: {kind!r} is not served; write DiffusionWorkflow"
        ]
    if version != API_VERSION:
        return None, [
            f"{_position(document, ('apiVersion',), origin)}: apiVersion: {version!r} is not known; write {API_VERSION}"
        ]
    try:
        plain = _plain(document, _Budget())
        return DiffusionWorkflow.model_validate(plain, by_alias=True, by_name=False), []
    except ValidationError as error:
        details = sorted(error.errors(include_url=False), key=lambda detail: _line(document, detail["loc"]))
        return None, [_message(detail, document, origin) for detail in details]
    except ValueError as error:
        return None, [f"{_position(document, (), origin)}: {error}"]


class _Budget:
    def __init__(self) -> None:
        self.left = _MAX_VALUES


def _plain(node: Any, budget: _Budget, depth: int = 0) -> Any:
    """Plain dicts, lists and scalars of a document, within bounds."""
    budget.left -= 1
    if budget.left < 0 or depth > _MAX_DEPTH:
        raise ValueError("the document is too large or too deep; aliases count with the values that they repeat")
    if isinstance(node, CommentedMap):
        return {_key(key): _plain(value, budget, depth + 1) for key, value in node.items()}
    if isinstance(node, CommentedSeq | list):
        return [_plain(value, budget, depth + 1) for value in node]
    if node is None or isinstance(node, bool | int | float | str):
        # Round-trip scalars are subclasses that remember their spelling.
        base: type = next(t for t in (bool, int, float, str, type(None)) if isinstance(node, t))
        return node if base in (bool, type(None)) else base(node)
    raise ValueError(
        f"a {type(node).__name__} ({str(node)[:40]!r}) is not allowed in a workflow; quote it if it is text"
    )


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise ValueError(f"the key {key!r} is not text; quote it")
    return str(key)


def _message(detail: ErrorDetails, document: CommentedMap, origin: str) -> str:
    location = tuple(part for part in detail["loc"] if not _is_union_tag(part))
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    text = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        text = f"{location[-1]!r} is not a field here"
        close = difflib.get_close_matches(str(location[-1]), _fields(location[:-1]), n=1)
        text += f"; did you mean {close[0]!r}?" if close else "; remove it"
    elif detail["type"] == "missing":
        text = "this field is required"
    elif pattern := explained(detail):
        text = pattern
    elif detail["type"] not in ("value_error", "missing") and not isinstance(detail.get("input"), dict | list):
        text = f"{text[:1].lower()}{text[1:]}, not {detail.get('input')!r}"
    return f"{_position(document, location, origin)}: {field + ': ' if field else ''}{text}"


def _is_union_tag(part: Any) -> bool:
    return isinstance(part, str) and (part.startswith(("literal[", "constrained-int", "function-")) or part == "int")


def _fields(location: Sequence[Any]) -> list[str]:
    """The fields of the type at a location."""
    model: type[BaseModel] = DiffusionWorkflow
    for part in location:
        if isinstance(part, int):
            continue
        field = next((f for f in model.model_fields.values() if f.alias == part), None)
        inner = None if field is None else _model_of(field.annotation)
        if inner is None:
            return []
        model = inner
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for argument in get_args(annotation) if (found := _model_of(argument))), None)


def _position(document: Any, location: Sequence[Any], origin: str) -> str:
    """file:line:column of a field, or of the nearest enclosing value that is written."""
    line, column = _line(document, location)
    return f"{origin}:{line + 1}:{column + 1}"


def _line(document: Any, location: Sequence[Any]) -> tuple[int, int]:
    node, line, column = document, document.lc.line, 0
    for part in location:
        try:
            if isinstance(node, CommentedMap) and part in node:
                line, column = node.lc.key(part)
            elif isinstance(node, CommentedSeq) and isinstance(part, int) and part < len(node):
                line, column = node.lc.item(part)
            else:
                break
            node = node[part]
        except (KeyError, AttributeError, TypeError):
            break
    return line, column


def _invalid(problems: list[str]) -> InvalidRequestError:
    return InvalidRequestError(
        "\n".join(problems), reason=Reason.INVALID_WORKFLOW, details={"problems": str(len(problems))}
    )
