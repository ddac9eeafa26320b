"""What is probably wrong with a workflow that the workflow API accepts: found without a cluster and without loading weights.

A `file:` source names a folder of the machine or the pod that runs the model's server. Where this machine has it, it is
checked; where this machine lacks the folder around it too, it is probably in a pod.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlparse

from latentflow.api import DiffusionWorkflow, Model, Role, Source
from latentflow.cli import folders
from latentflow.internal import source_uri


def of(workflow: DiffusionWorkflow, *, model_root: Path | None) -> list[str]:
    """The warnings for a workflow, each one sentence that begins with the field.

    Args:
        model_root: The folder that contains the relative sources; None: they are not looked for.
    """
    found = [warning for model in workflow.spec.models for warning in _of_devices(model)]
    for model in workflow.spec.models:
        for name, source in model.sources().items():
            field = f"models[{model.name}]{f'.nets[{name}]' if name else ''}.source"
            found += [*_of_uri(field, model, source), *_of_folder(field, model, source, model_root)]
    return [*found, *_of_families(workflow, model_root)]


def unchecked(workflow: DiffusionWorkflow, *, model_root: Path | None) -> list[str]:
    """What `of` did not check of a workflow's sources, each one clause. The arguments are those of `of`."""
    sources = [(model, source) for model in workflow.spec.models for source in model.sources().values()]
    uris = dict.fromkeys(source.uri for _, source in sources)
    relative = [uri for uri in uris if _scheme(uri) == ""]
    mounted = {source.uri for model, source in sources if _is_in_a_volume(model, source)}
    remote = [uri for uri in uris if _scheme(uri) not in ("", "file") or uri in mounted]
    found = []
    if relative and model_root is None:
        found.append(f"whether the model root contains {', '.join(relative)}; --model-root FOLDER checks this")
    if remote:
        found.append(f"whether {', '.join(remote)} can be read")
    return found


def _of_devices(model: Model) -> Iterator[str]:
    requested = {**model.resources.get("requests", {}), **model.resources.get("limits", {})}
    # Kubernetes names devices with a domain, such as nvidia.com/gpu.
    devices = {name: number for name, number in sorted(requested.items()) if "/" in name}
    claims = model.resources.get("claims") or model.pod.resource_claims
    ranks = model.parallelism.tensor_degree
    if model.engine.device.startswith("cuda") and not devices and not claims:
        yield (
            f"models[{model.name}].resources: the model runs on {model.engine.device} and requests no device, so a pod on "
            f"Kubernetes has no GPU; add limits, such as nvidia.com/gpu: {ranks}"
        )
    if devices and model.engine.device == "cpu":
        yield (
            f"models[{model.name}].engine.device: the model requests {', '.join(devices)} and runs on the CPU; "
            "set device: cuda"
        )
    if devices and not claims and model.engine.device != "cpu" and (count := _count(devices)) < ranks:
        yield (
            f"models[{model.name}].resources: the weights are divided among {ranks} devices (parallelism.tensor), and the model "
            f"requests {count}, so its servers cannot load it"
        )


def _count(devices: Mapping[str, object]) -> int:
    """The number of devices; one that is no number counts as one device."""
    return sum(int(str(number)) if str(number).isdecimal() else 1 for number in devices.values())


def _of_uri(field: str, model: Model, source: Source) -> Iterator[str]:
    uri = source.uri
    if model.role is Role.LORA_STORE and source_uri.is_single_file(uri):
        yield f"{field}.uri: {uri} is a file, and a LoRA store reads a folder; name the folder of the file"
    if _scheme(uri) == "hf" and (doubt := source_uri.doubt_of_repository(uri)):
        yield f"{field}.uri: {doubt}"


def _of_folder(field: str, model: Model, source: Source, model_root: Path | None) -> Iterator[str]:
    folder = _folder(source, model_root)
    if folder is None:
        return
    inside = folder / source.subfolder if source.subfolder is not None else folder
    if not os.path.exists(folder):
        if not _is_in_a_volume(model, source):
            missing = _missing(folder, is_absolute=_scheme(source.uri) == "file")
            yield f"{field}.uri: {missing}{_meant(source.uri, model_root)}"
    elif not os.path.exists(inside):
        yield f"{field}.subfolder: {_missing(inside, is_absolute=False)}"
    elif _scheme(source.uri) == "" and model_root and not folder.resolve().is_relative_to(model_root.resolve()):
        yield (
            f"{field}.uri: {folder} is a link to {folder.resolve()}, outside the model root, which servers "
            "refuse; write file:///…"
        )
    else:
        for problem in folders.problems(model.role, folder, subfolder=source.subfolder, variant=source.variant):
            yield f"{field}: {problem}"


def _missing(path: Path, *, is_absolute: bool) -> str:
    """What is known of a path that does not exist, as a clause.

    Args:
        is_absolute: It is that of a `file:` source.
    """
    first = next(parent for parent in (path, *path.parents) if os.path.exists(parent.parent))
    if is_absolute and first != path:
        return f"this machine has no {first}, so {path} was not checked; the machine or the pod of the model's server needs it"
    try:
        names = os.listdir(first.parent)
    except OSError as error:
        return f"{path} was not checked: {first.parent} cannot be read ({error.strerror})"
    alike = difflib.get_close_matches(first.name, names, n=1)
    return f"{path} does not exist" + (f"; did you mean {first.parent / alike[0]}?" if alike else "")


def _meant(uri: str, model_root: Path | None) -> str:
    """What a source that this machine does not have was probably meant to be, as the end of a clause; empty if nothing shows it."""
    if uri.removeprefix("file:///").startswith(("~", "$")):
        return "; ~ and variables are not expanded"
    if model_root is None or _scheme(uri) != "":
        return ""
    root = model_root.absolute()
    if uri.startswith(f"{root.name}/") and os.path.exists(root.parent / uri):
        return f"; a uri begins below the model root: write {uri.removeprefix(f'{root.name}/')}"
    return source_uri.hub_of_missing(uri, root)


def _is_in_a_volume(model: Model, source: Source) -> bool:
    """Whether the model's pod mounts a volume in which a `file:` source lies that this machine does not have."""
    if _scheme(source.uri) != "file":
        return False
    path = source_uri.file_path(source.uri)
    mounts = [str(mount.get("mountPath", "")) for mount in model.pod.volume_mounts or ()]
    return not os.path.exists(path) and any(mount and path.is_relative_to(mount) for mount in mounts)


def _of_families(workflow: DiffusionWorkflow, model_root: Path | None) -> Iterator[str]:
    classes: dict[str, list[str]] = {}
    for model in workflow.spec.models:
        folder = _folder(model.source, model_root) if model.source is not None else None
        if folder is not None and (name := _pipeline_class(folder)):
            classes.setdefault(name, []).append(model.name)
    if len(classes) > 1:
        parts = " and ".join(f"{', '.join(names)} of a {name}" for name, names in classes.items())
        yield f"models: the weights belong to pipelines of different classes ({parts}), which rarely fit together"


def _folder(source: Source, model_root: Path | None) -> Path | None:
    """The folder or the file of a source on this machine, whether or not it exists; None if it is not looked for."""
    uri = source.uri
    if _scheme(uri) == "file":
        return source_uri.file_path(uri)
    return model_root / uri if _scheme(uri) == "" and model_root is not None else None


def _scheme(uri: str) -> str:
    return urlparse(uri).scheme


def _pipeline_class(folder: Path) -> str | None:
    try:
        index = json.loads((folder / "model_index.json").read_bytes())
    except (OSError, ValueError):
        return None
    name = index.get("_class_name") if isinstance(index, dict) else None
    return name if isinstance(name, str) else None
