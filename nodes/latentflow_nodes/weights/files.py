"""The files of a component folder: reads its configuration, and refuses weights that are damaged or pickled.

Roles call `check` before diffusers reads a folder, so that a user gets one sentence about the file instead of a loader's
traceback.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from latentflow.errors import DataLossError, FailedPreconditionError
from latentflow.reasons import Reason
from safetensors import SafetensorError, safe_open

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
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


def check(folder: Path) -> list[Path]:
    """The safetensors files of a component folder, each checked to be complete. Pickles are refused."""
    if not folder.is_dir():
        raise FailedPreconditionError(
            f"The component folder {folder} is missing; check the source.", reason=Reason.WEIGHTS_UNAVAILABLE
        )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        if pickles:
            raise FailedPreconditionError(
                f"{folder} holds a pickle ({pickles[0]}) and no safetensors. Weights load from safetensors only: "
                "a pickle can run code. Convert it, for instance with diffusers' save_pretrained.",
                reason=Reason.PICKLE_REFUSED,
            )
        raise FailedPreconditionError(
            f"{folder} holds no *.safetensors file; check the source.", reason=Reason.WEIGHTS_UNAVAILABLE
        )
    for path in files:
        check_file(path)
    return files


def check_file(path: Path) -> None:
    """DataLossError unless the file's header parses and the file holds all the data that it describes."""
    try:
        with safe_open(path, framework="pt") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        raise DataLossError(
            f"{path} is damaged or truncated ({error}; {path.stat().st_size} bytes). Fetch the file again."
        ) from None


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
