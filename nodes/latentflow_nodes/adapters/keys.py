"""The keys of adapter files: which part of which layer a tensor is, whichever tool wrote it. Pure.

kohya's scripts write `lora_unet_…to_q.lora_down.weight` and an alpha for each layer, diffusers and PEFT
`unet.….to_q.lora_A.weight`, and older versions of diffusers `….processor.to_q_lora.down.weight` and
`….q_proj.lora_linear_layer.down.weight`. All of them are one format with different names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from latentflow.errors import FailedPreconditionError
from latentflow.reasons import Reason

from latentflow_nodes.families.base import AdapterPart

PEFT_PREFIX = "base_model.model."


class Kind(Enum):
    """What a tensor is to its layer, whose change is B A times alpha / rank."""

    A = "A"
    B = "B"
    ALPHA = "alpha"


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key of an adapter file.

    Attributes:
        layer: The layer's name as the file has it; `Family.layer_names` lists the names that a component accepts.
    """

    component: str
    layer: str
    kind: Kind


_SUFFIXES = {
    Kind.A: re.compile(r"(?:\.lora_A|\.lora_down|\.lora_linear_layer\.down|[._]lora\.down)\.weight$"),
    Kind.B: re.compile(r"(?:\.lora_B|\.lora_up|\.lora_linear_layer\.up|[._]lora\.up)\.weight$"),
    Kind.ALPHA: re.compile(r"\.alpha$"),
}

# Keys of everything that is no plain LoRA, in the order in which they are looked for.
_OTHERS = (
    (r"dora_scale|lora_magnitude_vector|\.magnitude$", "a DoRA"),
    (r"\.hada_", "a LoHa"),
    (r"\.lokr_", "a LoKr"),
    (r"(^|[._])(oft|boft)_", "an OFT"),
    (r"\.ia3_|\.on_input$", "an IA3"),
    (r"\.lora_mid\.", "a LoCon with Tucker decomposition"),
    (r"\.[ab][12]\.weight$", "a GLoRA"),
    (r"\.vera_lambda", "a VeRA"),
    (r"\.lora_embedding_[AB]", "a LoRA of an embedding"),
    (r"\.(lora_[AB]|lora_down|lora_up)\.bias$", "a LoRA with biases"),
    (r"\.diff(_b)?$|\.[wb]_norm$", "a full difference of weights"),
    (r"emb_params|string_to_param|bundle_emb|^clip_[lg]$|^<.*>$", "a textual-inversion embedding"),
    (r"\bmotion_modules\.", "a LoRA of motion modules, which make videos (AnimateDiff)"),
    (r"^lllite_", "a ControlNet-LLLite"),
    (r"^lora_controlnet$", "a Control-LoRA"),
    (r"^(image_proj|ip_adapter)\.", "an IP-Adapter"),
    (r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.", "a checkpoint of a whole model"),
    (r"^(control_model|input_hint_block)\.", "a ControlNet"),
)


def parse(
    keys: Iterable[str], *, file: str, parts: Sequence[AdapterPart], component: str | None = None
) -> dict[str, Key]:
    """Each key of a file, parsed.

    Args:
        file: Its name in messages.
        parts: The components that adapters may change.
        component: The component that PEFT's keys belong to, where the file's folder or configuration names it.

    Raises:
        FailedPreconditionError: The file is no plain LoRA, or has a key of no use.
    """
    keys = sorted(keys)
    for pattern, what in _OTHERS:
        found = next((key for key in keys if re.search(pattern, key)), None)
        if found is not None:
            raise unusable(
                f"{file} is or contains {what} (key {found}), and this version applies plain LoRA only; "
                "use a plain LoRA instead."
            )
    parsed = {key: _parse(key, parts, component) for key in keys}
    unused = [key for key, value in parsed.items() if value is None]
    for part in parts:
        bare = [key for key in unused if key.split(".")[0] in part.roots]
        if bare and not any(suffix.search(bare[0]) for suffix in _SUFFIXES.values()):
            raise unusable(
                f"{file} has whole weights of a {part.component}, such as {bare[0]}, and not only those of a LoRA; use a LoRA, or "
                "serve the weights as a model of the workflow."
            )
        if bare:
            raise unusable(
                f"{file} has keys that do not name their component, such as {bare[0]}; save it with the save_lora_weights of "
                f"its pipeline, or put {part.prefixes[0]} before each key."
            )
    if unused or not parsed:
        raise unusable(f"{file} {_useless(unused, parts, component)}.")
    return {key: value for key, value in parsed.items() if value is not None}


def _useless(unused: Sequence[str], parts: Sequence[AdapterPart], component: str | None) -> str:
    """Why a file with these keys, of which none has a use, is refused; the end of a sentence that begins with the file."""
    if not unused:
        return "has no tensors; use a LoRA for the workflow's base model"
    owner, _ = _owner(unused[0], parts, component)
    if owner is not None:
        return (
            f"has keys of the {owner} that are no part of a LoRA layer, such as {unused[0]}. Layers have keys that end with "
            ".lora_down.weight, .lora_up.weight or .alpha (kohya), or .lora_A.weight or .lora_B.weight (diffusers, PEFT). "
            "Remove these keys, or use a plain LoRA"
        )
    prefixes = ", ".join(prefix for part in parts for prefix in part.prefixes)
    return (
        f"has keys of no component that a LoRA can change, such as {unused[0]}. Layers have keys that begin with one of "
        f"{prefixes}; remove these keys, or use a LoRA for the workflow's base model"
    )


def unusable(message: str) -> FailedPreconditionError:
    """The error of a file that is no adapter which this version can apply."""
    return FailedPreconditionError(message, reason=Reason.ADAPTER_UNREADABLE)


def _parse(key: str, parts: Sequence[AdapterPart], component: str | None) -> Key | None:
    owner, rest = _owner(key, parts, component)
    if owner is None:
        return None
    for kind, suffix in _SUFFIXES.items():
        match = suffix.search(rest)
        if match and match.start():
            # diffusers once kept the layers of an attention in an object that is no module.
            layer = rest[: match.start()].replace(".processor.", ".")
            return Key(component=owner, layer=layer, kind=kind)
    return None


def _owner(key: str, parts: Sequence[AdapterPart], component: str | None) -> tuple[str | None, str]:
    """The component of a key, and the key within it."""
    if key.startswith(PEFT_PREFIX):
        rest = key.removeprefix(PEFT_PREFIX)
        root = rest.split(".")[0]
        return component or next((part.component for part in parts if root in part.roots), None), rest
    for part in parts:
        for prefix in part.prefixes:
            if key.startswith(prefix):
                # Some scripts for training save PEFT's keys with diffusers' prefix.
                return part.component, key.removeprefix(prefix).removeprefix(PEFT_PREFIX)
    return None, key
