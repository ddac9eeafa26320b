"""The overhead of serving: latency of a request through the servers, beside one plain diffusers pipeline in one process.

Both sides have the same weights, prompt, steps, size, guidance and threads, and run one request at a time, in turn.
The same hooks measure the time inside forward passes on both sides; the rest of the wall time is `non_model_ms`. A ratio
is the median over pairs of requests that follow each other: the speed of a machine that shares its cores changes within
seconds, and where it has two levels, the median of one side alone jumps between them.
Every run starts its servers anew, and a figure is the median of the runs. Needs an idle machine. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ranges
import torch
from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionControlNetPipeline
from latentflow import AsyncClient, Result
from latentflow.api import API_VERSION, DiffusionWorkflow, load_workflows
from latentflow.results import StageTiming
from latentflow_local.runtime import run
from latentflow_nodes import families
from latentflow_nodes.engine import forward_time
from latentflow_nodes.settings import usable_cores
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import track
from rich.table import Table

import models
from models import MODELS, BenchModel

PROMPT = "a large red circle on the left, white background"
GUIDANCE = 5.0
MEASURED = ("shapes", "mid")
CONTROL_NET = "edges"
WARM_UP_ROUNDS = 2
READY_SECONDS = 300.0


@dataclass(kw_only=True)
class Times:
    """Samples of one side, in milliseconds: of whole requests, and of the forward passes in them."""

    wall: list[float] = field(default_factory=list)
    forward: list[float] = field(default_factory=list)

    def add(self, *, wall: float, forward: float) -> None:
        """Adds one request, in seconds."""
        self.wall.append(wall * 1e3)
        self.forward.append(forward * 1e3)

    @property
    def outside(self) -> list[float]:
        """Wall time outside forward passes."""
        return [wall - forward for wall, forward in zip(self.wall, self.forward, strict=True)]


@dataclass(kw_only=True)
class Sides:
    """One request, measured on both sides: by plain diffusers and by the servers."""

    diffusers: Times = field(default_factory=Times)
    servers: Times = field(default_factory=Times)
    results: list[Result] = field(default_factory=list)


class Plain:
    """A diffusers pipeline whose forward passes are timed."""

    def __init__(self, model: BenchModel, pipeline: Any, *networks: torch.nn.Module) -> None:
        pipeline.set_progress_bar_config(disable=True)
        self._model = model
        self._pipeline = pipeline
        decoding = families.of_pipeline(models.SHAPES).decoding_modules(pipeline.vae)
        modules = [pipeline.text_encoder, pipeline.unet, *decoding, *networks]
        self._stopwatch = forward_time.measure(modules, device=torch.device("cpu"))

    def generate(self, times: Times, **arguments: Any) -> None:
        """Makes one image and adds its times."""
        self._stopwatch.take()
        started = time.perf_counter()
        self._pipeline(
            PROMPT,
            num_inference_steps=self._model.steps,
            guidance_scale=GUIDANCE,
            width=self._model.side,
            height=self._model.side,
            generator=torch.Generator().manual_seed(1),
            **arguments,
        )
        times.add(wall=time.perf_counter() - started, forward=self._stopwatch.take().nanoseconds() / 1e9)


class Served:
    """A client of the servers of a model."""

    def __init__(self, model: BenchModel, client: AsyncClient) -> None:
        self._model = model
        self._client = client

    async def generate(self, times: Times, **arguments: Any) -> Result:
        """Makes one image and adds its times."""
        side = self._model.side
        started = time.perf_counter()
        result = await self._client.generate(
            PROMPT, steps=self._model.steps, guidance_scale=GUIDANCE, width=side, height=side, seed=1, **arguments
        )
        result.image.load()
        wall = time.perf_counter() - started
        times.add(wall=wall, forward=sum(stage.forward for stage in result.done.stages))
        return result


def workflow(model: BenchModel) -> DiffusionWorkflow:
    """The workflow that serves a model: the example for shapes, which has ControlNets; three models otherwise."""
    if model.name == "shapes":
        return load_workflows(models.ROOT / "examples/shapes.yaml")[0]
    parts = (("text", "TextEncoder"), ("base", "Denoiser"), ("pixels", "VAE"))
    spec = {"models": [{"name": name, "role": role, "source": {"uri": model.name}} for name, role in parts]}
    document = {
        "apiVersion": API_VERSION,
        "kind": "DiffusionWorkflow",
        "metadata": {"name": model.name},
        "spec": spec,
    }
    return DiffusionWorkflow.model_validate(document)


def workflow_with(model: BenchModel, *, name: str | None = None, **denoiser: Any) -> DiffusionWorkflow:
    """As `workflow`, with further fields of the denoiser, and another name if there is one."""
    document = workflow(model).model_dump(mode="json", by_alias=True, exclude_none=True)
    base = next(one for one in document["spec"]["models"] if one["role"] == "Denoiser")
    base |= denoiser
    if name is not None:
        document["metadata"]["name"] = name
    return DiffusionWorkflow.model_validate(document)


async def denoising(client: AsyncClient, model: BenchModel, **arguments: Any) -> StageTiming:
    """Makes an image, and returns how long its denoising took."""
    result = await client.generate(PROMPT, steps=model.steps, width=model.side, height=model.side, seed=1, **arguments)
    return next(stage for stage in result.done.stages if stage.stage == "denoise")


def print_denoising(kinds: Mapping[str, Sequence[StageTiming]], *, title: str, console: Console) -> None:
    """Prints where the time of each kind of request was spent."""
    table = Table("seconds, medians", "denoising", "in forward passes", box=None, title=title)
    for name, stages in kinds.items():
        wall, forward = (statistics.median(getattr(stage, key) for stage in stages) for key in ("wall", "forward"))
        table.add_row(name, f"{wall:.3f}", f"{forward:.3f}")
    console.print(table)


async def measure(model: BenchModel, *, root: Path, rounds: int, threads: int) -> dict[str, Sides]:
    """One run: starts the servers and measures each kind of request `rounds` times.

    Args:
        root: The model root; holds the folder of the model.

    Returns:
        By kind of request: "text", and for shapes "edges", a request with a ControlNet.
    """
    folder = root / model.name
    plain = Plain(model, DiffusionPipeline.from_pretrained(folder))
    kinds: dict[str, tuple[Plain, dict[str, Any], dict[str, Any]]] = {"text": (plain, {}, {})}
    if (net_folder := folder / f"controlnet-{CONTROL_NET}").exists():
        net = ControlNetModel.from_pretrained(net_folder)
        steered = StableDiffusionControlNetPipeline.from_pretrained(folder, controlnet=net)
        circle = outline(model.side)
        kinds["edges"] = (
            Plain(model, steered, net),
            {"image": circle},
            {"control_images": {CONTROL_NET: circle}},
        )
    sides = {kind: Sides() for kind in kinds}
    async with run(
        [workflow(model)], model_root=root, listen="127.0.0.1:0", threads=threads, log_level="ERROR"
    ) as runtime:
        await runtime.supervisor.wait_ready(READY_SECONDS)
        async with AsyncClient(runtime.target, timeout=READY_SECONDS) as client:
            served = Served(model, client)
            for measured in track(range(-WARM_UP_ROUNDS, rounds), model.name, console=Console(stderr=True)):
                for kind, (pipeline, diffusers_arguments, servers_arguments) in kinds.items():
                    into = sides[kind] if measured >= 0 else Sides()
                    pipeline.generate(into.diffusers, **diffusers_arguments)
                    into.results.append(await served.generate(into.servers, **servers_arguments))
    return sides


def outline(side: int) -> Image.Image:
    """The control image: a circle, white on black."""
    image = Image.new("RGB", (side, side))
    ImageDraw.Draw(image).ellipse((side // 5, side // 5, side * 2 // 3, side * 2 // 3), outline="white")
    return image


def figures_of(model: BenchModel, sides: dict[str, Sides]) -> dict[str, float]:
    """The figures of one run. Those of another model than shapes have its name at their end."""
    text = sides["text"]
    served, plain = statistics.median(text.servers.wall), statistics.median(text.diffusers.wall)
    pairs = zip(text.servers.wall, text.diffusers.wall, strict=True)
    figures = {
        "latency_ratio": statistics.median(ours / theirs for ours, theirs in pairs),
        "non_model_ms": statistics.median(text.servers.outside) - statistics.median(text.diffusers.outside),
        "served_ms": served,
        "diffusers_ms": plain,
    }
    if "edges" in sides:
        edges = sides["edges"]
        steps = model.steps
        figures["controlnet_call_ms"] = (statistics.median(edges.servers.wall) - served) / steps
        figures["controlnet_call_ms_diffusers"] = (statistics.median(edges.diffusers.wall) - plain) / steps
    suffix = "" if model.name == "shapes" else f"_{model.name}"
    return {name + suffix: value for name, value in figures.items()}


def report(model: BenchModel, sides: dict[str, Sides], *, console: Console) -> None:
    """Prints where the time of a run was spent."""
    table = Table("", "median ms", "min", "max", "in forward passes", "outside", box=None, title=model.name)
    for kind, both in sides.items():
        for side, times in (("diffusers", both.diffusers), ("servers", both.servers)):
            numbers = (statistics.median(times.wall), min(times.wall), max(times.wall))
            shares = (statistics.median(times.forward), statistics.median(times.outside))
            table.add_row(f"{kind}, {side}", *(f"{number:.1f}" for number in (*numbers, *shares)))
    console.print(table)
    text = sides["text"]
    stages = Table("text, by stage", "wall ms", "forward", "queued", "hand-off and the rest", box=None)
    stages.add_row("planned and queued", f"{statistics.median(r.done.queued for r in text.results) * 1e3:.2f}")
    for name in ("encode", "denoise", "decode"):
        timings = [timing for result in text.results for timing in result.done.stages if timing.stage == name]
        wall, forward, wait = (
            statistics.median(getattr(timing, key) for timing in timings) * 1e3 for key in ("wall", "forward", "wait")
        )
        stages.add_row(name, *(f"{number:.2f}" for number in (wall, forward, wait, wall - forward - wait)))
    total = statistics.median(r.done.total for r in text.results) * 1e3
    stages.add_row("gateway, arrival to end", f"{total:.2f}")
    stages.add_row("client and its connection", f"{statistics.median(text.servers.wall) - total:.2f}")
    console.print(stages)


def bench(names: list[str], *, runs: int, rounds: int, threads: int) -> dict[str, float]:
    """The figures of some models: for each the median over the runs."""
    console = Console(width=110)
    torch.set_num_threads(threads)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for model in (MODELS[name] for name in names):
            root = models.SHAPES.parent
            if model.parts():
                root = Path(folder)
                models.write(model, root)
            taken = []
            for index in range(runs):
                sides = asyncio.run(measure(model, root=root, rounds=rounds, threads=threads))
                taken.append(figures_of(model, sides))
                console.print(f"run {index + 1} of {runs}, {model.name}: {json.dumps(_rounded(taken[-1]))}")
            report(model, sides, console=console)
            figures |= {name: statistics.median(run[name] for run in taken) for name in taken[0]}
    if "mid" in names:
        figures["rows_ratio_mid"] = models.rows_ratio(models.mid_unet(), side=MODELS["mid"].side // 8)
    return _rounded(figures)


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in figures.items()}


def main() -> int:
    """Measures; returns 1 where a figure is outside its range."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MEASURED))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=15, help="requests of each kind on each side in a run")
    parser.add_argument("--threads", type=int, default=usable_cores())
    options = parser.parse_args()
    console = Console(width=110)
    processor = platform.processor() or platform.machine()
    console.print(f"{processor}, {options.threads} threads, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    figures = bench(options.models, runs=options.runs, rounds=options.rounds, threads=options.threads)
    allowed = ranges.load(*(f"overhead-{name}" for name in options.models))
    return ranges.conclude(figures, allowed, title="Overhead of serving", console=console)


if __name__ == "__main__":
    sys.exit(main())
