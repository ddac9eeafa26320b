"""The committed weights."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline
from latentflow_pack import checker, export, pipelines
from latentflow_pack.grammar import Scene, parse
from latentflow_pack.hints import KINDS
from latentflow_pack.settings import Settings
from safetensors import safe_open

PACK = Settings().out
MANIFEST = json.loads((PACK / export.MANIFEST).read_text(encoding="utf-8"))
SAMPLERS = (
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return pipelines.load(PACK)


def test_the_weights_are_those_of_the_manifest() -> None:
    assert export.hashes(PACK) == MANIFEST["sha256"]


def test_the_pack_is_at_most_thirty_megabytes_of_safetensors_and_no_pickle() -> None:
    assert sum(file.stat().st_size for file in PACK.rglob("*.safetensors")) <= export.LIMIT_BYTES
    assert not [f for f in PACK.rglob("*") if f.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}]


def test_the_readme_names_every_hash() -> None:
    text = (PACK / "README.md").read_text(encoding="utf-8")
    assert all(digest in text for digest in MANIFEST["sha256"].values())


@pytest.mark.parametrize("kind", KINDS)
def test_each_controlnet_loads_and_fits_the_unet(pipe: StableDiffusionPipeline, kind: str) -> None:
    control = ControlNetModel.from_pretrained(PACK / f"controlnet-{kind}", local_files_only=True)
    assert control.config.cross_attention_dim == pipe.unet.config.cross_attention_dim
    assert control.config.block_out_channels == pipe.unet.config.block_out_channels


@pytest.mark.parametrize("style", sorted(MANIFEST["adapters"]))
def test_each_lora_loads_whole_with_its_own_rank_and_alpha(style: str) -> None:
    wanted, folder = MANIFEST["adapters"][style], PACK / "loras" / style
    pipe = pipelines.load(PACK)
    pipe.load_lora_weights(folder, adapter_name=style)
    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
        stored = set(file.keys())
    loaded = 0
    for part in (pipe.unet, pipe.text_encoder):
        layers = [m for m in part.modules() if style in getattr(m, "r", {})]
        loaded += 2 * len(layers)
        assert {(m.r[style], m.lora_alpha[style]) for m in layers} <= {(wanted["rank"], wanted["alpha"])}
    assert loaded == len(stored)
    assert any(key.startswith("text_encoder.") for key in stored) == wanted["text"]


def test_ranks_and_alphas_differ() -> None:
    adapters = MANIFEST["adapters"].values()
    assert len({a["rank"] for a in adapters}) == len(adapters)
    assert any(a["rank"] != a["alpha"] for a in adapters)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pictures_show_the_prompt_with_every_sampler(pipe: StableDiffusionPipeline, sampler: str) -> None:
    scheduler = getattr(importlib.import_module("diffusers"), sampler)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    texts = [
        "a large red circle on the left, white background",
        "a small blue square at the top, black background",
        "a large green triangle in the center, gray background",
        "a large purple star on the right and a large red square on the left, white background",
    ]
    torch.manual_seed(0)
    images = pipelines.generate(pipe, texts, seed=7)
    scenes: list[Scene] = [parse(text) for text in texts]
    right = [checker.judge(image, scene).things for image, scene in zip(images, scenes, strict=True)]
    assert np.mean(right) >= 0.75, Path(sampler)
