"""Single files as Stable Diffusion's original code writes them, made from pipelines of diffusers."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}


def _replaced(name: str, words: dict[str, str]) -> str:
    return next((new + name[len(old) :] for old, new in words.items() if name.startswith(old + ".")), name)


def unet(network: UNet2DConditionModel, state: Tensors) -> Tensors:
    """The keys of a UNet; `state` is its state dict."""
    mapping = DIFFUSERS_TO_LDM_MAPPING["unet"]
    plain = mapping["layers"] | (mapping["addition_embed_type"] if network.config.addition_embed_type else {})
    layers = network.config.layers_per_block
    has_attention = ["CrossAttn" in kind for kind in network.config.up_block_types]

    def renamed(key: str) -> str:
        if key in plain:
            return str(plain[key])
        part, _, rest = key.partition(".")
        if part == "mid_block":
            kind, number, name = rest.split(".", 2)
            place = {"resnets0": 0, "attentions0": 1, "resnets1": 2}[kind + number]
            return f"middle_block.{place}.{_replaced(name, _UNET_RESNET) if kind == 'resnets' else name}"
        block, kind, number, name = rest.split(".", 3)
        row = int(block) * (layers + 1) + int(number) + (1 if part == "down_blocks" else 0)
        side = "input_blocks" if part == "down_blocks" else "output_blocks"
        if kind == "resnets":
            return f"{side}.{row}.0.{_replaced(name, _UNET_RESNET)}"
        if kind == "attentions":
            return f"{side}.{row}.1.{name}"
        if kind == "downsamplers":
            return f"input_blocks.{row + layers}.0.{name.replace('conv.', 'op.')}"
        return f"output_blocks.{row + layers}.{2 if has_attention[int(block)] else 1}.{name}"

    return {f"model.diffusion_model.{renamed(key)}": tensor for key, tensor in state.items()}


def vae(network: AutoencoderKL, state: Tensors, *, prefix: str = "first_stage_model.") -> Tensors:
    last = len(network.config.up_block_types) - 1
    made: Tensors = {}
    for key, tensor in state.items():
        name = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{last - int(m[1])}.block.", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{last - int(m[1])}.upsample.", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        if "mid_block.attentions.0." in name:
            side, attention = name.split("mid_block.attentions.0.")
            name = f"{side}mid.attn_1.{_replaced(attention, _VAE_ATTENTION)}"
            tensor = tensor[:, :, None, None] if tensor.dim() == 2 else tensor
        made[prefix + name] = tensor
    return made


def clip(state: Tensors, *, prefix: str) -> Tensors:
    return {f"{prefix}text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in state.items()}


def open_clip(state: Tensors, *, prefix: str) -> Tensors:
    words = {
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    inner = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "self_attn": "attn",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    state = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
    made: Tensors = {}
    for key, tensor in state.items():
        if key == "text_projection.weight":
            made["text_projection"] = tensor.T.contiguous()
        elif key in words:
            made[words[key]] = tensor
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)", key):
            number, name = match[1], match[2]
            if "q_proj" in name:
                parts = [state[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                made[f"transformer.resblocks.{number}.attn.in_proj_{name.rpartition('.')[2]}"] = torch.cat(parts)
            elif "k_proj" not in name and "v_proj" not in name:
                made[f"transformer.resblocks.{number}.{_replaced(name, inner)}"] = tensor
    return {prefix + key: tensor for key, tensor in made.items()}


def tensors(pipeline: Any, *, second_version: bool = False) -> Tensors:
    """The content of a pipeline's single_file; with the text encoder as Stable Diffusion 2.x has it, or as 1.x."""
    made = unet(pipeline.unet, pipeline.unet.state_dict()) | vae(pipeline.vae, pipeline.vae.state_dict())
    first = pipeline.text_encoder.state_dict()
    if isinstance(pipeline, StableDiffusionXLPipeline):
        second = pipeline.text_encoder_2.state_dict()
        made |= clip(first, prefix="conditioner.embedders.0.transformer.")
        return made | open_clip(second, prefix="conditioner.embedders.1.model.")
    if second_version:
        width = pipeline.text_encoder.config.hidden_size
        # Published files have these two as well, which the encoder does not use.
        unused = {"text_projection": torch.eye(width), "logit_scale": torch.tensor(4.6)}
        prefix = "cond_stage_model.model."
        return made | open_clip(first, prefix=prefix) | {prefix + key: tensor for key, tensor in unused.items()}
    return made | clip(first, prefix="cond_stage_model.transformer.")


def written(root: Path, folder: Path, *, xl: bool = False, second_version: bool = False) -> Path:
    """A single file of the pipeline in `root`, with its configurations and tokenizers beside it; the file."""
    cls: Any = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
    options = {} if xl else {"safety_checker": None}
    pipeline = cls.from_pretrained(root, dtype=torch.float32, **options)
    folder.mkdir(parents=True)
    file = folder / "all-in_one.v1.safetensors"
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors(pipeline, second_version=second_version).items()}, file
    )
    for part in root.iterdir():
        if part.is_dir() and part.name.startswith(("unet", "vae", "text_encoder", "tokenizer", "scheduler")):
            shutil.copytree(part, folder / part.name, ignore=shutil.ignore_patterns("*.safetensors"))
    return file
