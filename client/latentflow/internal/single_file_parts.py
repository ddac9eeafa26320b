"""Single files: what the names of their tensors show, and where the configuration of a part lies beside one.

Neither torch nor safetensors is needed, so `latentflow validate` refuses the files that a model server refuses.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from latentflow.errors import FailedPreconditionError
from latentflow.reasons import Reason

# How the names of a denoiser's tensors begin in a file that holds a whole model.
NETWORK = "model.diffusion_model."


def is_whole(keys: Collection[str]) -> bool:
    """Whether tensors of these names are those of a whole model, not for instance of a VAE."""
    return any(key.startswith(NETWORK) for key in keys)


def config_folder(file: Path, part: str) -> Path | None:
    """The folder beside a single file that holds the configuration of a part; None if there is none."""
    folders = (file.parent / part, *([file.parent] if part in ("vae", "controlnet") else []))
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def check(file: Path, keys: Collection[str], part: str) -> None:
    """FailedPreconditionError for a LoRA, and for a part alone without its configuration.

    Args:
        keys: The names of the file's tensors.
        part: The part that is read from the file, such as vae.
    """
    if is_whole(keys):
        return
    if key := next((key for key in keys if ".lora_" in key), None):
        raise FailedPreconditionError(
            f"{file} is a LoRA (key {key}). Put it into the folder of a LoRA store, and name the base model here.",
            reason=Reason.WEIGHTS_MISMATCH,
        )
    if config_folder(file, part) is None:
        raise FailedPreconditionError(
            f"{file} is not a file of a whole model, and there is no {part}/config.json beside it. If it holds a "
            f"{part}, copy that file of the base model there; otherwise correct the source.",
            reason=Reason.WEIGHTS_UNAVAILABLE,
        )
