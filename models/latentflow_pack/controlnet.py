"""The two ControlNets: copies of the UNet's encoder that learn to follow edges or a colour grid."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel
from diffusers.models.attention_processor import AttnProcessor

from . import drawing, grammar, tokens, vae
from .denoiser import Denoiser, Pictures, add_noise, draw_batch, sampled_caption, scheduler, token_ids, velocity_loss
from .hints import hint
from .settings import Settings
from .training import Loop, device, half_precision

_FREE = 0.45


def build(settings: Settings, denoiser: Denoiser) -> ControlNetModel:
    """A ControlNet copied from the UNet. Its output is zero before training, because its zero convolutions are.

    The hint's own last layer gets ordinary weights: two zero layers in a row only delay the first useful gradient.
    """
    model = ControlNetModel.from_unet(denoiser.unet, conditioning_embedding_out_channels=settings.hint_channels)
    model.controlnet_cond_embedding.conv_out.reset_parameters()
    return model


def _examples(settings: Settings, codec: AutoencoderKL, kind: str, count: int) -> tuple[Pictures, torch.Tensor]:
    """Training data whose captions leave much open, so that the hint carries information."""
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
    inspect: Callable[[ControlNetModel], str],
    stop_at: int | None = None,
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
        clean, scenes, chosen = draw_batch(data, loop.rng, stage.batch)
        ids = token_ids(tokenizer, [sampled_caption(scene, loop.rng) for scene in scenes])
        shown = hints[chosen].to(device(), torch.float32) / 255
        batch = add_noise(plan, clean, loop.noise)
        with half_precision():
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

    loop.run(loss, report=lambda: inspect(model), stop_at=stop_at)
    return model.eval()
