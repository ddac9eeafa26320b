"""LoRA files: finds the adapters of a folder and reads their layers, whichever tool wrote them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from latentflow.errors import FailedPreconditionError

from latentflow_nodes.adapters.layers import Layer
from latentflow_nodes.weights import files

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
FILE_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter: its layers by component and name."""

    name: str
    digest: str
    components: Mapping[str, Mapping[str, Layer]] = field(repr=False)

    @property
    def rank(self) -> int:
        return max((layer.rank for layers in self.components.values() for layer in layers.values()), default=0)


def find(folder: Path) -> dict[str, Path]:
    """Adapter files of a store's folder by name: `NAME.safetensors`, or `NAME/` with diffusers' or PEFT's file in it."""
    found = {path.stem: path for path in sorted(folder.glob("*.safetensors"))}
    for sub in sorted(path for path in folder.iterdir() if path.is_dir()):
        for name in FILE_NAMES:
            if (sub / name).is_file():
                found[sub.name] = sub / name
                break
    return found


def load(name: str, path: Path) -> Adapter:
    """Reads an adapter file (diffusers, PEFT or kohya keys). FailedPreconditionError for keys that fit nowhere."""
    files.check_file(path)
    loader = _loader(path)
    try:
        state, alphas, metadata = loader.lora_state_dict(
            str(path.parent),
            weight_name=path.name,
            return_lora_metadata=True,
            local_files_only=True,
            use_safetensors=True,
        )
    except (ValueError, KeyError, AttributeError) as error:
        raise FailedPreconditionError(
            f"Adapter {name!r} ({path}) is none that diffusers understands: {error}", reason="ADAPTER_UNREADABLE"
        ) from None
    components: dict[str, dict[str, Layer]] = {}
    unused = set(state)
    for component in COMPONENTS:
        keys = [key for key in state if key.startswith(f"{component}.")]
        unused -= set(keys)
        if keys:
            part = {key.removeprefix(f"{component}."): state[key] for key in keys}
            own = {
                k.removeprefix(f"{component}."): v for k, v in (alphas or {}).items() if k.startswith(f"{component}.")
            }
            given = {k.removeprefix(f"{component}."): v for k, v in (metadata or {}).items() if k.startswith(component)}
            components[component] = _layers(name, component, part, alphas=own, metadata=given)
    if unused or not components:
        shown = ", ".join(sorted(unused)[:3]) or "no LoRA layer at all"
        raise FailedPreconditionError(
            f"Adapter {name!r} ({path}) has keys that belong to no known component: {shown}. "
            f"Keys begin with one of {', '.join(COMPONENTS)}; was it trained for another kind of model?",
            reason="ADAPTER_UNREADABLE",
        )
    return Adapter(name=name, digest=files.digest([path]), components=components)


def _loader(path: Path) -> Any:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        keys = list(opened.keys())
    second = any("text_encoder_2" in key or "lora_te2" in key for key in keys)
    return StableDiffusionXLLoraLoaderMixin if second else StableDiffusionLoraLoaderMixin


def _layers(
    name: str, component: str, state: dict[str, Any], *, alphas: dict[str, Any], metadata: dict[str, Any]
) -> dict[str, Layer]:
    if component == "unet":
        state = convert_unet_state_dict_to_peft(state)
    else:
        state = convert_state_dict_to_peft(convert_state_dict_to_diffusers(state))
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        layer, _, rest = key.rpartition(".lora_")
        kind = rest.removesuffix(".weight")
        if kind not in ("A", "B") or not layer:
            raise FailedPreconditionError(
                f"Adapter {name!r} has the key {component}.{key}, which is no LoRA pair's; "
                "only plain LoRA (lora_A, lora_B, alpha) is served.",
                reason="ADAPTER_UNREADABLE",
            )
        pairs.setdefault(layer, {})[kind] = tensor
    layers = {}
    for layer, pair in pairs.items():
        if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise FailedPreconditionError(
                f"Adapter {name!r}: layer {component}.{layer} lacks one of lora_A and lora_B, or their ranks differ.",
                reason="ADAPTER_UNREADABLE",
            )
        rank = pair["A"].shape[0]
        layers[layer] = Layer(a=pair["A"], b=pair["B"], alpha=_alpha(layer, rank, alphas=alphas, metadata=metadata))
    return layers


def _alpha(layer: str, rank: int, *, alphas: dict[str, Any], metadata: dict[str, Any]) -> float:
    """PEFT's rules: the layer's own alpha, the config's pattern, the config's alpha, else the rank."""
    own = alphas.get(f"{layer}.alpha")
    if own is not None:
        alpha = float(own)
    else:
        pattern = metadata.get("alpha_pattern") or {}
        matching = [value for key, value in pattern.items() if layer == key or layer.endswith(f".{key}")]
        alpha = float(matching[0] if matching else metadata.get("lora_alpha", rank))
    # rank-stabilised LoRA scales by alpha / sqrt(rank)
    return alpha * math.sqrt(rank) if metadata.get("use_rslora") else alpha
