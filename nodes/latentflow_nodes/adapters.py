"""LoRA adapters: read from a file, merged into a model's weights exactly, and undone bit for bit.

The store reads (`load`), the denoiser and the text encoder merge (`Merger`). A layer's merged weight is
W + sum_i weight_i * (alpha_i / rank_i) * B_i A_i, computed in float32 from the pristine W each time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from latentflow.errors import FailedPreconditionError

from latentflow_nodes import weights

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
FILE_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer's change: B A times alpha / rank. `a` is [rank, in, ...], `b` is [out, rank, ...]."""

    a: torch.Tensor
    b: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    def delta(self) -> torch.Tensor:
        """The change at weight 1, float32, [out, in * ...]."""
        a = self.a.to(torch.float32).flatten(1)
        b = self.b.to(torch.float32).flatten(1)
        return (b @ a) * (self.alpha / self.rank)


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
    weights.check_file(path)
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
    return Adapter(name=name, digest=weights.digest([path]), components=components)


class Merger:
    """Merges adapters into one module's weights.

    Keeps the pristine values of every weight it has touched in host memory, so that any set of adapters, none too, is
    reached from them and nothing drifts. Not thread-safe: the thread that runs the module calls it.
    """

    def __init__(self, module: torch.nn.Module, *, what: str) -> None:
        self._module = module
        self._what = what
        self._pristine: dict[str, torch.Tensor] = {}
        self._touched: set[str] = set()

    def check(self, adapter: str, layers: Mapping[str, Layer]) -> None:
        """FailedPreconditionError unless every layer exists here and has this shape."""
        for name, layer in layers.items():
            weight = self._weight(name)
            if weight is None:
                raise FailedPreconditionError(
                    f"Adapter {adapter!r} changes layer {name!r}, which this {self._what} does not have; "
                    "it was trained for another base model.",
                    reason="ADAPTER_MISMATCH",
                )
            wanted = (weight.shape[0], math.prod(weight.shape[1:]))
            if (layer.b.shape[0], math.prod(layer.a.shape[1:])) != wanted:
                raise FailedPreconditionError(
                    f"Adapter {adapter!r} changes layer {name!r} by {layer.b.shape[0]}x{math.prod(layer.a.shape[1:])} "
                    f"where this {self._what} has {wanted[0]}x{wanted[1]}; it was trained for another base model.",
                    reason="ADAPTER_MISMATCH",
                )

    @torch.no_grad()
    def apply(self, adapters: Sequence[tuple[Mapping[str, Layer], float]]) -> None:
        """Makes the weights pristine plus exactly these adapters, each with its weight, in this order."""
        deltas: dict[str, torch.Tensor] = {}
        for layers, weight in adapters:
            for name, layer in layers.items():
                delta = layer.delta() * weight
                deltas[name] = deltas[name] + delta if name in deltas else delta
        for name in self._touched - deltas.keys():
            self._set(name, self._pristine[name])
        for name, delta in deltas.items():
            parameter = self._weight(name)
            if parameter is None:
                raise KeyError(name)
            if name not in self._pristine:
                self._pristine[name] = parameter.detach().to("cpu", copy=True)
            pristine = self._pristine[name]
            merged = pristine.to(torch.float32) + delta.reshape(pristine.shape)
            self._set(name, merged.to(pristine.dtype))
        self._touched = set(deltas)

    def _weight(self, name: str) -> torch.nn.Parameter | None:
        try:
            weight = self._module.get_submodule(name).weight
        except AttributeError:
            return None
        return weight if isinstance(weight, torch.nn.Parameter) else None

    def _set(self, name: str, value: torch.Tensor) -> None:
        # In place: the address stays, so captured graphs and shared storage stay valid.
        parameter = self._weight(name)
        if parameter is None:
            raise KeyError(name)
        parameter.copy_(value)


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
