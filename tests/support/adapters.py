"""LoRA files for tests, with random weights, as the common tools write them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import save_file

Pair = tuple[torch.Tensor, torch.Tensor]
Tensors = dict[str, torch.Tensor]


def layers_of(module: torch.nn.Module, *endings: str) -> dict[str, torch.nn.Linear | torch.nn.Conv2d]:
    """The Linear and Conv2d layers of a module by name; only those with one of these last segments, if any is given."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
        and (not endings or name.removesuffix(".0").rsplit(".", 1)[-1] in endings)
    }


def pair(layer: torch.nn.Linear | torch.nn.Conv2d, rank: int) -> Pair:
    """Random A and B of a layer. Those of a convolution are convolutions."""
    shape = layer.weight.shape
    a, b = torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank, *[1] * (len(shape) - 2))
    # Visible, and small enough that the latents of a network with random weights stay small.
    strength = 0.2 if len(shape) == 2 else 0.05
    return a * strength, b * strength


def kohya(prefix: str, pairs: Mapping[str, Pair], alpha: float | None) -> Tensors:
    """Tensors with kohya's keys.

    Args:
        pairs: By the layer's name in the model of the trainer, with dots.
    """
    state: Tensors = {}
    for name, (a, b) in pairs.items():
        key = prefix + name.replace(".", "_")
        state |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
        if alpha is not None:
            state[f"{key}.alpha"] = torch.tensor(alpha)
    return state


def diffusers(component: str, pairs: Mapping[str, Pair]) -> Tensors:
    """Tensors with the keys that diffusers and PEFT share."""
    state: Tensors = {}
    for name, (a, b) in pairs.items():
        state |= {f"{component}.{name}.lora_A.weight": a, f"{component}.{name}.lora_B.weight": b}
    return state


def diffusers_linear_layer(component: str, pairs: Mapping[str, Pair]) -> Tensors:
    """Tensors with the keys of diffusers before PEFT: those of 2023, after the attention processors."""
    middle = "lora" if component == "unet" else "lora_linear_layer"
    state: Tensors = {}
    for name, (a, b) in pairs.items():
        state |= {f"{component}.{name}.{middle}.down.weight": a, f"{component}.{name}.{middle}.up.weight": b}
    return state


def diffusers_processor(component: str, pairs: Mapping[str, Pair]) -> Tensors:
    """Tensors with diffusers' first keys, for attention projections only."""
    old = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
    state: Tensors = {}
    for name, (a, b) in pairs.items():
        parent, _, last = name.removesuffix(".0").rpartition(".")
        key = f"{component}.{parent}{'.processor' if component == 'unet' else ''}.{old.get(last, last)}_lora"
        state |= {f"{key}.down.weight": a, f"{key}.up.weight": b}
    return state


def save(path: Path, state: Tensors, *, config: Mapping[str, Any] | None = None) -> None:
    """Writes a file; `config` goes into its header as diffusers writes it, with keys such as `unet.r`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"format": "pt"} | ({"lora_adapter_metadata": json.dumps(config)} if config else {})
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path, metadata=header)


@dataclass(frozen=True, kw_only=True)
class OriginalUNet:
    """The shape of a UNet in the original Stable Diffusion code.

    Attributes:
        channels: Of each level.
        depths: Transformer blocks in an attention of each level; 0: no attention.
        middle_depth: The same of the middle block.
        blocks: Residual blocks of a level.
    """

    channels: Sequence[int]
    depths: Sequence[int]
    middle_depth: int
    blocks: int
    has_label: bool = False

    def layers(self) -> Iterator[str]:
        """The names of its linear and convolution layers."""
        yield from ("input_blocks.0.0", "out.2", "time_embed.0", "time_embed.2")
        if self.has_label:
            yield from ("label_emb.0.0", "label_emb.0.2")
        index, width, skips = 1, self.channels[0], [self.channels[0]]
        last = len(self.channels) - 1
        for level, (channels, depth) in enumerate(zip(self.channels, self.depths, strict=True)):
            for _ in range(self.blocks):
                yield from self._residual(f"input_blocks.{index}.0", changes=width != channels)
                yield from self._transformer(f"input_blocks.{index}.1", depth)
                width = channels
                skips.append(width)
                index += 1
            if level < last:
                yield f"input_blocks.{index}.0.op"
                skips.append(width)
                index += 1
        yield from self._residual("middle_block.0", changes=False)
        yield from self._transformer("middle_block.1", self.middle_depth)
        yield from self._residual("middle_block.2", changes=False)
        index = 0
        for level, (channels, depth) in reversed(list(enumerate(zip(self.channels, self.depths, strict=True)))):
            for block in range(self.blocks + 1):
                skips.pop()
                # The skip connection makes the input wider than the output.
                yield from self._residual(f"output_blocks.{index}.0", changes=True)
                yield from self._transformer(f"output_blocks.{index}.1", depth)
                if level and block == self.blocks:
                    yield f"output_blocks.{index}.{2 if depth else 1}.conv"
                index += 1
            width = channels

    @staticmethod
    def _residual(name: str, *, changes: bool) -> Iterator[str]:
        yield from (f"{name}.in_layers.2", f"{name}.emb_layers.1", f"{name}.out_layers.3")
        if changes:
            yield f"{name}.skip_connection"

    @staticmethod
    def _transformer(name: str, depth: int) -> Iterator[str]:
        if not depth:
            return
        yield from (f"{name}.proj_in", f"{name}.proj_out")
        for index in range(depth):
            block = f"{name}.transformer_blocks.{index}"
            for attention in ("attn1", "attn2"):
                yield from (f"{block}.{attention}.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0"))
            yield from (f"{block}.ff.net.0.proj", f"{block}.ff.net.2")


def names_in_diffusers(names: Sequence[str], config: Any) -> dict[str, str]:
    """The layers of diffusers' UNet by their names in the original code, as diffusers converts checkpoints."""
    checkpoint = {f"model.diffusion_model.{name}.{part}": name for name in names for part in ("weight", "bias")}
    converted = convert_ldm_unet_checkpoint(checkpoint, dict(config))
    return {name: key.removesuffix(".weight") for key, name in converted.items() if key.endswith(".weight")}
