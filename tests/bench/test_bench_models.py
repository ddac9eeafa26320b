"""The bench models are pipelines that diffusers loads, with the same weights each time, and of the sizes that their names promise."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

import models
from models import MODELS

SD15_UNET_PARAMETERS = 859_520_964


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_mid_model_is_written_as_a_pipeline_with_the_same_weights_each_time(tmp_path: Path) -> None:
    folder = models.write(MODELS["mid"], tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    side = MODELS["mid"].side
    (image,) = pipeline("a red circle", num_inference_steps=1, width=side, height=side).images
    assert image.size == (side, side)
    torch.manual_seed(models.SEED)
    again = models.mid_unet().state_dict()
    assert all(torch.equal(value, again[name]) for name, value in pipeline.unet.state_dict().items())


def test_the_sd15_model_has_the_sizes_of_stable_diffusion_1_5() -> None:
    with torch.device("meta"):
        assert _count(models.sd15_unet()) == SD15_UNET_PARAMETERS
        assert _count(models.sd15_vae()) == 83_653_863
        assert 120e6 > _count(models.sd15_text_encoder()) > 80e6


def test_the_wide_model_has_the_size_that_its_description_states() -> None:
    with torch.device("meta"):
        assert round(_count(models.wide_unet()) / 1e6) == 138
