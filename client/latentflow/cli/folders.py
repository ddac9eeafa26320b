"""What a model's folder on this machine lacks: found without torch, in the files that a server of the role would read.

A server finds the same problems when it starts, one at a time, and more: whether the tensors are those of the configuration.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path

from latentflow.api import Role
from latentflow.errors import FailedPreconditionError, LatentflowError
from latentflow.internal import single_file_parts, weight_files, weight_names
from latentflow.internal.source_folder import SourceFolder, is_present

# The part of a pipeline that a role serves where its source names no component.
_PARTS = {Role.TEXT_ENCODER: "text_encoder", Role.DENOISER: "unet", Role.CONTROL_NET: "controlnet", Role.VAE: "vae"}
# Parts of the class names of what a role serves.
_CLASSES = {Role.DENOISER: ("UNet", "Transformer"), Role.CONTROL_NET: ("ControlNet",), Role.VAE: ("Autoencoder",)}


def problems(role: Role, root: Path, *, subfolder: str | None, variant: str | None) -> list[str]:
    """The problems of a source's folder or file, each as sentences that name the file.

    Args:
        root: The folder or the file that the uri names. It exists.
        subfolder, variant: As in the source.
    """
    found = []
    source = _source(role, root, subfolder, variant)
    if source.single_file is not None and variant is not None:
        found.append(f"{source.single_file} is a single file and has no variant. Remove source.variant.")
    for check in _checks(role, source):
        try:
            check()
        except LatentflowError as error:
            found.append(error.message)
        except OSError as error:
            found.append(f"{error.filename} cannot be read: {error.strerror}.")
    return found


def _source(role: Role, root: Path, subfolder: str | None, variant: str | None) -> SourceFolder:
    has_file = subfolder is None and role is not Role.LORA_STORE
    file = root if root.is_file() else weight_files.only_file(root) if has_file else None
    if file is not None:
        return SourceFolder(pipeline=file.parent, single_file=file)
    return SourceFolder(pipeline=root, component=root / subfolder if subfolder else None, variant=variant)


def _checks(role: Role, source: SourceFolder) -> Iterator[Callable[[], object]]:
    if role is Role.LORA_STORE:
        # A store starts without files, and lists those that it cannot use.
        yield partial(os.listdir, source.alone)
        for file in _loras(source.alone):
            yield partial(weight_files.check_size, file)
        return
    if source.single_file is not None:
        yield partial(_check_single_file, source.single_file, _PARTS[role])
        if role is Role.TEXT_ENCODER:
            yield partial(weight_files.check_tokenizer, source.beside("tokenizer"))
        return
    if role is Role.TEXT_ENCODER:
        yield from _checks_of_text(source)
        return
    yield partial(_check_component, source.part(_PARTS[role]), source.variant, _CLASSES[role])
    if role is Role.DENOISER:
        yield partial(weight_files.config, source.beside("scheduler"), "scheduler_config.json")


def _checks_of_text(source: SourceFolder) -> Iterator[Callable[[], object]]:
    if not source.is_pipeline:
        yield partial(_check_component, source.alone, source.variant)
        yield partial(weight_files.check_tokenizer, source.beside("tokenizer"))
        return
    if source.component is not None:
        yield partial(_check_encoder, source.component)
    try:
        index = weight_files.config(source.pipeline, "model_index.json")
    except LatentflowError:
        yield partial(weight_files.config, source.pipeline, "model_index.json")
        return
    for name in index:
        if is_present(index, name) and name.startswith("text_encoder"):
            yield partial(_check_component, source.pipeline / name, source.variant)
        if is_present(index, name) and name.startswith("tokenizer"):
            yield partial(weight_files.check_tokenizer, source.pipeline / name)


def _check_single_file(file: Path, part: str) -> None:
    """Raises the error of a file from which a part of a model is read."""
    if not file.name.endswith(weight_names.SUFFIX):
        raise weight_names.refusal_of_file(str(file))
    weight_files.check_size(file)
    single_file_parts.check(file, weight_files.keys(file), part)


def _check_component(path: Path, variant: str | None, classes: Collection[str] = ()) -> None:
    """Raises the error of a component's files.

    Args:
        classes: Parts of the class names of what the role serves; empty: any class.
    """
    if path.is_file():
        raise weight_names.refusal_of_file(str(path))
    for file in weight_files.of_component(path, variant=variant):
        weight_files.check_size(file)
    name = weight_files.config(path).get("_class_name")
    if isinstance(name, str) and classes and not any(word in name for word in classes):
        raise FailedPreconditionError(
            f"{path} is of the class {name}, which this role does not serve. Correct the source."
        )


def _loras(folder: Path) -> list[Path]:
    """The files of a store's folder that are LoRAs by their names, except those of folders with several parts."""
    named = (weight_names.DIFFUSERS_LORA, weight_names.PEFT_LORA)
    found: list[Path] = []
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            files = [path / name for name in named] if path.is_dir() else [path]
            found += [file for file in files if file.is_file() and not path.name.startswith(".")]
    return [file for file in found if file.suffix.lower() == weight_names.SUFFIX]


def _check_encoder(component: Path) -> None:
    if not component.name.startswith("text_encoder"):
        raise FailedPreconditionError(f"{component} is no text encoder of its pipeline. Correct the subfolder.")
