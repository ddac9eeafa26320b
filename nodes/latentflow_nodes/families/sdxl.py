"""Stable Diffusion XL: two CLIP text encoders, pooled embeddings and time ids beside the prompt's embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from latentflow.errors import LatentflowError
from PIL import Image

from latentflow_nodes.families import kinds
from latentflow_nodes.families.base import Conditioning, Shape, TextModel, halves, to_images
from latentflow_nodes.families.unet import UNetFamily

# Original size, crop and target size, two numbers each.
_TIME_IDS = 6


class StableDiffusionXL(UNetFamily):
    """Stable Diffusion XL."""

    name = "sdxl"
    title = "Stable Diffusion XL"
    encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    tokenizers: tuple[str, ...] = ("tokenizer", "tokenizer_2")

    def owns_pipeline(self, class_name: str) -> bool:
        return class_name.startswith("StableDiffusionXL")

    def owns_component(self, role: str, config: Mapping[str, Any]) -> bool:
        if role == "VAE":
            return kinds.is_text_to_image_vae(config) and kinds.is_xl_vae(config)
        # One of its two text encoders alone is not the family's text encoder.
        return role != "TextEncoder" and kinds.is_network(role, config) and kinds.is_xl(config)

    def text_pipeline(self, parts: Mapping[str, Any], *, index: Mapping[str, Any]) -> Any:
        return StableDiffusionXLPipeline(
            vae=None,
            unet=None,
            scheduler=None,
            force_zeros_for_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", True)),
            add_watermarker=False,
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
        positive, negative, pooled, negative_pooled = text.pipeline.encode_prompt(
            list(prompts),
            device=device,
            do_classifier_free_guidance=guidance,
            negative_prompt=None if negative_prompts is None else list(negative_prompts),
        )
        encoded = {"prompt_embeds": positive, "pooled_prompt_embeds": pooled}
        if guidance:
            encoded |= {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": negative_pooled}
        return encoded

    def conditioning_shapes(self, network: torch.nn.Module) -> dict[str, Shape]:
        config: Any = network.config
        pooled = config.projection_class_embeddings_input_dim - _TIME_IDS * config.addition_time_embed_dim
        return super().conditioning_shapes(network) | {"pooled_prompt_embeds": (1, pooled)}

    def text_inputs(self, conditioning: Conditioning, *, rows: int, width: int, height: int) -> dict[str, Any]:
        embeds = halves(conditioning, "prompt_embeds", rows=rows)
        # As the pipeline's defaults: nothing cropped, both halves alike.
        time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=embeds.dtype, device=embeds.device)
        added = {
            "text_embeds": halves(conditioning, "pooled_prompt_embeds", rows=rows),
            "time_ids": time_ids.repeat(rows, 1),
        }
        return {"encoder_hidden_states": embeds, "added_cond_kwargs": added}

    def decode(self, vae: torch.nn.Module, latents: torch.Tensor) -> list[Image.Image | LatentflowError]:
        autoencoder: Any = vae
        config = autoencoder.config
        if autoencoder.dtype != torch.float16 or not config.force_upcast:
            return _decoded(autoencoder, latents)
        autoencoder.to(torch.float32)
        try:
            return _decoded(autoencoder, latents.to(torch.float32))
        finally:
            autoencoder.to(torch.float16)


def _decoded(autoencoder: Any, latents: torch.Tensor) -> list[Image.Image | LatentflowError]:
    config = autoencoder.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        shape = (1, latents.shape[1], 1, 1)
        latents = latents * torch.tensor(std).view(shape).to(latents) / config.scaling_factor
        latents = latents + torch.tensor(mean).view(shape).to(latents)
    else:
        latents = latents / config.scaling_factor
    return to_images(autoencoder.decode(latents, return_dict=False)[0])
