"""The files of a component folder: reads its configuration, and refuses weights that are damaged or pickled.

Roles call `check` before diffusers reads a folder, so that a user gets one sentence about the file instead of a loader's
traceback.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentflow.errors import DataLossError, FailedPreconditionError
from latentflow.internal import weight_files, weight_names
from latentflow.reasons import Reason
from safetensors import SafetensorError, safe_open

_DIFFERENCES = {"missing_keys": "missing", "unexpected_keys": "unexpected"}
_BLOCK = 1 << 20
# Quantised weights have these types, or scales beside them: in files of ComfyUI, torchao and bitsandbytes.
_QUANTISED = {"I8", "U8", "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"}
_SCALE = re.compile(r"(?:^|\.)(?:scaled_fp8|scale_weight|weight_scale|comfy_quant|absmax)$")


def check(folder: Path, *, variant: str | None = None) -> list[Path]:
    """The weight files that a component folder's loader reads, each checked to be complete. Pickles are refused.

    Args:
        folder: The folder, or a single file.
        variant: As in the source; None: the files without a variant in their names.
    """
    if folder.is_file():
        check_file(folder)
        return [folder]
    files = weight_files.of_component(folder, variant=variant)
    for path in files:
        check_file(path)
    return files


def check_complete(path: Path, report: Mapping[str, Any], *, part: str = "", remedy: str = "") -> None:
    """FailedPreconditionError unless the weights of a folder or file are exactly those that the configuration describes.

    Loaders leave what a file lacks at random values, and ignore what they do not expect.

    Args:
        report: As `from_pretrained` of diffusers and transformers returns it with `output_loading_info`.
        part: The part of a single file.
        remedy: More sentences for the message, each after a space.
    """
    problems = [f"{word} {weight_names.listed(report[key])}" for key, word in _DIFFERENCES.items() if report[key]]
    if report["mismatched_keys"]:
        problems.append(
            "of another shape "
            + weight_names.listed(
                [f"{key} ({_shape(found)}, not {_shape(need)})" for key, found, need in report["mismatched_keys"]]
            )
        )
    if problems:
        raise FailedPreconditionError(
            f"The weights {f'of {part} ' if part else ''}in {path} are not those that its configuration describes: "
            f"{'; '.join(problems)}. Fetch them again, or convert them to this layout.{remedy}",
            reason=Reason.WEIGHTS_MISMATCH,
        )


def differences(*, needed: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """A report for `check_complete`, of the shapes of the tensors by name."""
    shared = [name for name in needed if name in found]
    return {
        "missing_keys": needed.keys() - found.keys(),
        "unexpected_keys": found.keys() - needed.keys(),
        "mismatched_keys": [
            (name, found[name], needed[name]) for name in shared if tuple(found[name]) != tuple(needed[name])
        ],
    }


def _shape(shape: Iterable[int]) -> str:
    return f"[{', '.join(str(size) for size in shape)}]"


def check_file(path: Path) -> None:
    """DataLossError unless the file's header parses and the file holds all the data that it describes.

    FailedPreconditionError for quantised weights: without their scales they would be other weights.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            types = {key: opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataLossError(f"{path} {weight_files.damage(path, error)}.") from None
    if key := next((key for key, dtype in types.items() if dtype in _QUANTISED or _SCALE.search(key)), None):
        raise FailedPreconditionError(
            f"{path} has quantised weights ({key}, of the type {types[key]}), which this version does not serve. Use the "
            "weights in float16, bfloat16 or float32.",
            reason=Reason.UNSUPPORTED_FAMILY,
        )


def keys(path: Path) -> list[str]:
    """The names of the tensors in a safetensors file that `check_file` has accepted."""
    with safe_open(path, framework="pt") as opened:
        return list(opened.keys())


class LoadedFiles:
    """The files that a model is loaded from, as they were then; a server that wakes up reads them again.

    Args:
        weights: As `check` returns them, in the order of their names within the model.

    Attributes:
        digest: SHA-256 over the contents of the weights; lower-case hex.
    """

    def __init__(self, weights: Sequence[Path]) -> None:
        configs = dict.fromkeys(path.with_name("config.json") for path in weights)
        self._paths = [*weights, *(path for path in configs if path.is_file())]
        # Before the contents, so that a change while they are read is seen later.
        self._signatures = {path: _signature(path) for path in self._paths}
        self._contents = {path: _content(path) for path in self._paths}
        self.digest = hashlib.sha256(b"".join(self._contents[path] for path in weights)).hexdigest()

    def check_unchanged(self) -> None:
        """FailedPreconditionError, which names them, where files are missing or have other contents now."""
        missing = [path for path in self._paths if not path.is_file()]
        if missing:
            raise FailedPreconditionError(
                f"{_listed(missing)} cannot be read any more, and this server loads its weights from there. Put the files "
                "back, or start the server anew.",
                reason=Reason.WEIGHTS_UNAVAILABLE,
            )
        signatures = {path: _signature(path) for path in self._paths}
        touched = [path for path in self._paths if signatures[path] != self._signatures[path]]
        if changed := [path for path in touched if _content(path) != self._contents[path]]:
            raise FailedPreconditionError(
                f"{_listed(changed)} has changed since this server loaded its weights from there. Put the file back, or "
                "start the server anew with the new weights.",
                reason=Reason.WEIGHTS_MISMATCH,
            )
        self._signatures = signatures


def _listed(paths: Iterable[Path]) -> str:
    return " and ".join(map(str, paths))


def _signature(path: Path) -> tuple[int, ...]:
    """Another one after the file was replaced or written to."""
    found = path.stat()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _content(path: Path) -> bytes:
    """SHA-256 of a file."""
    total = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            total.update(block)
    return total.digest()
