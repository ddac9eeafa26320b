"""Whether the conditioning that one model makes fits another, by the named shapes in their descriptions. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from latentflow.v1 import control_pb2


def mismatch(*, needed: Iterable[control_pb2.NamedShape], given: Iterable[control_pb2.NamedShape]) -> str:
    """The first tensor that is missing or of another shape, as part of a sentence; empty if all fit."""
    made = {tensor.name: tuple(tensor.shape) for tensor in given}
    for tensor in needed:
        wanted, found = tuple(tensor.shape), made.get(tensor.name)
        if found is None:
            return f"{tensor.name!r} is missing"
        if len(found) != len(wanted) or any(a and b and a != b for a, b in zip(found, wanted, strict=True)):
            return f"{tensor.name!r} is {_text(found)}, needed is {_text(wanted)}"
    return ""


def _text(shape: tuple[int, ...]) -> str:
    """A shape as text, with dots for sizes that depend on the request."""
    return f"[{', '.join(str(size) if size else '...' for size in shape)}]"
