"""The text encoder and the UNet, trained together on the codec's latents."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from . import drawing, grammar, tokens, vae
from .settings import RESOLUTION, TOKENS, Settings
from .training import Loop, device, half_precision

# Min-SNR weights teach appearance fastest but give little weight to the noisiest steps, which decide the composition.
# After this many training steps all noise levels have the same weight.
_SNR_WEIGHTED_STEPS = 2000
_SNR_LIMIT = 5.0
# Binding colours and sides to two objects is learned last: pictures of two objects are drawn more often after the restart.
_SKIP_SINGLE = 0.6
_NO_CAPTION = 0.1
_NO_WORD = 0.1
# A colour is learned apart from its shape, and the reverse, from objects whose other property has no word.
_NAMELESS_SHARE = 0.15
AVERAGE = 0.999


class Denoiser(torch.nn.Module):
    """The text encoder and the UNet, trained by one optimizer: token ids in, predicted velocity out."""

    def __init__(self, *, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, noisy: torch.Tensor, times: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        context = self.text_encoder(ids)[0]
        guess: torch.Tensor = self.unet(noisy, times, context).sample
        return guess


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """A drawn training set: latents [n, 4, 8, 8] and the scenes that they show."""

    latents: torch.Tensor
    scenes: list[grammar.Scene]


def scheduler() -> DDIMScheduler:
    """Leaves almost no signal at the last step, so that no background colour leaks in; every sampler converts from it."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build(settings: Settings, tokenizer: CLIPTokenizer) -> Denoiser:
    depth = len(settings.unet_channels)
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 8,
        layers_per_block=settings.unet_layers,
        block_out_channels=settings.unet_channels,
        down_block_types=("CrossAttnDownBlock2D",) * depth,
        up_block_types=("CrossAttnUpBlock2D",) * depth,
        cross_attention_dim=settings.text_width,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.text_width,
        intermediate_size=4 * settings.text_width,
        projection_dim=settings.text_width,
        num_hidden_layers=settings.text_layers,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Denoiser(text_encoder=CLIPTextModel(text), unet=unet)


def sampled_caption(scene: grammar.Scene, rng: random.Random) -> str:
    """A caption of the scene, with random words left out; empty in one of ten cases, for classifier-free guidance."""
    if rng.random() < _NO_CAPTION:
        return ""
    placeless = rng.random() < _NO_WORD
    things = tuple(
        replace(t, size=None if rng.random() < _NO_WORD else t.size, place=None if placeless else t.place)
        for t in scene.things
    )
    if rng.random() < 0.5:
        things = things[::-1]
    background = None if rng.random() < _NO_WORD else scene.background
    return grammar.caption(grammar.Scene(things=things, background=background), article=rng.random() >= _NO_WORD)


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    batch = tokenizer(captions, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    ids: torch.Tensor = batch["input_ids"]
    return ids.to(device())


def pictures(settings: Settings, codec: AutoencoderKL, *, style: str = "plain", count: int) -> Pictures:
    """Draws the training set and encodes it; reuses the latents of an earlier run."""
    rng = random.Random(f"{settings.seed}-{style}")
    held_out = grammar.HeldOut.load()
    scenes, images = [], []
    for _ in range(count):
        scene = grammar.sample(rng, held_out)
        if style == "plain":
            scene = grammar.with_nameless(scene, rng, share=_NAMELESS_SHARE)
        scenes.append(scene)
        images.append(drawing.draw(drawing.arrange(scene, rng), style=style))
    kept = settings.work / f"latents-{style}.pt"
    if not count:
        latents = torch.empty(0)
    elif kept.exists():
        latents = torch.load(kept, weights_only=True)
    else:
        parts = [
            vae.encode(codec, images[k : k + 512]).cpu() for k in tqdm(range(0, count, 512), desc=f"encode {style}")
        ]
        latents = torch.cat(parts)
        _keep(latents, kept)
    return Pictures(latents=latents.to(device()), scenes=scenes)


def _keep(latents: torch.Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    torch.save(latents, unfinished)
    os.replace(unfinished, path)


@dataclass(frozen=True, kw_only=True)
class NoisyBatch:
    """One training batch: noisy latents, their timesteps, the velocity to predict, and the weight of each in the loss."""

    noisy: torch.Tensor
    times: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor


def add_noise(
    plan: DDIMScheduler, clean: torch.Tensor, draw: torch.Generator, *, weight_by_snr: bool = False
) -> NoisyBatch:
    noise = torch.randn(clean.shape, generator=draw).to(clean.device)
    times = torch.randint(0, plan.config.num_train_timesteps, (len(clean),), generator=draw).to(clean.device)
    kept = plan.alphas_cumprod.to(clean.device)[times]
    snr = kept / (1 - kept)
    return NoisyBatch(
        noisy=plan.add_noise(clean, noise, times),
        times=times,
        target=plan.get_velocity(clean, noise, times),
        weight=torch.clamp(snr, max=_SNR_LIMIT) / (snr + 1) if weight_by_snr else torch.ones_like(snr),
    )


def velocity_loss(guess: torch.Tensor, batch: NoisyBatch) -> torch.Tensor:
    error = ((guess.float() - batch.target) ** 2).mean(dim=(1, 2, 3))
    return (batch.weight * error).mean() / batch.weight.mean()


def draw_batch(
    data: Pictures, rng: random.Random, size: int, *, skip_single: float = 0.0
) -> tuple[torch.Tensor, list[grammar.Scene], list[int]]:
    """Latents, scenes and indexes of a random batch.

    Args:
        skip_single: Probability that a picture of one object is replaced by another draw.
    """
    chosen: list[int] = []
    while len(chosen) < size:
        k = rng.randrange(len(data.scenes))
        if not skip_single or len(data.scenes[k].things) == 2 or rng.random() >= skip_single:
            chosen.append(k)
    return data.latents[chosen], [data.scenes[k] for k in chosen], chosen


def train(
    settings: Settings, codec: AutoencoderKL, *, inspect: Callable[[Denoiser], str], stop_at: int | None = None
) -> Denoiser:
    torch.manual_seed(settings.seed + 1)
    tokenizer, plan = tokens.build(), scheduler()
    model = build(settings, tokenizer)
    stage = settings.denoiser
    model.unet.set_attn_processor(AttnProcessor())
    loop = Loop(name="denoiser", model=model, stage=stage, work=settings.work, seed=settings.seed, average=AVERAGE)
    data = pictures(settings, codec, count=0 if loop.finished else settings.pictures)

    def loss() -> torch.Tensor:
        late = bool(stage.restart_at) and loop.step >= stage.restart_at
        clean, scenes, _ = draw_batch(data, loop.rng, stage.batch, skip_single=_SKIP_SINGLE if late else 0.0)
        ids = token_ids(tokenizer, [sampled_caption(scene, loop.rng) for scene in scenes])
        batch = add_noise(plan, clean, loop.noise, weight_by_snr=loop.step < _SNR_WEIGHTED_STEPS)
        with half_precision():
            guess = model(batch.noisy, batch.times, ids)
        return velocity_loss(guess, batch)

    loop.run(loss, report=lambda: inspect(model), stop_at=stop_at)
    return model.eval()
