"""The folder of a LoRA store: which files are its adapters, by name.

An adapter NAME is `NAME.safetensors`, or a folder `NAME/` with the file that diffusers or PEFT writes, or with one such
folder of PEFT for each component. Hidden files are no adapters, and neither is anything that is no weights file.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from latentflow.internal.weight_names import DIFFUSERS_LORA, PEFT_LORA, PICKLES, SUFFIX

PEFT_CONFIG = "adapter_config.json"


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """A weights file of an adapter.

    Attributes:
        label: Its path within the store's folder.
        config: PEFT's configuration beside it.
        component: The component that its folder is named by.
    """

    weights: Path
    label: str
    config: Path | None = None
    component: str | None = None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An adapter of the folder.

    Attributes:
        problem: Why it cannot be used, in one sentence; empty where nothing is known before its files are read.
    """

    name: str
    files: tuple[AdapterFile, ...] = ()
    problem: str = ""

    def signature(self) -> tuple[object, ...]:
        """Equal as long as the files have not changed."""
        paths = [path for file in self.files for path in (file.weights, file.config) if path is not None]
        return (self, *(_stat(path) for path in paths))


def find(folder: Path, components: Collection[str]) -> dict[str, Entry]:
    """The adapters of a store's folder by name. OSError where the folder itself cannot be read.

    Args:
        components: The components that adapters may change.
    """
    found: dict[str, Entry] = {}
    # Pickles last: one that has been converted may lie beside its safetensors file.
    for path in sorted(folder.iterdir(), key=lambda path: (_suffix(path.name) in PICKLES, path.name)):
        name = path.name.encode(errors="surrogateescape").decode(errors="replace")
        try:
            entry = None if name.startswith(".") else _entry(path, name, components)
        except OSError as error:
            entry = Entry(name=_stem(name), problem=_unreadable(name, error))
        if entry is None or (_suffix(name) in PICKLES and entry.name in found):
            continue
        if name != path.name:
            entry = Entry(name=entry.name, problem=f"The name of {name} is not UTF-8; rename it.")
        if entry.name in found:
            entry = Entry(
                name=entry.name,
                problem=f"The store has several files or folders for the LoRA {entry.name}; rename all but one of them.",
            )
        found[entry.name] = entry
    return dict(sorted(found.items()))


def _entry(path: Path, name: str, components: Collection[str]) -> Entry | None:
    if path.is_dir():
        return _folder_entry(path, name, components)
    if _suffix(name) in PICKLES:
        return Entry(name=name[: -len(path.suffix)], problem=_pickle(name))
    if _suffix(name) != SUFFIX:
        return None
    # A store may also be a single folder of PEFT.
    config = _config(path.parent) if path.name == PEFT_LORA else None
    file = AdapterFile(weights=path, label=name, config=config)
    return Entry(name=_stem(name), files=(file,), problem=_problem(file))


def _folder_entry(folder: Path, name: str, components: Collection[str]) -> Entry | None:
    inside = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    files = list(_files(folder, name, inside, components))
    if len({file.component for file in files}) < len(files) or (len(files) > 1 and not all(f.component for f in files)):
        return Entry(name=name, problem=f"The folder {name}/ has several LoRAs; give each a folder of its own.")
    if files:
        problem = next((text for file in files if (text := _problem(file))), "")
        return Entry(name=name, files=tuple(files), problem=problem)
    weights = [file for file in inside if _suffix(file) in (SUFFIX, *PICKLES)]
    if "config.json" in inside:
        # A component of a pipeline.
        return None
    if not weights and (below := _below(folder, inside)):
        return Entry(
            name=name,
            problem=f"The folder {name}/ has no LoRA, but {name}/{below}/ has one; move {below}/ into the folder of the store.",
        )
    if not (weights or name.endswith(SUFFIX)):
        # It has nothing to do with adapters.
        return None
    pickles = [file for file in weights if _suffix(file) != SUFFIX]
    if pickles:
        return Entry(name=name, problem=_pickle(f"{name}/{pickles[0]}"))
    file = weights[0] if weights else "its file"
    return Entry(
        name=name,
        problem=f"The folder {name}/ has neither {DIFFUSERS_LORA} nor {PEFT_LORA}; move {file} into the folder of the "
        f"store, or make {name}/ the source of the store.",
    )


def _files(folder: Path, name: str, inside: list[str], components: Collection[str]) -> Iterator[AdapterFile]:
    for file in (DIFFUSERS_LORA, PEFT_LORA):
        if file in inside:
            config = _config(folder) if file == PEFT_LORA else None
            yield AdapterFile(weights=folder / file, label=f"{name}/{file}", config=config)
    for component in components:
        weights = folder / component / PEFT_LORA
        if component in inside and weights.is_file():
            yield AdapterFile(
                weights=weights,
                label=f"{name}/{component}/{PEFT_LORA}",
                config=_config(weights.parent),
                component=component,
            )


def _below(folder: Path, inside: list[str]) -> str | None:
    """The first folder in a folder that has an adapter: a checkpoint of a training, or an adapter that PEFT saved by name."""
    return next(
        (one for one in inside for file in (DIFFUSERS_LORA, PEFT_LORA) if (folder / one / file).is_file()), None
    )


def _suffix(name: str) -> str:
    """In small letters: some tools write it in capitals."""
    return Path(name).suffix.lower()


def _stem(name: str) -> str:
    return name[: -len(SUFFIX)] if _suffix(name) == SUFFIX else name


def _config(folder: Path) -> Path | None:
    path = folder / PEFT_CONFIG
    return path if path.is_file() else None


def _pickle(label: str) -> str:
    return f"{label} is a pickle, which can run code when it is read; convert it to safetensors."


def _problem(file: AdapterFile) -> str:
    """Why it cannot be opened as a file; a pipe, for instance, would block."""
    try:
        mode = file.weights.stat().st_mode
    except OSError as error:
        return _unreadable(file.label, error)
    return "" if stat.S_ISREG(mode) else f"{file.label} is no regular file."


def _unreadable(label: str, error: OSError) -> str:
    return f"{label} cannot be read: {error.strerror or error}."


def _stat(path: Path) -> tuple[int, ...]:
    try:
        found = os.stat(path)
    except OSError as error:
        return (error.errno or 0,)
    return (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino)
