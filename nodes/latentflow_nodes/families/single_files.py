"""Single files: all weights of a Stable Diffusion model in one file, with the keys of its original code.

diffusers names the kind of a single file and converts its keys. Configurations, scheduler and tokenizers are not in the file:
those beside it are used, and otherwise those of `single_file_configs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.loaders import single_file_utils
from latentflow.errors import FailedPreconditionError
from latentflow.internal import single_file_parts, weight_files
from latentflow.reasons import Reason

from latentflow_nodes.families.single_file_configs import CONFIGS, TITLES
from latentflow_nodes.weights import files

_CONVERSIONS: Mapping[str, Any] = {
    "UNet2DConditionModel": single_file_utils.convert_ldm_unet_checkpoint,
    "AutoencoderKL": single_file_utils.convert_ldm_vae_checkpoint,
    "ControlNetModel": single_file_utils.convert_controlnet_checkpoint,
}
# How the keys of a text encoder begin: of CLIP as transformers has it, and of OpenCLIP.
_ENCODERS = {
    "text_encoder": (
        "cond_stage_model.transformer.",
        "conditioner.embedders.0.transformer.",
        "cond_stage_model.model.",
    ),
    "text_encoder_2": ("conditioner.embedders.1.model.",),
}
_PARTS = {"Denoiser": "unet", "VAE": "vae", "ControlNet": "controlnet", "TextEncoder": "text_encoder"}
# Tensors that mark a model which predicts something else than its kind does.
_MARKS = ("v_pred", "edm_vpred", "edm_mean")


def kind(file: Path) -> str | None:
    """diffusers' name of what a single file holds; None where it is no whole model, but for instance a VAE."""
    if not single_file_parts.is_whole(files.keys(file)):
        return None
    return str(single_file_utils.infer_diffusers_model_type(_tensors(file)))


def config(file: Path, part: str) -> dict[str, Any]:
    """The configuration of a part: the one beside the file, or the one of the file's kind.

    FailedPreconditionError for a LoRA, for a single file of another kind, and for a part alone without its configuration.
    """
    single_file_parts.check(file, files.keys(file), part)
    if (folder := single_file_parts.config_folder(file, part)) is not None:
        return weight_files.config(folder)
    known = str(kind(file))
    if known not in CONFIGS:
        raise FailedPreconditionError(
            f"{file} is a single file of the kind {known}; this version serves {', '.join(CONFIGS)}.",
            reason=Reason.UNSUPPORTED_FAMILY,
        )
    if part not in CONFIGS[known]:
        raise FailedPreconditionError(
            f"{file} is a single file of the kind {known}, which has no {part}.", reason=Reason.WEIGHTS_UNAVAILABLE
        )
    return CONFIGS[known][part]


def role_config(file: Path, role: str) -> dict[str, Any]:
    """The configuration by which the family of a file is known: of a whole model that of its denoiser."""
    return config(file, "unet" if single_file_parts.is_whole(files.keys(file)) else _PARTS[role])


def _assumed(file: Path, part: str) -> str:
    """What to do if the built-in configuration of a part is not that of the file; empty if the configuration is beside it."""
    if single_file_parts.config_folder(file, part) is not None:
        return ""
    return (
        f" The file has no {part}/config.json beside it, so the built-in configuration of {TITLES[str(kind(file))]} was "
        f"assumed. If its {part} has other sizes, put its config.json into {file.parent / part}."
    )


def scheduler(file: Path) -> dict[str, Any]:
    """The configuration of the scheduler. FailedPreconditionError where the file does not determine it."""
    name = "scheduler_config.json"
    for folder in (file.parent / "scheduler", file.parent):
        if (folder / name).is_file():
            return weight_files.config(folder, name)
    found = CONFIGS.get(kind(file) or "", {}).get("scheduler")
    if found is None or set(_MARKS) & set(files.keys(file)):
        raise FailedPreconditionError(
            f"{file} does not determine what its network predicts. Put scheduler/{name} of its base model beside it.",
            reason=Reason.WEIGHTS_UNAVAILABLE,
        )
    return found


def index(file: Path, parts: Mapping[str, str]) -> dict[str, Any]:
    """What a pipeline's index would name: the classes of these text encoders, and their tokenizers.

    Args:
        parts: Tokenizers by encoder.
    """
    classes = {part: config(file, part)["architectures"][0] for part in parts}
    return {part: ["transformers", cls] for part, cls in classes.items()} | {
        tokenizer: ["transformers", "CLIPTokenizer"] for tokenizer in parts.values()
    }


def network(cls: Any, file: Path, part: str, dtype: torch.dtype) -> torch.nn.Module:
    """A network of diffusers. FailedPreconditionError where the file lacks some of its weights, or has others."""
    module = empty(cls, file, part)
    module.load_state_dict(converted(cls, file, part, module.state_dict()), assign=True)
    return module.to(dtype).eval()


def empty(cls: Any, file: Path, part: str) -> torch.nn.Module:
    """A network of diffusers without weights."""
    with init_empty_weights():
        module: torch.nn.Module = cls.from_config(config(file, part))
    return module


def converted(cls: Any, file: Path, part: str, needed: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a network by their names in diffusers, mapped into memory. Raises as `network`.

    Args:
        needed: The state of the network, of which only names and shapes count.
    """
    tensors = _tensors(file)
    try:
        # Some files have the keys of diffusers already.
        found = (
            tensors
            if needed.keys() == tensors.keys()
            else _CONVERSIONS[cls.__name__](tensors, config=config(file, part))
        )
    except KeyError as missing:
        found = {}
        needed = {str(missing.args[0]): torch.empty(0)}
    _check(file, part, needed, found)
    return found


def text_encoder(cls: Any, file: Path, part: str, dtype: torch.dtype) -> torch.nn.Module:
    """A text encoder of transformers. FailedPreconditionError where the file lacks some of its weights, or has others."""
    with init_empty_weights(include_buffers=False):
        encoder: torch.nn.Module = cls(cls.config_class.from_dict(config(file, part)))
    tensors = _tensors(file)
    prefix = next((one for one in _ENCODERS[part] if any(key.startswith(one) for key in tensors)), None)
    if prefix is None:
        raise FailedPreconditionError(
            f"{file} contains no weights of {part}: no key begins with {' or '.join(_ENCODERS[part])}; name a file that "
            "contains them.",
            reason=Reason.WEIGHTS_MISMATCH,
        )
    if prefix.endswith(".transformer."):
        found = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    else:
        found = single_file_utils.convert_open_clip_checkpoint(encoder, tensors, prefix=prefix)
    if not hasattr(encoder, "text_model"):
        # transformers 5 has no such level in an encoder without a projection.
        found = {key.removeprefix("text_model."): tensor for key, tensor in found.items()}
    needed = encoder.state_dict()
    # Files of older versions have the positions, and some a projection, which the encoder does not use.
    found = {key: tensor for key, tensor in found.items() if key in needed}
    _check(file, part, needed, found)
    encoder.load_state_dict(found, assign=True)
    return encoder.to(dtype).eval()


def _check(file: Path, part: str, needed: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    report = files.differences(
        needed={name: tensor.shape for name, tensor in needed.items()},
        found={name: tensor.shape for name, tensor in found.items()},
    )
    if any(report.values()):
        files.check_complete(file, report, part=part, remedy=_assumed(file, part))


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    """Mapped into memory: only what is used is read."""
    loaded: dict[str, torch.Tensor] = single_file_utils.load_single_file_checkpoint(str(file), local_files_only=True)
    return loaded
