"""Scores the pack on prompts outside its training set, with plain diffusers and the classical checker."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from numpy.typing import NDArray

from . import checker, pipelines
from .drawing import arrange, draw
from .grammar import BACKGROUNDS, COLORS, OPPOSITE, PLACES, SHAPES, SIZES, HeldOut, Scene, Thing, caption
from .hints import KINDS, cell_agreement, edge_agreement, hint
from .settings import Settings
from .styles import STATISTICS
from .training import device

Image = NDArray[np.uint8]
MINIMUMS = {
    "single_color_shape": 0.95,
    "single_place": 0.90,
    "two_objects": 0.75,
    "edge_f1": 0.80,
    "edge_f1_gain": 0.30,
    "layout_cells": 0.85,
    **{f"{style}_shown": 0.90 for style in STATISTICS},
}
_DOUBLES = 80
_CONTROLLED = 60
_STYLED = 40


@dataclass(frozen=True, kw_only=True)
class Row:
    """Pictures of one kind, for the contact sheet."""

    title: str
    captions: list[str]
    images: list[Image]


@dataclass(frozen=True, kw_only=True)
class Result:
    figures: dict[str, float]
    rows: list[Row] = field(default_factory=list)

    def below_minimum(self) -> list[str]:
        return [
            f"{name} is {self.figures[name]:.3f}, has to be at least {minimum}"
            for name, minimum in MINIMUMS.items()
            if name in self.figures and self.figures[name] < minimum
        ]


def singles(held_out: HeldOut) -> list[Scene]:
    """Every held-out pair in every size, place and background."""
    scenes = [
        Scene(things=(Thing(color=color, shape=shape, size=size, place=place),), background=background)
        for (color, shape), size, place, background in itertools.product(
            sorted(held_out.pairs), SIZES, PLACES, BACKGROUNDS
        )
    ]
    random.Random(1).shuffle(scenes)
    return scenes


def doubles(held_out: HeldOut, count: int = _DOUBLES) -> list[Scene]:
    """Half with a held-out pair, half of pairs that training never drew together."""
    rng = random.Random(2)
    pairs = list(itertools.product(COLORS, SHAPES))
    couples = sorted(sorted(couple) for couple in held_out.couples)
    scenes = []
    for k in range(count):
        chosen = [rng.choice(sorted(held_out.pairs)), rng.choice(pairs)] if k % 2 else list(rng.choice(couples))
        rng.shuffle(chosen)
        place = rng.choice(list(OPPOSITE))
        things = tuple(
            Thing(color=color, shape=shape, size=rng.choice(SIZES), place=where)
            for (color, shape), where in zip(chosen, (place, OPPOSITE[place]), strict=True)
        )
        scenes.append(Scene(things=things, background=rng.choice(list(BACKGROUNDS))))
    return scenes


def open_scenes(held_out: HeldOut, count: int = _CONTROLLED) -> list[Scene]:
    """Held-out pairs whose place and size only a hint gives."""
    rng = random.Random(3)
    scenes = []
    for k in range(count):
        pairs = [rng.choice(sorted(held_out.pairs))]
        if k % 3 == 2:
            pairs.append(rng.choice(sorted(held_out.pairs)))
        things = tuple(Thing(color=color, shape=shape) for color, shape in pairs)
        scenes.append(Scene(things=things, background=rng.choice(list(BACKGROUNDS))))
    return scenes


def _share(values: Sequence[bool]) -> float:
    return float(np.mean(values))


def _captions(scenes: Sequence[Scene]) -> list[str]:
    return [caption(scene) for scene in scenes]


def text_only(pipe: StableDiffusionPipeline, held_out: HeldOut, *, quick: bool = False) -> Result:
    """Scores of pictures that only the prompt controls."""
    one, two = singles(held_out), doubles(held_out)
    if quick:
        one, two = one[:48], two[:40]
    first = pipelines.generate(pipe, _captions(one))
    second = pipelines.generate(pipe, _captions(two), seed=1000)
    singly = [checker.judge(image, scene) for image, scene in zip(first, one, strict=True)]
    doubly = [checker.judge(image, scene) for image, scene in zip(second, two, strict=True)]
    return Result(
        figures={
            "single_color_shape": _share([v.color_shape for v in singly]),
            "single_place": _share([v.place for v in singly]),
            "two_objects": _share([v.things for v in doubly]),
            "single_size": _share([v.size for v in singly]),
            "background": _share([v.background for v in singly + doubly]),
        },
        rows=[
            Row(title="one object, a pair never trained on", captions=_captions(one[:10]), images=first[:10]),
            Row(title="two objects, together never trained on", captions=_captions(two[:10]), images=second[:10]),
        ],
    )


def strongly_guided(pipe: StableDiffusionPipeline, held_out: HeldOut) -> Result:
    """The same prompts at the stronger guidance that larger models use; small objects lose their shape at it."""
    figures = {}
    for name, scenes in (("single_color_shape", singles(held_out)), ("two_objects", doubles(held_out))):
        images = pipelines.generate(pipe, _captions(scenes), guidance=pipelines.STRONG_GUIDANCE)
        verdicts = [checker.judge(image, scene) for image, scene in zip(images, scenes, strict=True)]
        right = [v.things if name == "two_objects" else v.color_shape for v in verdicts]
        figures[f"{name}_guidance_{pipelines.STRONG_GUIDANCE:.0f}"] = _share(right)
    return Result(figures=figures)


def control(
    plain: StableDiffusionPipeline,
    pipe: StableDiffusionControlNetPipeline,
    held_out: HeldOut,
    *,
    kind: str,
    count: int = _CONTROLLED,
) -> Result:
    """Scores of the same prompts and seeds with the hint and without it."""
    scenes = open_scenes(held_out, count)
    rng = random.Random(4)
    wanted = [draw(arrange(scene, rng)) for scene in scenes]
    hints = [hint(kind, image) for image in wanted]
    texts = _captions(scenes)
    controlled = pipelines.generate(pipe, texts, hints=hints, seed=2000)
    free = pipelines.generate(plain, texts, seed=2000)
    rows = [
        Row(title=f"{kind}: the hint", captions=texts[:10], images=hints[:10]),
        Row(title=f"{kind}: with controlnet-{kind}", captions=texts[:10], images=controlled[:10]),
        Row(title=f"{kind}: the same without it", captions=texts[:10], images=free[:10]),
    ]
    right = _share([checker.judge(image, scene).color_shape for image, scene in zip(controlled, scenes, strict=True)])
    if kind == "edges":
        scores = [
            np.mean([edge_agreement(i, w) for i, w in zip(made, wanted, strict=True)]) for made in (controlled, free)
        ]
        figures = {"edge_f1": float(scores[0]), "edge_f1_gain": float(scores[0] - scores[1])}
    else:
        controlled_cells = np.mean([cell_agreement(i, w) for i, w in zip(controlled, wanted, strict=True)], axis=0)
        uncontrolled_cells = np.mean([cell_agreement(i, w) for i, w in zip(free, wanted, strict=True)], axis=0)
        figures = {
            "layout_cells": float(controlled_cells[0]),
            "layout_object_cells": float(controlled_cells[1]),
            "layout_object_cells_without": float(uncontrolled_cells[1]),
        }
    return Result(figures={**figures, f"{kind}_color_shape": right}, rows=rows)


def style(pipe: StableDiffusionPipeline, held_out: HeldOut, *, name: str, folder: Path) -> Result:
    """Share of pictures that show the style with the adapter, and by chance without it."""
    statistic = STATISTICS[name]
    scenes = singles(held_out)[: _STYLED // 2] + doubles(held_out)[: _STYLED // 2]
    texts = _captions(scenes)
    plain = pipelines.generate(pipe, texts, seed=3000)
    pipe.load_lora_weights(folder, adapter_name=name)
    styled = pipelines.generate(pipe, texts, seed=3000)
    figures = {
        f"{name}_shown": _share([statistic.shown(image) for image in styled]),
        f"{name}_without": _share([statistic.shown(image) for image in plain]),
        f"{name}_{statistic.name}": float(np.mean([statistic.measure(image) for image in styled])),
        f"{name}_{statistic.name}_without": float(np.mean([statistic.measure(image) for image in plain])),
    }
    if any(hasattr(module, "lora_A") for module in pipe.text_encoder.modules()):
        pipe.text_encoder.disable_adapters()
        halved = pipelines.generate(pipe, texts, seed=3000)
        figures[f"{name}_shown_without_text_part"] = _share([statistic.shown(image) for image in halved])
    pipe.unload_lora_weights()
    shown = slice(_STYLED // 2 - 5, _STYLED // 2 + 5)
    return Result(figures=figures, rows=[Row(title=f"LoRA {name}", captions=texts[shown], images=styled[shown])])


def evaluate(settings: Settings) -> Result:
    """Scores of everything that the pack's folder holds."""
    held_out = HeldOut.load()
    pipe = pipelines.load(settings.out)
    parts = [text_only(pipe, held_out), strongly_guided(pipe, held_out)]
    for kind in KINDS:
        model = ControlNetModel.from_pretrained(settings.out / f"controlnet-{kind}").to(device())
        parts.append(control(pipe, pipelines.controlled(pipe, model), held_out, kind=kind))
    parts += [style(pipe, held_out, name=a.style, folder=settings.out / "loras" / a.style) for a in settings.adapters]
    figures = {name: value for part in parts for name, value in part.figures.items()}
    first = [name for name in MINIMUMS if name in figures]
    ordered = {name: round(figures[name], 4) for name in [*first, *(n for n in figures if n not in first)]}
    return Result(figures=ordered, rows=[row for part in parts for row in part.rows])
