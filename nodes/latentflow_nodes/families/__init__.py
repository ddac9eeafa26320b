"""The model families: one file for each, a Protocol for all, and the table by which roles find them.

Imports neither gRPC nor the wire. No other package of the server names a family.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentflow.errors import FailedPreconditionError
from latentflow.reasons import Reason

from latentflow_nodes.families.base import Family
from latentflow_nodes.families.sd import StableDiffusion
from latentflow_nodes.families.sdxl import StableDiffusionXL
from latentflow_nodes.weights import files

FAMILIES: list[Family] = [StableDiffusion(), StableDiffusionXL()]


def parts(role: str) -> tuple[str, ...]:
    """The folders of a pipeline that a role may read, whatever the family, without duplicates."""
    return tuple(dict.fromkeys(part for family in FAMILIES for part in family.parts.get(role, ())))


def of_pipeline(pipeline: Path) -> Family:
    """The family of a pipeline folder. FailedPreconditionError where it belongs to none."""
    name = str(files.config(pipeline, "model_index.json").get("_class_name", ""))
    for family in FAMILIES:
        if family.owns_pipeline(name):
            return family
    raise _unsupported(pipeline, f"a {name}" if name else "a pipeline without a class name")


def of_control_net(folder: Path) -> Family:
    """The family of a ControlNet's folder. FailedPreconditionError where it belongs to none."""
    config: dict[str, Any] = files.config(folder)
    for family in FAMILIES:
        if family.owns_control_net(config):
            return family
    raise _unsupported(folder, "a ControlNet of an unknown kind")


def of_adapter(keys: Sequence[str]) -> Family:
    """The family whose loader reads an adapter file with these keys; the first of the table where none is certain."""
    return next((family for family in FAMILIES if family.owns_adapter(keys)), FAMILIES[0])


def _unsupported(folder: Path, found: str) -> FailedPreconditionError:
    known = ", ".join(family.title for family in FAMILIES)
    return FailedPreconditionError(
        f"{folder} holds {found}; this server runs {known}.", reason=Reason.UNSUPPORTED_FAMILY
    )
