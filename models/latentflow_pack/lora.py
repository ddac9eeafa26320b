"""The style LoRAs: low-rank changes of the UNet, and in one of them of the text encoder too."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from . import tokens
from .denoiser import Denoiser, add_noise, draw_batch, pictures, sampled_caption, scheduler, token_ids, velocity_loss
from .settings import Adapter, Settings
from .training import Loop, half_precision

_UNET_PARTS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
_TEXT_PARTS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def build(denoiser: Denoiser, adapter: Adapter) -> Denoiser:
    """A copy of the denoiser in which only the adapter is trained."""
    model = copy.deepcopy(denoiser).requires_grad_(False)
    model.unet.set_attn_processor(AttnProcessor())
    model.unet.add_adapter(_config(adapter, _UNET_PARTS))
    if adapter.text:
        model.text_encoder.add_adapter(_config(adapter, _TEXT_PARTS))
    return model


def _config(adapter: Adapter, parts: list[str]) -> LoraConfig:
    return LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, init_lora_weights="gaussian", target_modules=parts)


def _metadata(module: torch.nn.Module) -> dict[str, object]:
    config: dict[str, object] = module.peft_config["default"].to_dict()  # type: ignore[union-attr, index]
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def _weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights by PEFT's key names: diffusers' older names exist for attention only, and of a file that mixes both only half is loaded."""
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(module)
    return {key: value.detach().cpu().contiguous() for key, value in state.items()}


def save(model: Denoiser, adapter: Adapter, folder: Path) -> None:
    text = _weights(model.text_encoder) if adapter.text else None
    StableDiffusionPipeline.save_lora_weights(
        str(folder),
        unet_lora_layers=_weights(model.unet),
        text_encoder_lora_layers=text,
        unet_lora_adapter_metadata=_metadata(model.unet),
        text_encoder_lora_adapter_metadata=_metadata(model.text_encoder) if adapter.text else None,
    )


def train(
    settings: Settings, codec: AutoencoderKL, denoiser: Denoiser, *, adapter: Adapter, stop_at: int | None = None
) -> Denoiser:
    torch.manual_seed(settings.seed + 3)
    stage, tokenizer, plan = settings.lora, tokens.build(), scheduler()
    model = build(denoiser, adapter)
    loop = Loop(name=f"lora-{adapter.style}", model=model, stage=stage, work=settings.work, seed=settings.seed)
    data = pictures(settings, codec, style=adapter.style, count=0 if loop.finished else settings.styled)

    def loss() -> torch.Tensor:
        clean, scenes, _ = draw_batch(data, loop.rng, stage.batch)
        ids = token_ids(tokenizer, [sampled_caption(scene, loop.rng) for scene in scenes])
        batch = add_noise(plan, clean, loop.noise)
        with half_precision():
            guess = model(batch.noisy, batch.times, ids)
        return velocity_loss(guess, batch)

    loop.run(loss, report=lambda: "", stop_at=stop_at)
    return model.eval()
