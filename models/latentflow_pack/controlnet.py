"""The two ControlNets: copies of the UNet's encoder that learn to follow edges or a colour grid."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel
from diffusers.models.attention_processor import AttnProcessor

from . import drawing, grammar, tokens, vae
from .denoiser import Denoiser, Pictures, noised, picked, said, scheduler, token_ids, velocity_loss
from .hints import hint
from .settings import Settings
from .training import Loop, device, half

_FREE = 0.45


def build(settings: Settings, denoiser: Denoiser) -> ControlNetModel:
    """Starts from the UNet, with zero convolutions, so that the first step changes nothing.

    One of the two zero layers in a row, the hint's own, is given ordinary weights: it would only delay the start.
    """
    model = ControlNetModel.from_unet(denoiser.unet, conditioning_embedding_out_channels=settings.hint_channels)
    model.controlnet_cond_embedding.conv_out.reset_parameters()
    return model


def _examples(settings: Settings, codec: AutoencoderKL, kind: str, count: int) -> tuple[Pictures, torch.Tensor]:
    """Captions that leave much open, so that the hint has something to say."""
    rng = random.Random(f"{settings.seed}-hints")
    held_out = grammar.HeldOut.load()
    scenes = [grammar.sample(rng, held_out, full=_FREE) for _ in range(count)]
    images = [drawing.draw(drawing.arrange(scene, rng)) for scene in scenes]
    hints = torch.from_numpy(np.stack([hint(kind, image) for image in images])).permute(0, 3, 1, 2)
    return Pictures(latents=vae.encode(codec, images), scenes=scenes), hints.contiguous()


def train(
    settings: Settings,
    codec: AutoencoderKL,
    denoiser: Denoiser,
    *,
    kind: str,
    look: Callable[[ControlNetModel], str],
    until: int | None = None,
) -> ControlNetModel:
    torch.manual_seed(settings.seed + 2)
    stage, tokenizer, plan = settings.controlnet, tokens.build(), scheduler()
    denoiser.requires_grad_(False)
    denoiser.unet.set_attn_processor(AttnProcessor())
    model = build(settings, denoiser)
    model.requires_grad_(True)
    model.set_attn_processor(AttnProcessor())
    loop = Loop(
        name=f"controlnet-{kind}", model=model, stage=stage, work=settings.work, seed=settings.seed, average=0.995
    )
    if loop.finished:
        loop.run(lambda: torch.zeros(()), report=str)
        return model.eval()
    data, hints = _examples(settings, codec, kind, settings.hinted)

    def loss() -> torch.Tensor:
        clean, scenes, chosen = picked(data, loop.rng, stage.batch)
        ids = token_ids(tokenizer, [said(scene, loop.rng) for scene in scenes])
        shown = hints[chosen].to(device(), torch.float32) / 255
        batch = noised(plan, clean, loop.noise)
        with half():
            context = denoiser.text_encoder(ids)[0]
            down, middle = model(batch.noisy, batch.times, context, controlnet_cond=shown, return_dict=False)
            guess = denoiser.unet(
                batch.noisy,
                batch.times,
                context,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
            ).sample
        return velocity_loss(guess, batch)

    loop.run(loss, report=lambda: look(model), until=until)
    return model.eval()
