"""The names of weight files: which of a folder's files diffusers and transformers read, and why they read none. Pure.

A component's weights are one file, or several with an index. A variant, such as fp16, is part of the names of both.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from latentflow.errors import FailedPreconditionError
from latentflow.reasons import Reason

# Of diffusers and of transformers.
STEMS = ("diffusion_pytorch_model", "model")
SUFFIX = ".safetensors"
# The files of a LoRA in a folder of its own.
DIFFUSERS_LORA, PEFT_LORA = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD = r"(?:-\d+-of-\d+)?"
_NAME = re.compile(rf"(?:{'|'.join(STEMS)}){_SHARD}(?:\.([A-Za-z0-9_-]+?))?{_SHARD}\.safetensors")
_SHOWN = 3
_CONVERT = (
    "Weights load from safetensors only: a pickle can run code. 'Convert a pickle' in docs/weights.md has a program that "
    "converts it."
)


def whole(stem: str, variant: str | None) -> str:
    """The name of the one file that holds all weights."""
    return f"{stem}{_dotted(variant)}{SUFFIX}"


def index(stem: str, variant: str | None) -> str:
    """The name of the index of weights in several files."""
    return f"{stem}{SUFFIX}.index{_dotted(variant)}.json"


def is_component(name: str) -> bool:
    """Whether a file of this name holds the weights of a component, or some of them."""
    return _NAME.fullmatch(name) is not None


def has_weights(names: Iterable[str]) -> bool:
    """Whether any of these files may hold weights."""
    return any(name.endswith((SUFFIX, *PICKLES)) for name in names)


def variants(names: Iterable[str]) -> list[str]:
    """The variants of the weights among these files, without the empty one."""
    return sorted({match[1] for name in names if (match := _NAME.fullmatch(name)) and match[1]})


def refusal(folder: str, names: Collection[str], *, variant: str | None) -> FailedPreconditionError:
    """Why the weights of a component cannot be read from a folder with these files.

    Args:
        folder: Its name in the message.
        variant: The one that the source names.
    """
    there = variants(names)
    if found := [name for stem in STEMS if (name := whole(stem, variant)) in names]:
        return _not_read(folder, found[0], names)
    if variant and (there or _has_plain(names)):
        known = " and ".join([*there, *(["files without a variant"] if _has_plain(names) else [])])
        return _refusal(
            f"{folder} holds no weights of the variant {variant!r}; it holds {known}. Correct source.variant."
        )
    if not variant and there:
        return _refusal(
            f"{folder} holds its weights only as the variant {' and '.join(there)}. Set source.variant: {there[0]} for this "
            "model in the workflow."
        )
    if _has_plain(names):
        return _refusal(
            f"{folder} holds parts of weights without their index {index(STEMS[0], variant)}; fetch the folder again."
        )
    if others := sorted(name for name in names if name.endswith(SUFFIX)):
        return _refusal(
            f"{folder} holds {listed(others)}, which is not the name of a component's weights: "
            f"{' or '.join(whole(stem, variant) for stem in STEMS)}. To serve a single file that holds a whole model, name it "
            "in the uri; otherwise rename the file."
        )
    if pickles := sorted(name for name in names if name.endswith(PICKLES)):
        return FailedPreconditionError(
            f"{folder} holds a pickle ({pickles[0]}) and no safetensors. {_CONVERT}",
            reason=Reason.PICKLE_REFUSED,
        )
    if ggufs := sorted(name for name in names if name.endswith(".gguf")):
        return _refusal(
            f"{folder} holds {listed(ggufs)}. Weights load from safetensors only; use a folder that has these."
        )
    return _refusal(f"{folder} holds no *{SUFFIX} file; check the source.")


def refusal_of_file(file: str) -> FailedPreconditionError:
    """Why a file cannot be read that a source names in its subfolder, or in its uri with another suffix than .safetensors."""
    if file.endswith(PICKLES):
        return FailedPreconditionError(f"{file} is a pickle. {_CONVERT}", reason=Reason.PICKLE_REFUSED)
    if file.endswith(SUFFIX):
        return _refusal(f"{file} is a file, and source.subfolder names a folder. Name the file in the uri.")
    return _refusal(f"{file} is no *{SUFFIX} file. Weights load from safetensors only; name a file or folder of these.")


def _not_read(folder: str, file: str, names: Collection[str]) -> FailedPreconditionError:
    """Why a role has not read the weights that are there."""
    if "config.json" in names:
        others = " or ".join(f"{stem}*{SUFFIX}" for stem in STEMS if not file.startswith(stem))
        return _refusal(f"{folder} holds {file}, and this role reads {others}. Correct the uri, or rename the file.")
    return _refusal(
        f"{folder} holds {file} and no config.json that describes it. Add the config.json of the component. If the file "
        f"holds a whole model, name the file itself in the uri, which then ends with /{file}."
    )


def listed(names: Collection[str]) -> str:
    """Some names as part of a sentence."""
    some = sorted(names)
    more = f" and {len(some) - _SHOWN} more" if len(some) > _SHOWN else ""
    return ", ".join(some[:_SHOWN]) + more


def _has_plain(names: Iterable[str]) -> bool:
    return any((match := _NAME.fullmatch(name)) and not match[1] for name in names)


def _dotted(variant: str | None) -> str:
    return f".{variant}" if variant else ""


def _refusal(message: str) -> FailedPreconditionError:
    return FailedPreconditionError(message, reason=Reason.WEIGHTS_UNAVAILABLE)
