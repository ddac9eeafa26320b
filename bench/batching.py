"""What sharing forward passes is worth: the rate of eight concurrent requests, beside diffusers and beside its bound.

Both sides have the same weights and threads. Diffusers makes one image after the other. The bound is the rate of servers
that do nothing but forward passes, all of them with eight requests: it is computed from passes of the same networks,
timed in turns with both sides. The networks share the cores, so their times add up. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import overhead
import ranges
import torch
from diffusers import AutoencoderKL, ControlNetModel, DiffusionPipeline, UNet2DConditionModel
from latentflow import AsyncClient
from latentflow.api import DiffusionWorkflow
from latentflow_local.runtime import run
from latentflow_nodes.settings import usable_cores
from rich.console import Console
from rich.progress import track
from rich.table import Table

import models
from models import MODELS, SHAPES

CONCURRENT = 8
STEPS = MODELS["shapes"].steps
SIDE = MODELS["shapes"].side
LATENT_SIDE = SIDE // 8
WARM_UP_ROUNDS = 2


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One of the requests that run at the same time.

    Attributes:
        guided: Both guidance halves, so two rows.
        steered: With the edges ControlNet.
    """

    guided: bool = True
    sampler: str = "dpmpp_2m"
    steered: bool = False

    @property
    def rows(self) -> int:
        return 2 if self.guided else 1

    def arguments(self) -> dict[str, Any]:
        """The arguments of the client's `generate`."""
        control = {"control_images": {overhead.CONTROL_NET: overhead.outline(SIDE)}} if self.steered else {}
        return {"guidance_scale": overhead.GUIDANCE if self.guided else 1.0, "sampler": self.sampler, **control}


IDENTICAL = [Kind()] * CONCURRENT
MIXED = [
    Kind(guided=guided, sampler=sampler, steered=steered)
    for guided in (True, False)
    for sampler in ("dpmpp_2m", "euler")
    for steered in (True, False)
]


class Parts:
    """The networks of the pack in this process, whose passes the bound is computed from."""

    def __init__(self) -> None:
        self._unet = UNet2DConditionModel.from_pretrained(SHAPES / "unet").eval()
        self._net = ControlNetModel.from_pretrained(SHAPES / f"controlnet-{overhead.CONTROL_NET}").eval()
        self._vae = AutoencoderKL.from_pretrained(SHAPES / "vae").eval()
        self._width = self._unet.config.cross_attention_dim

    def bound(self, kinds: Sequence[Kind]) -> float:
        """Images per second if every step of all requests is one pass, and decoding another."""
        rows = sum(kind.rows for kind in kinds)
        steered = sum(kind.rows for kind in kinds if kind.steered)
        step = self._seconds(lambda: self._unet(*self._inputs(rows), return_dict=False))
        if steered:
            image = torch.zeros(steered, 3, SIDE, SIDE)
            step += self._seconds(lambda: self._net(*self._inputs(steered), controlnet_cond=image, return_dict=False))
        latents = torch.randn(len(kinds), 4, LATENT_SIDE, LATENT_SIDE)
        decode = self._seconds(lambda: self._vae.decode(latents, return_dict=False))
        return len(kinds) / (STEPS * step + decode)

    def _inputs(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        latents = torch.randn(rows, 4, LATENT_SIDE, LATENT_SIDE)
        return latents, torch.ones(rows), torch.randn(rows, 77, self._width)

    @staticmethod
    @torch.inference_mode()
    def _seconds(call: Callable[[], object]) -> float:
        times = []
        for _ in range(4):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])


def workflow() -> DiffusionWorkflow:
    """The example of the shapes pack, with eight requests in a forward pass."""
    document = overhead.workflow(MODELS["shapes"]).model_dump(mode="json", by_alias=True, exclude_none=True)
    for model in document["spec"]["models"]:
        if model["role"] != "LoRAStore":
            model["engine"] = {"maxRunning": CONCURRENT}
    return DiffusionWorkflow.model_validate(document)


async def rate(client: AsyncClient, kinds: Sequence[Kind]) -> float:
    """Images per second of requests of these kinds that start at the same time."""
    started = time.perf_counter()
    await asyncio.gather(
        *(
            client.generate(overhead.PROMPT, steps=STEPS, width=SIDE, height=SIDE, seed=seed, **kind.arguments())
            for seed, kind in enumerate(kinds)
        )
    )
    return len(kinds) / (time.perf_counter() - started)


async def bench(*, rounds: int, threads: int, console: Console) -> dict[str, float]:
    """Measures diffusers, both sets of requests and their bounds in turns, and prints a table."""
    torch.set_num_threads(threads)
    plain = overhead.Plain(MODELS["shapes"], DiffusionPipeline.from_pretrained(SHAPES))
    parts = Parts()
    rates: dict[str, list[float]] = {name: [] for name in ("diffusers", "identical", "bound", "mixed", "mixed bound")}
    async with run(
        [workflow()], model_root=models.SHAPES.parent, listen="127.0.0.1:0", threads=threads, log_level="ERROR"
    ) as runtime:
        await runtime.supervisor.wait_ready(overhead.READY_SECONDS)
        async with AsyncClient(runtime.target, timeout=overhead.READY_SECONDS) as client:
            for measured in track(range(-WARM_UP_ROUNDS, rounds), "batching", console=Console(stderr=True)):
                times = overhead.Times()
                plain.generate(times)
                one = {
                    "diffusers": 1e3 / times.wall[0],
                    "identical": await rate(client, IDENTICAL),
                    "bound": parts.bound(IDENTICAL),
                    "mixed": await rate(client, MIXED),
                    "mixed bound": parts.bound(MIXED),
                }
                if measured >= 0:
                    for name, value in one.items():
                        rates[name].append(value)
    return figures_of(rates, console=console)


def figures_of(rates: dict[str, list[float]], *, console: Console) -> dict[str, float]:
    """The figures: medians over rounds of ratios within a round."""

    def ratio(of: str, to: str) -> float:
        return statistics.median(a / b for a, b in zip(rates[of], rates[to], strict=True))

    table = Table("", "images per second", "of diffusers", box=None, title=f"{CONCURRENT} requests, shapes")
    for name, values in rates.items():
        table.add_row(name, f"{statistics.median(values):.2f}", f"{ratio(name, 'diffusers'):.2f}")
    console.print(table)
    of_bound = ratio("identical", "bound")
    figures = {
        "throughput_8": ratio("identical", "diffusers"),
        "throughput_8_of_bound": of_bound,
        "mixed_of_bound": ratio("mixed", "mixed bound"),
        "mixed_efficiency": ratio("mixed", "mixed bound") / of_bound,
    }
    return {name: round(value, 3) for name, value in figures.items()}


def main() -> int:
    """Measures; returns 1 where a figure is outside its range."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=usable_cores())
    options = parser.parse_args()
    console = Console(width=110)
    console.print(f"{options.threads} threads, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    figures = asyncio.run(bench(rounds=options.rounds, threads=options.threads, console=console))
    return ranges.conclude(figures, ranges.load("batching"), title="Sharing forward passes", console=console)


if __name__ == "__main__":
    sys.exit(main())
