"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet, an autoencoder of 4 channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from latentflow.errors import LatentflowError
from PIL import Image

from latentflow_nodes.families import kinds
from latentflow_nodes.families.base import TextModel, to_images
from latentflow_nodes.families.unet import UNetFamily


class StableDiffusion(UNetFamily):
    """Stable Diffusion 1.x and 2.x."""

    name = "sd"
    title = "Stable Diffusion 1.x and 2.x"
    encoders: tuple[str, ...] = ("text_encoder",)
    tokenizers: tuple[str, ...] = ("tokenizer",)

    def owns_pipeline(self, class_name: str) -> bool:
        return class_name.startswith("StableDiffusion") and not class_name.startswith(
            ("StableDiffusionXL", "StableDiffusion3")
        )

    def owns_component(self, role: str, config: Mapping[str, Any]) -> bool:
        if role == "VAE":
            return kinds.is_text_to_image_vae(config) and not kinds.is_xl_vae(config)
        if role == "TextEncoder":
            return config.get("architectures") == ["CLIPTextModel"]
        return kinds.is_network(role, config) and not kinds.is_xl(config)

    def text_pipeline(self, parts: Mapping[str, Any], *, index: Mapping[str, Any]) -> Any:
        return StableDiffusionPipeline(
            vae=None,
            unet=None,
            scheduler=None,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **parts,
        )

    def encode(
        self,
        text: TextModel,
        *,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | None,
        guidance: bool,
        device: torch.device,
    ) -> dict[str, torch.Tensor]:
        negatives = None if negative_prompts is None else list(negative_prompts)
        positive, negative = text.pipeline.encode_prompt(list(prompts), device, 1, guidance, negatives)
        return {"prompt_embeds": positive} | ({"negative_prompt_embeds": negative} if guidance else {})

    def decode(self, vae: torch.nn.Module, latents: torch.Tensor) -> list[Image.Image | LatentflowError]:
        autoencoder: Any = vae
        decoded = autoencoder.decode(latents / autoencoder.config.scaling_factor, return_dict=False)[0]
        return to_images(decoded)
