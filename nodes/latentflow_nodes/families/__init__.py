"""The model families: one file for each, a Protocol for all, and the table by which roles find them.

Imports neither gRPC nor the wire. No other package of the server names a family.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentflow.errors import FailedPreconditionError
from latentflow.internal import weight_files, weight_names
from latentflow.internal.source_folder import SourceFolder
from latentflow.reasons import Reason

from latentflow_nodes.families import single_files
from latentflow_nodes.families.base import AdapterPart, Family
from latentflow_nodes.families.sd import StableDiffusion
from latentflow_nodes.families.sdxl import StableDiffusionXL
from latentflow_nodes.weights import files

FAMILIES: list[Family] = [StableDiffusion(), StableDiffusionXL()]


def parts(role: str) -> tuple[str, ...]:
    """The folders of a pipeline that a role may read, whatever the family, without duplicates."""
    return tuple(dict.fromkeys(part for family in FAMILIES for part in family.parts.get(role, ())))


def of_pipeline(pipeline: Path) -> Family:
    """The family of a pipeline folder. FailedPreconditionError where it belongs to none."""
    name = str(weight_files.config(pipeline, "model_index.json").get("_class_name", ""))
    for family in FAMILIES:
        if family.owns_pipeline(name):
            return family
    raise _unsupported(pipeline, f"a {name}" if name else "a pipeline without a class name")


def of_source(source: SourceFolder, role: str) -> Family:
    """The family of a source's pipeline; of a component alone that of its configuration. FailedPreconditionError for none.

    A ControlNet always belongs to the family of its own configuration, whichever pipeline is around it.
    """
    if source.is_pipeline and role != "ControlNet":
        return of_pipeline(source.pipeline)
    if source.single_file is not None:
        return _of_single_file(source.single_file, role)
    folders = [source.part(family.parts[role][0]) if role != "TextEncoder" else source.alone for family in FAMILIES]
    folder = next((folder for folder in folders if (folder / "config.json").is_file()), None)
    if folder is None:
        raise _no_model(source, role)
    config = weight_files.config(folder)
    for family in FAMILIES:
        if family.owns_component(role, config):
            return family
    raise _other_component(folder, config, role)


def text_index(source: SourceFolder, family: Family) -> Mapping[str, Any]:
    """The pipeline's index, by which a text encoder finds its parts; of an encoder alone, what such an index would name."""
    if source.is_pipeline:
        if source.component is not None and source.component.name not in family.encoders:
            raise FailedPreconditionError(
                f"{source.component} is no text encoder of {family.title}: its text encoders are in "
                f"{' and '.join(family.encoders)}. Remove the subfolder; a TextEncoder serves all of them.",
                reason=Reason.WEIGHTS_UNAVAILABLE,
            )
        return weight_files.config(source.pipeline, "model_index.json")
    if source.single_file is not None:
        parts = family.parts["TextEncoder"]
        count = len(family.encoders)
        return single_files.index(source.single_file, dict(zip(parts[:count], parts[count:], strict=True)))
    name = _class(weight_files.config(source.alone))
    return {part: ["transformers", name if part in family.encoders else ""] for part in family.parts["TextEncoder"]}


def scheduler_config(source: SourceFolder) -> dict[str, Any]:
    """The configuration of a denoiser's own sampler. FailedPreconditionError where it is unknown what it predicts."""
    if source.single_file is not None:
        return single_files.scheduler(source.single_file)
    name = "scheduler_config.json"
    folder = source.beside("scheduler")
    if not source.is_pipeline and not (folder / name).is_file():
        raise FailedPreconditionError(
            f"{source.alone} is a denoiser without the scheduler that it was trained for. Copy scheduler/{name} of its base "
            "model into this folder.",
            reason=Reason.WEIGHTS_UNAVAILABLE,
        )
    return weight_files.config(folder, name)


def _of_single_file(file: Path, role: str) -> Family:
    files.check_file(file)
    config = single_files.role_config(file, role)
    for family in FAMILIES:
        if family.owns_component("Denoiser" if _class(config).startswith("UNet") else role, config):
            return family
    raise _other_component(file, config, role)


def _class(config: Mapping[str, Any]) -> str:
    return str(config.get("_class_name") or next(iter(config.get("architectures") or ()), "component without a class"))


def _no_model(source: SourceFolder, role: str) -> FailedPreconditionError:
    found = [path.name for path in source.alone.glob("*") if path.is_file()]
    if weight_names.has_weights(found) and not any(weight_names.is_component(name) for name in found):
        return weight_names.refusal(str(source.alone), found, variant=source.variant)
    where = "the pipeline around it has none" if source.is_pipeline else "it holds no model_index.json of a pipeline"
    return FailedPreconditionError(
        f"{source.alone} holds no {role}: its config.json is missing, and {where}. Correct the uri or the subfolder.",
        reason=Reason.WEIGHTS_UNAVAILABLE,
    )


def adapter_parts() -> tuple[AdapterPart, ...]:
    """The components that an adapter of any family may change, without duplicates."""
    return tuple(dict.fromkeys(part for family in FAMILIES for part in family.adapter_parts))


def _other_component(path: Path, config: Mapping[str, Any], role: str) -> FailedPreconditionError:
    known = " and ".join(family.title for family in FAMILIES)
    return FailedPreconditionError(
        f"{path} holds the component {_class(config)}, which is no {role} of {known}. Correct the uri or the subfolder of the "
        f"{role}.",
        reason=Reason.UNSUPPORTED_FAMILY,
    )


def _unsupported(folder: Path, found: str) -> FailedPreconditionError:
    known = ", ".join(family.title for family in FAMILIES)
    return FailedPreconditionError(
        f"{folder} holds {found}; this server runs {known}.", reason=Reason.UNSUPPORTED_FAMILY
    )
