"""What is probably wrong with a workflow that the workflow API accepts: found without a cluster and without loading weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

from latentflow.api import DiffusionWorkflow, Model
from latentflow.cli import folders


def of(workflow: DiffusionWorkflow, *, model_root: Path | None) -> list[str]:
    """The warnings for a workflow, each one sentence that begins with the field.

    Args:
        model_root: The folder that contains the relative sources; None: they are not looked for.
    """
    found = [warning for model in workflow.spec.models for warning in _of_devices(model)]
    if model_root is not None:
        found += [warning for model in workflow.spec.models for warning in _of_folders(model, model_root)]
        found += _of_families(workflow, model_root)
    return found


def unchecked(workflow: DiffusionWorkflow, *, model_root: Path | None) -> list[str]:
    """What `of` did not check of a workflow's sources, each one clause. The arguments are those of `of`."""
    uris = dict.fromkeys(model.source.uri for model in workflow.spec.models if model.source is not None)
    relative = [uri for uri in uris if _is_relative(uri)]
    remote = [uri for uri in uris if not _is_relative(uri)]
    found = []
    if relative and model_root is None:
        found.append(f"whether the model root contains {', '.join(relative)}; --model-root FOLDER checks this")
    if remote:
        found.append(f"whether {', '.join(remote)} can be read")
    return found


def _of_devices(model: Model) -> Iterator[str]:
    requested = {**model.resources.get("requests", {}), **model.resources.get("limits", {})}
    # Kubernetes names devices with a domain, such as nvidia.com/gpu.
    devices = sorted(name for name in requested if "/" in name)
    claims = model.resources.get("claims") or model.pod.resource_claims
    if model.engine.device.startswith("cuda") and not devices and not claims:
        yield (
            f"models[{model.name}].resources: the model runs on {model.engine.device} and requests no device, so a pod on "
            "Kubernetes has no GPU; add limits, such as nvidia.com/gpu: 1"
        )
    if devices and model.engine.device == "cpu":
        yield (
            f"models[{model.name}].engine.device: the model requests {', '.join(devices)} and runs on the CPU; "
            "set device: cuda"
        )


def _of_folders(model: Model, model_root: Path) -> Iterator[str]:
    folder = _folder(model, model_root)
    if folder is None or model.source is None:
        return
    if not folder.exists():
        yield f"models[{model.name}].source.uri: {folder} does not exist"
    elif model.source.subfolder is not None and not (folder / model.source.subfolder).exists():
        yield f"models[{model.name}].source.subfolder: {folder / model.source.subfolder} does not exist"
    else:
        source = model.source
        for problem in folders.problems(model.role, folder, subfolder=source.subfolder, variant=source.variant):
            yield f"models[{model.name}].source: {problem}"


def _of_families(workflow: DiffusionWorkflow, model_root: Path) -> Iterator[str]:
    classes: dict[str, list[str]] = {}
    for model in workflow.spec.models:
        folder = _folder(model, model_root)
        if folder is not None and (name := _pipeline_class(folder)):
            classes.setdefault(name, []).append(model.name)
    if len(classes) > 1:
        parts = " and ".join(f"{', '.join(names)} of a {name}" for name, names in classes.items())
        yield f"models: the weights belong to pipelines of different classes ({parts}), which rarely fit together"


def _folder(model: Model, model_root: Path) -> Path | None:
    return model_root / model.source.uri if model.source is not None and _is_relative(model.source.uri) else None


def _is_relative(uri: str) -> bool:
    return urlparse(uri).scheme == ""


def _pipeline_class(folder: Path) -> str | None:
    try:
        index = json.loads((folder / "model_index.json").read_bytes())
    except (OSError, ValueError):
        return None
    name = index.get("_class_name") if isinstance(index, dict) else None
    return name if isinstance(name, str) else None
