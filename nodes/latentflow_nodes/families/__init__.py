"""What differs between model families: how a prompt becomes conditioning, and what a denoiser takes besides latents.

A role asks `FAMILIES[name]`; a new family (SD3, Flux) is another class here. Each follows diffusers' pipeline of the
family, whose results it has to equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.image_processor import VaeImageProcessor
from latentflow.errors import FailedPreconditionError

from latentflow_nodes.weights import files

Conditioning = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class TextParts:
    """A pipeline's text encoders and tokenizers, in its order."""

    encoders: dict[str, Any]
    tokenizers: dict[str, Any]


class Family(Protocol):
    """One model family."""

    def encode(
        self, pipeline: Any, *, prompt: str, negative_prompt: str | None, guidance: bool, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """Conditioning by name; every tensor has a leading dimension of 1."""
        ...

    def text_pipeline(self, parts: TextParts, *, config: Mapping[str, Any]) -> Any:
        """diffusers' pipeline of the family with only its text parts."""
        ...

    def network_inputs(self, conditioning: Conditioning, *, guidance: bool, width: int, height: int) -> dict[str, Any]:
        """Keyword arguments of UNet and ControlNet; with guidance stacked negative first, [2, ...]."""
        ...

    def decode(self, vae: Any, latents: torch.Tensor) -> Any:
        """The PIL image of latents [1, channels, height, width]."""
        ...


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x."""

    def text_pipeline(self, parts: TextParts, *, config: Mapping[str, Any]) -> Any:
        return StableDiffusionPipeline(
            vae=None,
            unet=None,
            scheduler=None,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **parts.encoders,
            **parts.tokenizers,
        )

    def encode(
        self, pipeline: Any, *, prompt: str, negative_prompt: str | None, guidance: bool, device: torch.device
    ) -> dict[str, torch.Tensor]:
        positive, negative = pipeline.encode_prompt(prompt, device, 1, guidance, negative_prompt)
        return {"prompt_embeds": positive} | ({"negative_prompt_embeds": negative} if guidance else {})

    def network_inputs(self, conditioning: Conditioning, *, guidance: bool, width: int, height: int) -> dict[str, Any]:
        return {"encoder_hidden_states": _halves(conditioning, "prompt_embeds", guidance=guidance)}

    def decode(self, vae: Any, latents: torch.Tensor) -> Any:
        image = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        return VaeImageProcessor().postprocess(image, output_type="pil")[0]


class StableDiffusionXL:
    """Stable Diffusion XL: two text encoders, pooled embeddings, time ids."""

    def text_pipeline(self, parts: TextParts, *, config: Mapping[str, Any]) -> Any:
        return StableDiffusionXLPipeline(
            vae=None,
            unet=None,
            scheduler=None,
            force_zeros_for_empty_prompt=bool(config.get("force_zeros_for_empty_prompt", True)),
            add_watermarker=False,
            **parts.encoders,
            **parts.tokenizers,
        )

    def encode(
        self, pipeline: Any, *, prompt: str, negative_prompt: str | None, guidance: bool, device: torch.device
    ) -> dict[str, torch.Tensor]:
        positive, negative, pooled, negative_pooled = pipeline.encode_prompt(
            prompt, device=device, do_classifier_free_guidance=guidance, negative_prompt=negative_prompt
        )
        encoded = {"prompt_embeds": positive, "pooled_prompt_embeds": pooled}
        if guidance:
            encoded |= {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": negative_pooled}
        return encoded

    def network_inputs(self, conditioning: Conditioning, *, guidance: bool, width: int, height: int) -> dict[str, Any]:
        embeds = _halves(conditioning, "prompt_embeds", guidance=guidance)
        pooled = _halves(conditioning, "pooled_prompt_embeds", guidance=guidance)
        # Original size, crop, target size; as the pipeline's defaults, both halves alike.
        time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=embeds.dtype, device=embeds.device)
        added = {"text_embeds": pooled, "time_ids": time_ids.repeat(embeds.shape[0], 1)}
        return {"encoder_hidden_states": embeds, "added_cond_kwargs": added}

    def decode(self, vae: Any, latents: torch.Tensor) -> Any:
        upcast = vae.dtype == torch.float16 and vae.config.force_upcast
        if upcast:
            vae.to(torch.float32)
            latents = latents.to(torch.float32)
        mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
        if mean is not None and std is not None:
            shape = (1, latents.shape[1], 1, 1)
            latents = latents * torch.tensor(std).view(shape).to(latents) / vae.config.scaling_factor
            latents = latents + torch.tensor(mean).view(shape).to(latents)
        else:
            latents = latents / vae.config.scaling_factor
        image = vae.decode(latents, return_dict=False)[0]
        if upcast:
            vae.to(torch.float16)
        return VaeImageProcessor().postprocess(image, output_type="pil")[0]


FAMILIES: dict[str, Family] = {"sd": StableDiffusion(), "sdxl": StableDiffusionXL()}


def stack(inputs: list[dict[str, Any]]) -> dict[str, Any]:
    """Network inputs of several requests as one batch, in their order."""
    if len(inputs) == 1:
        return inputs[0]
    first = inputs[0]
    return {
        key: torch.cat([one[key] for one in inputs])
        if isinstance(value, torch.Tensor)
        else stack([one[key] for one in inputs])
        for key, value in first.items()
    }


def _halves(conditioning: Conditioning, name: str, *, guidance: bool) -> torch.Tensor:
    positive = conditioning[name]
    return torch.cat([conditioning[f"negative_{name}"], positive]) if guidance else positive


def detect(pipeline: Path) -> str:
    """The model family of a pipeline folder: "sd" or "sdxl"."""
    name = str(files.config(pipeline, "model_index.json").get("_class_name", ""))
    if name.startswith("StableDiffusionXL"):
        return "sdxl"
    if name.startswith("StableDiffusion") and not name.startswith("StableDiffusion3"):
        return "sd"
    raise FailedPreconditionError(
        f"{pipeline} holds a {name or 'pipeline without a class name'}; this server runs Stable Diffusion 1.x, 2.x and XL.",
        reason="UNSUPPORTED_FAMILY",
    )
