"""The stages of a training, in order: codec, denoiser, ControlNets, LoRAs. Each is exported when it finishes.

A stage whose checkpoint is at its last step is skipped; any other continues from its checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel
from tqdm import tqdm

from . import card, controlnet, denoiser, evaluation, export, lora, pipelines, tokens, vae
from .grammar import HeldOut
from .hints import KINDS
from .settings import Settings, Stage
from .training import cost_of

_QUICK_COUNT = 30


def names(settings: Settings) -> list[str]:
    adapters = [f"lora-{adapter.style}" for adapter in settings.adapters]
    return ["vae", "denoiser", *(f"controlnet-{kind}" for kind in KINDS), *adapters]


def _formatted(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in figures.items())


class Training:
    """Runs stages by name; a stage loads the results of earlier ones from their checkpoints."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._held_out = HeldOut.load()
        self._tokenizer = tokens.build()
        self._codec: AutoencoderKL | None = None
        self._denoiser: denoiser.Denoiser | None = None

    def run(self, wanted: list[str]) -> None:
        torch.set_num_threads(self._settings.threads)
        export.clear_leftovers(self._settings)
        export.frame(self._settings, self._tokenizer)
        for name in names(self._settings):
            if name in wanted:
                stage = self._stage(name)
                self._record(name, stage)

    def _record(self, name: str, stage: Stage) -> None:
        entry: dict[str, Any] = {**asdict(stage), **cost_of(self._settings.work, name)}
        export.manifest(self._settings, trained={name: entry})
        card.update(self._settings.out)
        tqdm.write(f"{name}: exported")

    def _stage(self, name: str) -> Stage:
        kind, _, which = name.partition("-")
        if kind == "vae":
            export.codec(self._settings, self._trained_codec())
            return self._settings.vae
        if kind == "denoiser":
            export.denoiser(self._settings, self._trained_denoiser())
            return self._settings.denoiser
        if kind == "controlnet":
            export.controlnet(self._settings, self._trained_controlnet(which), kind=which)
            return self._settings.controlnet
        adapter = next(a for a in self._settings.adapters if a.style == which)
        codec, base = self._trained_codec(), self._trained_denoiser()
        export.adapter(self._settings, lora.train(self._settings, codec, base, adapter=adapter), adapter)
        return self._settings.lora

    def _trained_codec(self) -> AutoencoderKL:
        if self._codec is None:
            self._codec = vae.train(self._settings).requires_grad_(False)
        return self._codec

    def _trained_denoiser(self) -> denoiser.Denoiser:
        if self._denoiser is None:
            codec = self._trained_codec()
            self._denoiser = denoiser.train(self._settings, codec, inspect=self._inspection(codec))
            self._denoiser.requires_grad_(False)
        return self._denoiser

    def _inspection(self, codec: AutoencoderKL) -> Callable[[denoiser.Denoiser], str]:
        def inspect(model: denoiser.Denoiser) -> str:
            pipe = pipelines.assemble(codec=codec, denoiser=model, tokenizer=self._tokenizer, plan=denoiser.scheduler())
            export.denoiser(self._settings, model)
            return _formatted(evaluation.text_only(pipe, self._held_out, quick=True).figures)

        return inspect

    def _trained_controlnet(self, kind: str) -> ControlNetModel:
        codec, base = self._trained_codec(), self._trained_denoiser()
        plain = pipelines.assemble(codec=codec, denoiser=base, tokenizer=self._tokenizer, plan=denoiser.scheduler())

        def inspect(model: ControlNetModel) -> str:
            export.controlnet(self._settings, model, kind=kind)
            steered = pipelines.controlled(plain, model)
            return _formatted(evaluation.control(plain, steered, self._held_out, kind=kind, count=_QUICK_COUNT).figures)

        return controlnet.train(self._settings, codec, base, kind=kind, inspect=inspect)
