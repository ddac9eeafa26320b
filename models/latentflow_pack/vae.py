"""The VAE: 64×64 pictures to 8×8×4 latents and back. Its reconstructions bound the quality of every generated picture."""

from __future__ import annotations

import itertools
import random

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from . import checker, drawing, grammar
from .settings import RESOLUTION, Settings
from .training import Loop, device, half_precision

# Most of every picture is background: without a higher weight the colours of objects are never learned.
_OBJECT_WEIGHT = 6.0
_KL_WEIGHT = 3e-4
_STYLED = 0.35
_CHUNK = 32

Image = NDArray[np.uint8]


def build(settings: Settings) -> AutoencoderKL:
    depth = len(settings.vae_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=settings.vae_channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=RESOLUTION,
    )


def to_tensor(images: list[Image]) -> torch.Tensor:
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return pixels.to(device(), torch.float32).contiguous() / 127.5 - 1


def to_images(pixels: torch.Tensor) -> list[Image]:
    bytes_ = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return list(bytes_.permute(0, 2, 3, 1).cpu().numpy())


def _weights(pixels: torch.Tensor) -> torch.Tensor:
    ground = pixels[:, :, :2].flatten(2).median(dim=2).values[:, :, None, None]
    weight = 1 + _OBJECT_WEIGHT * ((pixels - ground).abs().amax(dim=1, keepdim=True) > 0.12)
    return weight / weight.mean(dim=(1, 2, 3), keepdim=True)


def _batch(rng: random.Random, held_out: grammar.HeldOut, size: int) -> torch.Tensor:
    images = []
    for _ in range(size):
        scene = grammar.sample(rng, held_out, full=0.6)
        style = rng.choice(drawing.STYLES[1:]) if rng.random() < _STYLED else "plain"
        images.append(drawing.draw(drawing.arrange(scene, rng), style=style))
    return to_tensor(images)


def _loss(model: AutoencoderKL, pixels: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    with half_precision():
        moments = model.encode(pixels).latent_dist
        drawn = torch.randn(moments.mean.shape, generator=noise).to(pixels.device)
        made = model.decode(moments.mean + moments.std * drawn).sample
    error = made.float() - pixels
    weight = _weights(pixels)
    mean, spread = moments.mean.float(), moments.logvar.float()
    kl = 0.5 * (mean**2 + spread.exp() - 1 - spread).mean()
    loss: torch.Tensor = (weight * (error.abs() + error**2)).mean() + _KL_WEIGHT * kl
    return loss


def _test_pictures() -> list[tuple[grammar.Scene, Image]]:
    """Every single object, held-out pairs included, and 96 random pictures of two."""
    rng = random.Random(99)
    scenes = [
        grammar.Scene(
            things=(grammar.Thing(color=c, shape=s, size=z, place=p),),
            background=rng.choice(["black", "white", "gray"]),
        )
        for c, s, z, p in itertools.product(grammar.COLORS, grammar.SHAPES, grammar.SIZES, ["left", "center"])
    ]
    nothing = grammar.HeldOut(pairs=frozenset(), couples=frozenset())
    scenes += [grammar.sample(rng, nothing, two=1.0, full=1.0) for _ in range(96)]
    return [(scene, drawing.draw(drawing.arrange(scene, rng))) for scene in scenes]


@torch.no_grad()
def reconstruction_scores(model: AutoencoderKL) -> dict[str, float]:
    pictures = _test_pictures()
    pixels = to_tensor([image for _, image in pictures])
    made = torch.cat(
        [model.decode(model.encode(part).latent_dist.mode()).sample for part in torch.split(pixels, _CHUNK)]
    )
    verdicts = [checker.judge(image, scene) for (scene, _), image in zip(pictures, to_images(made), strict=True)]
    error = float(((made - pixels) ** 2).mean()) / 4
    return {
        "things": float(np.mean([v.things for v in verdicts])),
        "size": float(np.mean([v.size for v in verdicts])),
        "background": float(np.mean([v.background for v in verdicts])),
        "psnr": -10 * float(np.log10(error)),
    }


@torch.no_grad()
def set_scale(model: AutoencoderKL, held_out: grammar.HeldOut) -> None:
    """Sets the scaling factor to one over the standard deviation of latents, because the denoiser expects one."""
    pixels = _batch(random.Random(5), held_out, 256)
    latents = torch.cat([model.encode(part).latent_dist.mode() for part in torch.split(pixels, _CHUNK)])
    model.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))


@torch.no_grad()
def encode(model: AutoencoderKL, images: list[Image]) -> torch.Tensor:
    """Scaled latents [n, 4, 8, 8], computed in float32, as at inference."""
    starts = range(0, len(images), _CHUNK)
    parts = [model.encode(to_tensor(images[k : k + _CHUNK])).latent_dist.mode() for k in starts]
    latents: torch.Tensor = torch.cat(parts) * model.config.scaling_factor
    return latents


def train(settings: Settings, *, stop_at: int | None = None) -> AutoencoderKL:
    torch.manual_seed(settings.seed)
    held_out = grammar.HeldOut.load()
    model = build(settings)
    loop = Loop(name="vae", model=model, stage=settings.vae, work=settings.work, seed=settings.seed)

    def report() -> str:
        return ", ".join(f"{key} {value:.3f}" for key, value in reconstruction_scores(model).items())

    loop.run(
        lambda: _loss(model, _batch(loop.rng, held_out, settings.vae.batch), loop.noise), report=report, stop_at=stop_at
    )
    set_scale(model, held_out)
    return model.eval()
