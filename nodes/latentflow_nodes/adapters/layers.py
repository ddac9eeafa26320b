"""The layers of an adapter: what an adapter changes of one component, and their form as named tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer's change: B A times alpha / rank. `a` is [rank, in, ...], `b` is [out, rank, ...]."""

    a: torch.Tensor
    b: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def factors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """B, [out, rank], and A, [rank, in * ...], in float32."""
        return self.b.to(device, torch.float32).flatten(1), self.a.to(device, torch.float32).flatten(1)


Layers = Mapping[str, Layer]


def flat(name: str) -> str:
    """A layer's name as the keys of `Family.layer_names` have it."""
    return name.replace(".", "_")


def by_module(
    adapters: Sequence[tuple[Layers, float]], *, names: Mapping[str, str]
) -> dict[str, list[tuple[Layer, float]]]:
    """The layers of adapters, each with the weight of its adapter, by the name of the module that they change.

    Args:
        adapters: With their weights; the order of the adapters is kept.
        names: As `Family.layer_names` returns them.
    """
    found: dict[str, list[tuple[Layer, float]]] = {}
    for layers, weight in adapters:
        for name, layer in layers.items():
            found.setdefault(names[flat(name)], []).append((layer, weight))
    return found


def pack_layers(layers: Layers) -> dict[str, torch.Tensor]:
    """Layers as the named tensors of an Adapter bundle."""
    return {
        f"{name}.{key}": value
        for name, layer in layers.items()
        for key, value in (
            ("lora_A", layer.a),
            ("lora_B", layer.b),
            ("alpha", torch.tensor(layer.alpha, dtype=torch.float32)),
        )
    }


def unpack_layers(tensors: Mapping[str, torch.Tensor]) -> dict[str, Layer]:
    """The layers of an Adapter bundle."""
    names = [key.removesuffix(".lora_A") for key in tensors if key.endswith(".lora_A")]
    return {
        name: Layer(
            a=tensors[f"{name}.lora_A"], b=tensors[f"{name}.lora_B"], alpha=float(tensors[f"{name}.alpha"].item())
        )
        for name in names
    }


def layers_bytes(layers: Layers) -> int:
    """Bytes of the layers' tensors."""
    return sum(t.numel() * t.element_size() for layer in layers.values() for t in (layer.a, layer.b))
