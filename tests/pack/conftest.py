"""A training of a size for tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from latentflow_pack.settings import Adapter, Settings, Stage


@pytest.fixture
def tiny(tmp_path: Path) -> Settings:
    """Settings with which every stage takes seconds."""
    stage = Stage(steps=4, batch=2, rate=1e-3, warmup=1, save_every=2, report_every=100)
    return Settings(
        out=tmp_path / "pack",
        work=tmp_path / "work",
        threads=1,
        vae_channels=(8, 8, 8, 8),
        unet_channels=(16, 16),
        text_width=16,
        text_layers=1,
        hint_channels=(8, 8, 8, 8),
        pictures=8,
        hinted=8,
        styled=8,
        vae=stage,
        denoiser=stage,
        controlnet=stage,
        lora=stage,
        adapters=(Adapter(style="neon", rank=2, alpha=4, text=True),),
    )
