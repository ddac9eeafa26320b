"""What a ControlNet on a server of its own is worth to one request, beside a diffusers pipeline that runs it in line.

Diffusers has one thread; here the denoiser and the ControlNet have one thread each. The ControlNet computes while the
denoiser's down and middle blocks do, and the up blocks need its residuals. So a step takes at least as long as the longer of
the two and the up blocks. The ideal is computed from these parts, each timed while another thread runs the other network, as
it does in a step. Needs an idle machine with two cores. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import overhead
import ranges
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from latentflow import AsyncClient
from latentflow.api import DiffusionWorkflow
from latentflow_local.runtime import run
from rich.console import Console
from rich.progress import track
from rich.table import Table

import models
from models import MODELS

MODEL = MODELS["mid"]
CORES = 2
ROWS = 2
WARM_UP_ROUNDS = 1
FOLDER = f"controlnet-{overhead.CONTROL_NET}"


@dataclass(frozen=True, kw_only=True)
class Step:
    """The parts of a step, in seconds.

    Attributes:
        net: The ControlNet.
        first: The denoiser's down and middle blocks.
        last: Its up blocks.
    """

    net: float
    first: float
    last: float

    @property
    def ideal(self) -> float:
        """How many times as long the parts take one after the other as with the first two at the same time."""
        return (self.net + self.first + self.last) / (max(self.net, self.first) + self.last)


class Parts:
    """The networks in this process."""

    def __init__(self, folder: Path) -> None:
        self._unet = models.mid_unet().eval()
        self._net = ControlNetModel.from_pretrained(folder / FOLDER).eval()
        self._middle_ended = 0.0
        self._unet.mid_block.register_forward_hook(self._note)
        self._latents = torch.randn(ROWS, 4, MODEL.side // 8, MODEL.side // 8)
        self._context = torch.randn(ROWS, 77, self._unet.config.cross_attention_dim)
        self._image = torch.zeros(ROWS, 3, MODEL.side, MODEL.side)

    def step(self) -> Step:
        """Times the parts."""
        with beside(self._run_net):
            started = time.perf_counter()
            self._run_unet()
            first, last = self._middle_ended - started, time.perf_counter() - self._middle_ended
        with beside(self._run_unet):
            started = time.perf_counter()
            self._run_net()
            net = time.perf_counter() - started
        return Step(net=net, first=first, last=last)

    def _note(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            self._middle_ended = time.perf_counter()

    @torch.inference_mode()
    def _run_unet(self) -> None:
        self._unet(self._latents, torch.tensor(1), self._context, return_dict=False)

    @torch.inference_mode()
    def _run_net(self) -> None:
        self._net(self._latents, torch.tensor(1), self._context, controlnet_cond=self._image, return_dict=False)


@contextlib.contextmanager
def beside(call: Callable[[], None]) -> Iterator[None]:
    """Another thread repeats a call during the block."""
    ended = threading.Event()
    started = threading.Event()

    def repeat() -> None:
        torch.set_num_threads(1)
        while not ended.is_set():
            started.set()
            call()

    thread = threading.Thread(target=repeat)
    thread.start()
    started.wait()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def workflow() -> DiffusionWorkflow:
    """The workflow of the model with a ControlNet."""
    document = overhead.workflow(MODEL).model_dump(mode="json", by_alias=True, exclude_none=True)
    source = {"uri": MODEL.name, "subfolder": FOLDER}
    net = {"name": overhead.CONTROL_NET, "role": "ControlNet", "attachTo": "base", "source": source}
    document["spec"]["models"].append(net)
    return DiffusionWorkflow.model_validate(document)


async def bench(*, rounds: int, console: Console) -> dict[str, float]:
    """Starts the servers, measures, and prints a table."""
    torch.set_num_threads(1)
    plain, served = overhead.Times(), overhead.Times()
    steps = []
    with tempfile.TemporaryDirectory() as root:
        folder = models.write(MODEL, Path(root))
        ControlNetModel.from_unet(models.mid_unet()).save_pretrained(folder / FOLDER)
        net = ControlNetModel.from_pretrained(folder / FOLDER)
        pipeline = StableDiffusionControlNetPipeline.from_pretrained(folder, controlnet=net)
        diffusers = overhead.Plain(MODEL, pipeline, net)
        parts = Parts(folder)
        image = overhead.outline(MODEL.side)
        async with run(
            [workflow()], model_root=Path(root), listen="127.0.0.1:0", threads=1, cores=CORES, log_level="ERROR"
        ) as runtime:
            await runtime.supervisor.wait_ready(overhead.READY_SECONDS)
            async with AsyncClient(runtime.target, timeout=overhead.READY_SECONDS) as client:
                servers = overhead.Served(MODEL, client)
                for measured in track(range(-WARM_UP_ROUNDS, rounds), "steering", console=Console(stderr=True)):
                    of_diffusers, of_servers = (plain, served) if measured >= 0 else (overhead.Times(),) * 2
                    diffusers.generate(of_diffusers, image=image)
                    await servers.generate(of_servers, control_images={overhead.CONTROL_NET: image})
                    one = parts.step()
                    if measured >= 0:
                        steps.append(one)
    return figures_of(plain, served, steps, console=console)


def figures_of(
    plain: overhead.Times, served: overhead.Times, steps: list[Step], *, console: Console
) -> dict[str, float]:
    """The figures: medians over rounds of ratios within a round."""
    table = Table("milliseconds, medians", "", box=None, title=f"{MODEL.name} with a ControlNet, one thread each")
    table.add_row("request, diffusers", f"{statistics.median(plain.wall):.0f}")
    table.add_row("request, servers", f"{statistics.median(served.wall):.0f}")
    for name in ("net", "first", "last"):
        table.add_row(f"step: {name}", f"{statistics.median(getattr(one, name) for one in steps) * 1e3:.0f}")
    console.print(table)
    speedups = [theirs / ours for theirs, ours in zip(plain.wall, served.wall, strict=True)]
    ideals = [one.ideal for one in steps]
    figures = {
        "controlnet_speedup": statistics.median(speedups),
        "controlnet_ideal": statistics.median(ideals),
        "controlnet_of_ideal": statistics.median(a / b for a, b in zip(speedups, ideals, strict=True)),
    }
    return {name: round(value, 3) for name, value in figures.items()}


def main() -> int:
    """Measures; returns 1 where a figure is outside its range."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    console = Console(width=110)
    console.print(f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    figures = asyncio.run(bench(rounds=options.rounds, console=console))
    return ranges.conclude(figures, ranges.load("controlnet"), title="A ControlNet as a service", console=console)


if __name__ == "__main__":
    sys.exit(main())
