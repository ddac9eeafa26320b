"""What a model's folder on this machine lacks: found without torch, in the files that a server of the role would read.

A server finds the same problems when it starts, one at a time, and more: whether the tensors are those of the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from latentflow.api import Role
from latentflow.errors import LatentflowError
from latentflow.internal import weight_files, weight_names
from latentflow.internal.source_folder import SourceFolder, is_present

# The part of a pipeline that a role serves where its source names no component.
_NETWORKS = {Role.DENOISER: "unet", Role.CONTROL_NET: "controlnet", Role.VAE: "vae"}


def problems(role: Role, root: Path, *, subfolder: str | None, variant: str | None) -> list[str]:
    """The problems of a source's folder or file, each as sentences that name the file.

    Args:
        root: The folder or the file that the uri names. It exists.
        subfolder, variant: As in the source.
    """
    found = []
    for check in _checks(role, _source(root, subfolder, variant)):
        try:
            check()
        except LatentflowError as error:
            found.append(error.message)
        except OSError as error:
            found.append(f"{error.filename} cannot be read: {error.strerror}.")
    return found


def _source(root: Path, subfolder: str | None, variant: str | None) -> SourceFolder:
    file = root if root.is_file() else None if subfolder else weight_files.only_file(root)
    if file is not None:
        return SourceFolder(pipeline=file.parent, single_file=file)
    return SourceFolder(pipeline=root, component=root / subfolder if subfolder else None, variant=variant)


def _checks(role: Role, source: SourceFolder) -> Iterator[Callable[[], object]]:
    if role is Role.LORA_STORE:
        # A store starts without files, and lists those that it cannot use.
        return
    if role is Role.TEXT_ENCODER:
        yield from _checks_of_text(source)
        return
    yield partial(_check_component, source.part(_NETWORKS[role]), source.variant)
    if role is Role.DENOISER and source.single_file is None:
        yield partial(weight_files.config, source.beside("scheduler"), "scheduler_config.json")


def _checks_of_text(source: SourceFolder) -> Iterator[Callable[[], object]]:
    if not source.is_pipeline:
        yield partial(_check_component, source.single_file or source.alone, source.variant)
        yield partial(weight_files.check_tokenizer, source.beside("tokenizer"))
        return
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


def _check_component(path: Path, variant: str | None) -> None:
    if path.is_file() and not path.name.endswith(weight_names.SUFFIX):
        raise weight_names.refusal(str(path.parent), [path.name], variant=variant)
    if path.is_file():
        weight_files.check_size(path)
        return
    for file in weight_files.of_component(path, variant=variant):
        weight_files.check_size(file)
    weight_files.config(path)
