"""LoRA files: finds the adapters of a folder and reads their layers, whichever tool wrote them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from latentflow.errors import FailedPreconditionError
from latentflow.reasons import Reason

from latentflow_nodes import families
from latentflow_nodes.adapters.layers import Layer
from latentflow_nodes.weights import files

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
    """Reads an adapter file (diffusers, PEFT or kohya keys).

    Raises:
        FailedPreconditionError: It has keys that belong to no component, or is no plain LoRA.
        DataLossError: It is damaged.
    """
    files.check_file(path)
    family = families.of_adapter(files.keys(path))
    try:
        state = family.read_adapter(path)
    except (ValueError, KeyError, AttributeError) as error:
        raise FailedPreconditionError(
            f"diffusers cannot read adapter {name!r} ({path}): {error}", reason=Reason.ADAPTER_UNREADABLE
        ) from None
    components: dict[str, dict[str, Layer]] = {}
    unused = set(state.tensors)
    for component in family.adapter_components:
        prefix = f"{component}."
        tensors = _under(state.tensors, prefix)
        unused -= {prefix + key for key in tensors}
        if tensors:
            converted = family.convert_adapter(component, tensors)
            alphas, metadata = _under(state.alphas, prefix), _under(state.metadata, prefix)
            components[component] = _layers(name, component, converted, alphas=alphas, metadata=metadata)
    if unused or not components:
        shown = ", ".join(sorted(unused)[:3]) or "no LoRA layer at all"
        raise FailedPreconditionError(
            f"Adapter {name!r} ({path}) has keys that belong to no known component: {shown}. "
            f"Keys begin with one of {', '.join(family.adapter_components)}; was it trained for another kind of model?",
            reason=Reason.ADAPTER_UNREADABLE,
        )
    return Adapter(name=name, digest=files.digest([path]), components=components)


def _under(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in tree.items() if key.startswith(prefix)}


def _layers(
    name: str, component: str, state: dict[str, Any], *, alphas: dict[str, Any], metadata: dict[str, Any]
) -> dict[str, Layer]:
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        layer, _, rest = key.rpartition(".lora_")
        kind = rest.removesuffix(".weight")
        if kind not in ("A", "B") or not layer:
            raise FailedPreconditionError(
                f"Adapter {name!r} has the key {component}.{key}, which is not part of a LoRA pair; "
                "only plain LoRA (lora_A, lora_B, alpha) is served.",
                reason=Reason.ADAPTER_UNREADABLE,
            )
        pairs.setdefault(layer, {})[kind] = tensor
    layers = {}
    for layer, pair in pairs.items():
        if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise FailedPreconditionError(
                f"Adapter {name!r}: layer {component}.{layer} lacks one of lora_A and lora_B, or their ranks differ.",
                reason=Reason.ADAPTER_UNREADABLE,
            )
        rank = pair["A"].shape[0]
        layers[layer] = Layer(a=pair["A"], b=pair["B"], alpha=_alpha(layer, rank, alphas=alphas, metadata=metadata))
    return layers


def _alpha(layer: str, rank: int, *, alphas: dict[str, Any], metadata: dict[str, Any]) -> float:
    """By PEFT's rules: the layer's own alpha, the config's pattern, the config's alpha, else the rank."""
    own = alphas.get(f"{layer}.alpha")
    if own is not None:
        alpha = float(own)
    else:
        pattern = metadata.get("alpha_pattern") or {}
        matching = [value for key, value in pattern.items() if layer == key or layer.endswith(f".{key}")]
        alpha = float(matching[0] if matching else metadata.get("lora_alpha", rank))
    # Rank-stabilised LoRA scales by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732).
    return alpha * math.sqrt(rank) if metadata.get("use_rslora") else alpha
