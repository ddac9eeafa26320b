"""The names by which adapter files refer to the layers of a component.

Tools write the same layer in different ways: diffusers and PEFT by its module's name, kohya's scripts with `_` for every
`.`, and for SDXL by the names of the original SDXL code. Files from before transformers 5 have `text_model.` before the
names of a CLIP text encoder; diffusers' oldest files have other names for its projections. Each function returns the names
that one component accepts, with `_` for every `.`, and the name of the module for each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

# Layers of a residual block in the original code.
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
# Layers outside the blocks.
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_OLD_PROJECTIONS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
_TEXT_MODEL = "text_model."


def of_unet(network: nn.Module) -> dict[str, str]:
    """The names of the layers of a UNet2DConditionModel: diffusers' and the original code's."""
    blocks = _OUTSIDE | dict(_blocks(network))
    return _flat((name, spelled) for name in _layers(network) for spelled in _unet_spellings(name, blocks))


def of_clip(encoder: nn.Module) -> dict[str, str]:
    """The names of the layers of a CLIP text encoder, with and without `text_model.`."""
    return _flat((name, spelled) for name in _layers(encoder) for spelled in _clip_spellings(name))


def _layers(module: nn.Module) -> list[str]:
    return [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


def _flat(spellings: Iterable[tuple[str, str]]) -> dict[str, str]:
    return {spelled.replace(".", "_"): name for name, spelled in spellings}


def _unet_spellings(name: str, blocks: dict[str, str]) -> Iterator[str]:
    yield name
    if name.endswith(".to_out.0"):
        yield name.removesuffix(".0")
    for block, original in blocks.items():
        if name == block:
            yield original
        elif name.startswith(f"{block}."):
            inner = name.removeprefix(f"{block}.")
            yield f"{original}.{_RESNET.get(inner, inner)}"


def _blocks(network: Any) -> Iterator[tuple[str, str]]:
    """The parts of the blocks of a UNet, and their names in the original code, which counts on through all blocks."""
    # The first input block is the convolution before the blocks.
    index = 1
    for i, block in enumerate(network.down_blocks):
        for j in range(len(block.resnets)):
            yield f"down_blocks.{i}.resnets.{j}", f"input_blocks.{index}.0"
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{index}.1"
            index += 1
        if block.downsamplers:
            yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{index}.0.op"
            index += 1
    index = 0
    for i, block in enumerate(network.up_blocks):
        for j in range(len(block.resnets)):
            yield f"up_blocks.{i}.resnets.{j}", f"output_blocks.{index}.0"
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{index}.1"
            index += 1
        if block.upsamplers:
            # In the last output block of its level, after the attention if there is one.
            position = 2 if getattr(block, "attentions", None) else 1
            yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{index - 1}.{position}.conv"


def _clip_spellings(name: str) -> Iterator[str]:
    stem = name.removeprefix(_TEXT_MODEL)
    parent, _, last = stem.rpartition(".")
    for prefix in ("", _TEXT_MODEL):
        yield prefix + stem
        if last in _OLD_PROJECTIONS:
            yield f"{prefix}{parent}.{_OLD_PROJECTIONS[last]}"
