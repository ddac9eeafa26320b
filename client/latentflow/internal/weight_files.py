"""The files of a component folder: which of them a loader reads, and what is wrong with them that their headers show.

Neither torch nor safetensors is needed, so the command line checks a folder as the model servers do.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from latentflow.errors import DataLossError, FailedPreconditionError
from latentflow.internal import weight_names
from latentflow.reasons import Reason

# Bytes of the number that is the length of a header, and the longest header of the format.
_LENGTH, _LONGEST_HEADER = 8, 100_000_000
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
_TOKENIZER_CONFIG = "tokenizer_config.json"
_POINTER = b"version https://git-lfs"


def config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A component's configuration. FailedPreconditionError where it is missing or not JSON."""
    path = folder / name
    try:
        loaded = json.loads(path.read_text())
    except FileNotFoundError:
        raise FailedPreconditionError(
            f"{path} is missing; {folder} is not a diffusers component folder.", reason=Reason.WEIGHTS_UNAVAILABLE
        ) from None
    except (OSError, ValueError) as error:
        if _is_pointer(path):
            raise DataLossError(
                f"{path} is a pointer of Git LFS instead of the file; run `git lfs pull` where it comes from, or download the file."
            ) from None
        raise DataLossError(f"{path} cannot be read: {error}. Fetch the folder again.") from None
    if not isinstance(loaded, dict):
        raise DataLossError(f"{path} does not hold a JSON object. Fetch the folder again.")
    return loaded


def of_component(folder: Path, *, variant: str | None = None) -> list[Path]:
    """The weight files that a component folder's loader reads. Pickles are refused.

    Args:
        variant: As in the source; None: the files without a variant in their names.
    """
    if not folder.is_dir():
        raise FailedPreconditionError(
            f"The component folder {folder} is missing; check the source.", reason=Reason.WEIGHTS_UNAVAILABLE
        )
    files = _weights(folder, variant)
    if not files:
        raise weight_names.refusal(str(folder), [path.name for path in folder.iterdir()], variant=variant)
    return files


def only_file(folder: Path) -> Path | None:
    """The single file of a folder that is neither a pipeline nor a component, if it has exactly one."""
    found = sorted(folder.glob(f"*{weight_names.SUFFIX}"))
    # A single file may have the name of a component's weights, but a component has a configuration.
    is_component = (folder / "config.json").is_file() and any(weight_names.is_component(path.name) for path in found)
    is_other = (folder / "model_index.json").is_file() or is_component
    return found[0] if len(found) == 1 and not is_other else None


def check_tokenizer(folder: Path) -> None:
    """FailedPreconditionError unless a folder holds a tokenizer's vocabulary and its configuration.

    DataLossError for one of them that cannot be read.
    """
    # transformers makes a tokenizer without words of a folder without a vocabulary.
    vocabulary = next((one for one in _VOCABULARIES if all((folder / name).is_file() for name in one)), None)
    if vocabulary is None:
        raise FailedPreconditionError(
            f"{folder} holds no tokenizer: neither {' nor '.join(' and '.join(one) for one in _VOCABULARIES)}. Copy the "
            "tokenizer of the base model there.",
            reason=Reason.WEIGHTS_UNAVAILABLE,
        )
    if not (folder / _TOKENIZER_CONFIG).is_file():
        raise FailedPreconditionError(
            f"{folder} lacks {_TOKENIZER_CONFIG}, which states the longest prompt. Copy that of the base model there.",
            reason=Reason.WEIGHTS_UNAVAILABLE,
        )
    for name in (*vocabulary, _TOKENIZER_CONFIG):
        if name.endswith(".json"):
            config(folder, name)


def check_size(path: Path) -> None:
    """DataLossError unless a safetensors file is as long as its header describes. Reads the header alone."""
    try:
        problem = _problem_of_size(path)
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        raise DataLossError(f"{path} {damage(path, problem)}.")


def keys(path: Path) -> list[str]:
    """The names of the tensors in a safetensors file that `check_size` has accepted. Reads the header alone."""
    with path.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(_LENGTH), "little")))
    return [name for name in header if name != "__metadata__"]


def _problem_of_size(path: Path) -> str:
    with path.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        length = int.from_bytes(opened.read(_LENGTH), "little")
        if size < _LENGTH or length > min(size - _LENGTH, _LONGEST_HEADER):
            return "it has no complete header of safetensors"
        try:
            header = json.loads(opened.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            needed = _LENGTH + length + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            return "its header is not that of safetensors"
    return "" if needed == size else f"its header describes {needed} bytes"


def _weights(folder: Path, variant: str | None) -> list[Path]:
    for stem in weight_names.STEMS:
        whole, index = folder / weight_names.whole(stem, variant), folder / weight_names.index(stem, variant)
        # Where a folder has both, transformers reads the whole file and diffusers the index.
        if whole.is_file() and (stem == "model" or not index.is_file()):
            return [whole]
        if index.is_file():
            return _shards(index)
    return []


def _shards(index: Path) -> list[Path]:
    contents = config(index.parent, index.name)
    if not isinstance(contents.get("metadata"), dict):
        raise DataLossError(f"{index} has no metadata, which loaders read. Fetch the folder again.")
    found = contents.get("weight_map")
    if not isinstance(found, dict) or not found:
        raise DataLossError(f"{index} does not map tensors to files. Fetch the folder again.")
    shards = sorted({index.parent / str(name) for name in found.values()})
    if missing := [path.name for path in shards if not path.is_file()]:
        raise FailedPreconditionError(
            f"{index} names {weight_names.listed(missing)}, which {index.parent} lacks; fetch the folder again.",
            reason=Reason.WEIGHTS_UNAVAILABLE,
        )
    return shards


def _is_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as opened:
            return opened.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


def damage(path: Path, error: object) -> str:
    """Why a file cannot be read as safetensors, and what to do; the end of a sentence that begins with the file."""
    size = 0
    with contextlib.suppress(OSError), path.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        start = opened.read(64).lstrip().lower()
        # The length of the header, with which a safetensors file starts, ends with zeros.
        is_text = b"\0" not in start
        if start.startswith(_POINTER):
            return "is a pointer of Git LFS instead of the weights; run `git lfs pull` where it comes from, or download the file"
        if start.startswith((b"<!doctype", b"<html", b"<?xml")):
            return "is a web page instead of the weights; download the file itself"
        if is_text and start.startswith(b"{"):
            return "is JSON text instead of the weights, as a hub answers without a login; open it, and download the file itself"
        if start.startswith((b"pk\x03\x04", b"\x80\x02")):
            return "is a pickle or a ZIP archive by its content; convert it to safetensors, or unpack it"
    return f"is damaged or incomplete ({error}; {size} bytes); fetch it again"
