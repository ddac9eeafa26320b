"""The files of a component folder: reads its configuration, and refuses weights that are damaged or pickled.

Roles call `check` before diffusers reads a folder, so that a user gets one sentence about the file instead of a loader's
traceback.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from latentflow.errors import DataLossError, FailedPreconditionError
from latentflow.reasons import Reason
from safetensors import SafetensorError, safe_open

from latentflow_nodes.weights import names

_DIFFERENCES = {"missing_keys": "missing", "unexpected_keys": "unexpected"}
_BLOCK = 1 << 20


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
        raise DataLossError(f"{path} cannot be read: {error}. Fetch the folder again.") from None
    if not isinstance(loaded, dict):
        raise DataLossError(f"{path} does not hold a JSON object. Fetch the folder again.")
    return loaded


def check(folder: Path, *, variant: str | None = None) -> list[Path]:
    """The weight files that a component folder's loader reads, each checked to be complete. Pickles are refused.

    Args:
        folder: The folder, or a single file.
        variant: As in the source; None: the files without a variant in their names.
    """
    if folder.is_file():
        check_file(folder)
        return [folder]
    if not folder.is_dir():
        raise FailedPreconditionError(
            f"The component folder {folder} is missing; check the source.", reason=Reason.WEIGHTS_UNAVAILABLE
        )
    files = _weights(folder, variant)
    if not files:
        raise names.refusal(str(folder), [path.name for path in folder.iterdir()], variant=variant)
    for path in files:
        check_file(path)
    return files


def check_complete(path: Path, report: Mapping[str, Any], *, part: str = "") -> None:
    """FailedPreconditionError unless the weights of a folder or file are exactly those that the configuration describes.

    Loaders leave what a file lacks at random values, and ignore what they do not expect.

    Args:
        report: As `from_pretrained` of diffusers and transformers returns it with `output_loading_info`.
        part: The part of a single file.
    """
    problems = [f"{word} {names.listed(report[key])}" for key, word in _DIFFERENCES.items() if report[key]]
    if report["mismatched_keys"]:
        problems.append(
            "of another shape "
            + names.listed(
                [f"{key} ({_shape(found)}, not {_shape(need)})" for key, found, need in report["mismatched_keys"]]
            )
        )
    if problems:
        raise FailedPreconditionError(
            f"The weights {f'of {part} ' if part else ''}in {path} are not those that its configuration describes: "
            f"{'; '.join(problems)}. Fetch them again, or convert them to this layout.",
            reason=Reason.WEIGHTS_MISMATCH,
        )


def _weights(folder: Path, variant: str | None) -> list[Path]:
    for stem in names.STEMS:
        whole, index = folder / names.whole(stem, variant), folder / names.index(stem, variant)
        # Where a folder has both, transformers reads the whole file and diffusers the index.
        if whole.is_file() and (stem == "model" or not index.is_file()):
            return [whole]
        if index.is_file():
            return _shards(index)
    return []


def _shards(index: Path) -> list[Path]:
    found = config(index.parent, index.name).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise DataLossError(f"{index} does not map tensors to files. Fetch the folder again.")
    shards = sorted({index.parent / str(name) for name in found.values()})
    if missing := [path.name for path in shards if not path.is_file()]:
        raise FailedPreconditionError(
            f"{index} names {names.listed(missing)}, which {index.parent} lacks; fetch the folder again.",
            reason=Reason.WEIGHTS_UNAVAILABLE,
        )
    return shards


def _shape(shape: Iterable[int]) -> str:
    return f"[{', '.join(str(size) for size in shape)}]"


def check_file(path: Path) -> None:
    """DataLossError unless the file's header parses and the file holds all the data that it describes."""
    try:
        with safe_open(path, framework="pt") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        raise DataLossError(f"{path} {damage(path, error)}.") from None


def damage(path: Path, error: Exception) -> str:
    """Why a file cannot be read as safetensors, and what to do; the end of a sentence that begins with the file."""
    size = 0
    with contextlib.suppress(OSError), path.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        start = opened.read(64).lstrip().lower()
        if start.startswith(b"version https://git-lfs"):
            return "is a pointer of Git LFS instead of the weights; run `git lfs pull` where it comes from, or download the file"
        if start.startswith((b"<!doctype", b"<html", b"<?xml")):
            return "is a web page instead of the weights; download the file itself"
    return f"is damaged or incomplete ({error}; {size} bytes); fetch it again"


def keys(path: Path) -> list[str]:
    """The names of the tensors in a safetensors file that `check_file` has accepted."""
    with safe_open(path, framework="pt") as opened:
        return list(opened.keys())


def digest(files: list[Path]) -> str:
    """SHA-256 over files' contents, in the order of their names within the model; lower-case hex."""
    total = hashlib.sha256()
    for path in files:
        one = hashlib.sha256()
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                one.update(block)
        total.update(one.digest())
    return total.hexdigest()
