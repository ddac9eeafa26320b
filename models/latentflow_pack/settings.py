"""Sizes, steps and folders of a training; tests run the same code with tiny ones."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

MODELS = Path(__file__).resolve().parent.parent
SEED = 20240607
RESOLUTION = 64
TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One run of the training loop.

    The rate falls by a half cosine over `steps`; with a restart, over `first_fall` until step `restart_at`, where it
    rises to `restart_rate` and falls over the remaining steps.
    """

    steps: int
    batch: int
    rate: float
    first_fall: int = 0
    restart_at: int = 0
    restart_rate: float = 0.0
    warmup: int = 100
    save_every: int = 250
    report_every: int = 500


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One LoRA: its sizes, and whether it also changes the text encoder."""

    style: str
    rank: int
    alpha: int
    text: bool = False


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings that determine the result of a training."""

    out: Path = MODELS / "shapes"
    work: Path = field(default_factory=lambda: Path(os.environ.get("LATENTFLOW_PACK_WORK", MODELS / ".work")))
    seed: int = SEED
    threads: int = 2
    vae_channels: tuple[int, ...] = (16, 32, 64, 64)
    unet_channels: tuple[int, ...] = (64, 96)
    unet_layers: int = 1
    text_width: int = 96
    text_layers: int = 2
    hint_channels: tuple[int, ...] = (16, 32, 64, 96)
    pictures: int = 24_000
    hinted: int = 6_000
    styled: int = 3_000
    vae: Stage = Stage(steps=6000, batch=16, rate=2e-3)
    denoiser: Stage = Stage(
        steps=9000, batch=64, rate=1e-3, first_fall=6000, restart_at=6000, restart_rate=6e-4, report_every=500
    )
    controlnet: Stage = Stage(
        steps=1500,
        batch=32,
        rate=2e-3,
        first_fall=750,
        restart_at=750,
        restart_rate=1.5e-3,
        warmup=50,
        report_every=250,
    )
    lora: Stage = Stage(
        steps=1400,
        batch=48,
        rate=2e-3,
        first_fall=700,
        restart_at=700,
        restart_rate=2e-3,
        warmup=30,
        report_every=700,
    )
    adapters: tuple[Adapter, ...] = (
        Adapter(style="outline", rank=8, alpha=16),
        Adapter(style="pastel", rank=4, alpha=8),
        Adapter(style="neon", rank=6, alpha=12, text=True),
    )
