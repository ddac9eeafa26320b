"""Pictures from the pack through diffusers pipelines, as a user gets them, many prompts at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from numpy.typing import NDArray
from PIL import Image as Picture
from transformers import CLIPTokenizer

from .denoiser import Denoiser
from .training import device

STEPS = 20
GUIDANCE = 3.0
STRONG_GUIDANCE = 5.0
_BATCH = 40

Image = NDArray[np.uint8]


def assemble(
    *, codec: AutoencoderKL, denoiser: Denoiser, tokenizer: CLIPTokenizer, plan: DDIMScheduler
) -> StableDiffusionPipeline:
    """A pipeline of components that are still in training."""
    pipe = StableDiffusionPipeline(
        vae=codec,
        text_encoder=denoiser.text_encoder,
        tokenizer=tokenizer,
        unet=denoiser.unet,
        scheduler=plan,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True).to(device())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def controlled(pipe: StableDiffusionPipeline, control: ControlNetModel) -> StableDiffusionControlNetPipeline:
    made = StableDiffusionControlNetPipeline(
        **{name: part for name, part in pipe.components.items() if name != "image_encoder"},
        controlnet=control,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def generate(
    pipe: StableDiffusionPipeline | StableDiffusionControlNetPipeline,
    captions: Sequence[str],
    *,
    hints: Sequence[Image] | None = None,
    seed: int = 0,
    guidance: float = GUIDANCE,
    batch: int = _BATCH,
) -> list[Image]:
    """One picture per caption. The seed of each is `seed` plus its index, so that the batch size does not change it."""
    made: list[Image] = []
    for start in range(0, len(captions), batch):
        part = list(captions[start : start + batch])
        extra: dict[str, Any] = {}
        if hints is not None:
            extra["image"] = [Picture.fromarray(hint) for hint in hints[start : start + batch]]
        seeds = [torch.Generator().manual_seed(seed + start + k) for k in range(len(part))]
        result = pipe(
            part, num_inference_steps=STEPS, guidance_scale=guidance, generator=seeds, output_type="np", **extra
        )
        made += list((result.images * 255).round().astype(np.uint8))
    return made
