"""Writes the pack's folder: diffusers components, each file replaced by a rename, and a manifest of hashes."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, ControlNetModel
from transformers import CLIPTokenizer

from . import lora
from .denoiser import Denoiser, scheduler
from .settings import Adapter, Settings

MANIFEST = "manifest.json"
LIMIT_BYTES = 30_000_000
_STALE_SECONDS = 600
COMMAND = "PYTHONPATH=models .venv/bin/python -m latentflow_pack train"
_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": diffusers.__version__,
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _put(folder: Path, write: Callable[[Path], Any]) -> None:
    """Writes beside the pack and renames file by file, so that a reader never sees an incomplete file."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as new:
        write(Path(new))
        for file in sorted(Path(new).iterdir()):
            os.replace(file, folder / file.name)


def _write_json(path: Path, value: object) -> None:
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def codec(settings: Settings, model: AutoencoderKL) -> None:
    _put(settings.out / "vae", model.save_pretrained)


def frame(settings: Settings, tokenizer: CLIPTokenizer) -> None:
    """Writes the parts that are not trained: the index, the scheduler and the tokenizer."""

    def write_tokenizer(folder: Path) -> None:
        tokenizer.save_pretrained(folder)
        tokenizer.backend_tokenizer.model.save(str(folder))

    settings.out.mkdir(parents=True, exist_ok=True)
    _put(settings.out / "tokenizer", write_tokenizer)
    _put(settings.out / "scheduler", scheduler().save_pretrained)
    _write_json(settings.out / "model_index.json", _INDEX)


def denoiser(settings: Settings, model: Denoiser) -> None:
    _put(settings.out / "unet", model.unet.save_pretrained)
    _put(settings.out / "text_encoder", model.text_encoder.save_pretrained)


def controlnet(settings: Settings, model: ControlNetModel, *, kind: str) -> None:
    _put(settings.out / f"controlnet-{kind}", model.save_pretrained)


def adapter(settings: Settings, model: Denoiser, wanted: Adapter) -> None:
    _put(settings.out / "loras" / wanted.style, lambda folder: lora.save(model, wanted, folder))


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(folder.rglob("*.safetensors"))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def stages_of(settings: Settings) -> dict[str, Any]:
    """The finished stages in the manifest; empty where there is none."""
    path = settings.out / MANIFEST
    stages: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")).get("stages", {}) if path.exists() else {}
    return stages


def manifest(settings: Settings, *, trained: dict[str, dict[str, Any]]) -> None:
    """Records the folder's weights and their training; keeps the entries of stages that are not in `trained`.

    RuntimeError where the weights exceed LIMIT_BYTES.
    """
    path = settings.out / MANIFEST
    size = sum(file.stat().st_size for file in settings.out.rglob("*.safetensors"))
    if size > LIMIT_BYTES:
        raise RuntimeError(f"{settings.out} holds {size} bytes of weights; at most {LIMIT_BYTES} may be committed")
    _write_json(
        path,
        {
            "command": COMMAND,
            "seed": settings.seed,
            "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()}), cuda {torch.cuda.is_available()}",
            "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
            "bytes": size,
            "stages": {**stages_of(settings), **trained},
            "adapters": {a.style: {"rank": a.rank, "alpha": a.alpha, "text": a.text} for a in settings.adapters},
            "sha256": hashes(settings.out),
        },
    )


def clear_leftovers(settings: Settings) -> None:
    """Removes leftovers of interrupted writes, but not those young enough to belong to a running one."""
    for leftover in settings.out.rglob(".new-*"):
        if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)
