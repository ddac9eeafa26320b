"""SDXL's networks with random weights, made on the device: their sizes are what times depend on.

The configurations are those that SDXL's weights are published with; the small ones are for a run without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

_UNET: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SMALL_UNET = _UNET | {
    "sample_size": 16,
    "block_out_channels": (8, 16, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "transformer_layers_per_block": (1, 1, 1),
    "attention_head_dim": (2, 2, 2),
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}
_VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
_SMALL_VAE = _VAE | {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}


def unet(device: str) -> UNet2DConditionModel:
    with _here(device):
        return UNet2DConditionModel(**(_SMALL_UNET if device == "cpu" else _UNET)).eval()


def vae(device: str) -> AutoencoderKL:
    with _here(device):
        return AutoencoderKL(**(_SMALL_VAE if device == "cpu" else _VAE)).eval()


def latent_side(device: str) -> int:
    """Of an image of 1024x1024, or the small one's."""
    return 16 if device == "cpu" else 128


def dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.float16


def residuals(device: str) -> dict[str, torch.Tensor]:
    """What an SDXL ControlNet answers for both halves of a guided request of 1024x1024: 102 MiB in float16."""
    side = latent_side(device)
    down = [(320, 1)] * 3 + [(320, 2)] + [(640, 2)] * 2 + [(640, 4)] + [(1280, 4)] * 2
    shapes = {f"down.{i}": (2, channels, side // by, side // by) for i, (channels, by) in enumerate(down)}
    shapes["mid"] = (2, 1280, side // 4, side // 4)
    return {name: torch.randn(shape, device=device, dtype=dtype(device)) for name, shape in shapes.items()}


@contextmanager
def _here(device: str) -> Iterator[None]:
    torch.manual_seed(1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype(device))
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)
