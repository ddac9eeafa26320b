"""What serving a workflow as separate processes costs: latency beside one plain diffusers pipeline, in one run.

The same weights, prompt, steps, size, guidance and threads on both sides, one request at a time, turn about. The time
inside forward passes is measured by the same hooks on both sides; what is left of the wall time is `non_model_ms`.
Run it on an idle machine. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionControlNetPipeline
from latentflow import AsyncClient, Result
from latentflow.api import load_workflows
from latentflow_local.runtime import run
from latentflow_nodes import families
from latentflow_nodes.engine.forward_time import measure
from latentflow_nodes.settings import usable_cores
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).parents[1]
PROMPT = "a large red circle on the left, white background"
STEPS, SIDE, GUIDANCE = 20, 64, 5.0
MAX_RATIO, MAX_NON_MODEL_MS = 1.10, 30.0


@dataclass
class Side:
    """Samples of one side, in milliseconds."""

    wall: list[float] = field(default_factory=list)
    forward: list[float] = field(default_factory=list)

    @property
    def other(self) -> list[float]:
        return [wall - forward for wall, forward in zip(self.wall, self.forward, strict=True)]


class Plain:
    """One diffusers pipeline with the hooks."""

    def __init__(self, pipeline: Any, *, nets: list[torch.nn.Module] | None = None) -> None:
        pipeline.set_progress_bar_config(disable=True)
        self._pipeline = pipeline
        decoding = families.of_pipeline(ROOT / "models/shapes").decoding_modules(pipeline.vae)
        modules = [pipeline.text_encoder, pipeline.unet, *decoding, *(nets or [])]
        self._stopwatch = measure(modules, device=torch.device("cpu"))

    def __call__(self, side: Side, **arguments: Any) -> Image.Image:
        self._stopwatch.take()
        began = time.perf_counter()
        image: Image.Image = self._pipeline(
            PROMPT,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            width=SIDE,
            height=SIDE,
            generator=torch.Generator().manual_seed(1),
            **arguments,
        ).images[0]
        side.wall.append((time.perf_counter() - began) * 1e3)
        side.forward.append(self._stopwatch.take().nanoseconds() / 1e6)
        return image


async def served(client: AsyncClient, side: Side, **arguments: Any) -> Result:
    began = time.perf_counter()
    result = await client.generate(
        PROMPT, steps=STEPS, guidance_scale=GUIDANCE, width=SIDE, height=SIDE, seed=1, **arguments
    )
    result.image.load()
    side.wall.append((time.perf_counter() - began) * 1e3)
    side.forward.append(sum(stage.forward for stage in result.done.stages) * 1e3)
    return result


async def bench(rounds: int, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    shapes = ROOT / "models/shapes"
    edges = Image.new("RGB", (SIDE, SIDE))
    ImageDraw.Draw(edges).ellipse((12, 12, 44, 44), outline="white")
    net = ControlNetModel.from_pretrained(shapes / "controlnet-edges")
    plain = Plain(DiffusionPipeline.from_pretrained(shapes))
    steered = Plain(StableDiffusionControlNetPipeline.from_pretrained(shapes, controlnet=net), nets=[net])
    sides = {name: Side() for name in ("plain", "served", "plain edges", "served edges")}
    results: list[Result] = []
    workflows = load_workflows(ROOT / "examples/shapes.yaml")
    async with run(
        workflows, model_root=ROOT / "models", listen="127.0.0.1:0", threads=threads, log_level="ERROR"
    ) as runtime:
        await runtime.supervisor.wait_ready(300)
        async with AsyncClient(runtime.target) as client:
            for _ in range(2):
                plain(Side()), await served(client, Side())
                steered(Side(), image=edges), await served(client, Side(), control_images={"edges": edges})
            for _ in track(range(rounds), "measuring", console=Console(stderr=True)):
                plain(sides["plain"])
                results.append(await served(client, sides["served"]))
                steered(sides["plain edges"], image=edges)
                await served(client, sides["served edges"], control_images={"edges": edges})
    _print(sides, results)
    return _figures(sides)


def _figures(sides: dict[str, Side]) -> dict[str, float]:
    median = {name: statistics.median(side.wall) for name, side in sides.items()}
    other = {name: statistics.median(side.other) for name, side in sides.items()}
    figures = {
        "latency_ratio": median["served"] / median["plain"],
        "non_model_ms": other["served"] - other["plain"],
        "served_ms": median["served"],
        "diffusers_ms": median["plain"],
        "controlnet_call_ms": (median["served edges"] - median["served"]) / STEPS,
        "controlnet_call_ms_diffusers": (median["plain edges"] - median["plain"]) / STEPS,
    }
    return {name: round(value, 3) for name, value in figures.items()}


def _print(sides: dict[str, Side], results: list[Result]) -> None:
    console = Console(width=110)
    table = Table("", "median ms", "min", "max", "in forward passes", "outside", box=None)
    for name, side in sides.items():
        numbers = (statistics.median(side.wall), min(side.wall), max(side.wall))
        parts = (statistics.median(side.forward), statistics.median(side.other))
        table.add_row(name, *(f"{number:.1f}" for number in (*numbers, *parts)))
    console.print(table)
    stages = Table("text only, by stage", "wall ms", "forward", "wait before", "hand-off and the rest", box=None)
    stages.add_row("plan and queue", f"{statistics.median(r.done.queued for r in results) * 1e3:.2f}")
    for name in ("encode", "denoise", "decode"):
        of = [stage for result in results for stage in result.done.stages if stage.stage == name]
        wall, forward, wait = (
            statistics.median(getattr(stage, key) for stage in of) * 1e3 for key in ("wall", "forward", "wait")
        )
        stages.add_row(name, *(f"{number:.2f}" for number in (wall, forward, wait, wall - forward - wait)))
    totals = statistics.median(r.done.total for r in results) * 1e3
    whole = statistics.median(sides["served"].wall)
    stages.add_row("gateway, arrival to end", f"{totals:.2f}")
    stages.add_row("client and its connection", f"{whole - totals:.2f}")
    console.print(stages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=usable_cores())
    options = parser.parse_args()
    figures = asyncio.run(bench(options.rounds, options.threads))
    print(f"{platform.processor() or platform.machine()}, {options.threads} threads, torch {torch.__version__}")
    over = figures["latency_ratio"] > MAX_RATIO or figures["non_model_ms"] > MAX_NON_MODEL_MS
    if over:
        print(f"over the bar: latency_ratio at most {MAX_RATIO}, non_model_ms at most {MAX_NON_MODEL_MS}")
    print(json.dumps({"figures": figures}))
    sys.exit(over)


if __name__ == "__main__":
    main()
