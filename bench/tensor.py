"""What tensor parallelism is worth to one request: a denoiser's weights divided among two ranks, beside one process.

Each process has one thread. A request to a whole denoiser and one to a divided denoiser run in turns, in servers of their own.
The layers that are divided take a share of a pass; if they took half as long on two ranks, and nothing else changed, the speed-up
would be the ideal. Speeds are those of the denoising stage. Needs an idle machine with two cores. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import overhead
import ranges
import torch
from diffusers import UNet2DConditionModel
from latentflow import AsyncClient
from latentflow.results import StageTiming
from latentflow_local.runtime import run
from latentflow_nodes.engine.forward_time import measure
from latentflow_nodes.families import splits
from rich.console import Console
from rich.progress import track

import models
from models import MODELS

MODEL = MODELS["wide"]
RANKS = 2
WARM_UP_ROUNDS = 1
SHARE_PASSES = 8
TOKENS = 32

# The denoising of one request on the whole denoiser, and on the divided one.
Round = tuple[StageTiming, StageTiming]


@torch.inference_mode()
def divided_share(unet: UNet2DConditionModel, *, side: int) -> float:
    """The share of a pass on one thread that the divided layers take, the median of some passes.

    Args:
        side: Width and height of the latents.
    """
    torch.set_num_threads(1)
    stopwatch = measure(_divided_modules(unet), device=torch.device("cpu"))
    latents = torch.randn(2, 4, side, side)
    context = torch.randn(2, TOKENS, unet.config.cross_attention_dim)
    shares = []
    for _ in range(SHARE_PASSES + 1):
        started = time.perf_counter_ns()
        unet(latents, torch.tensor(1), context, return_dict=False)
        shares.append(stopwatch.take().nanoseconds() / (time.perf_counter_ns() - started))
    return statistics.median(shares[1:])


def _divided_modules(unet: UNet2DConditionModel) -> list[torch.nn.Module]:
    """The modules that a plan divides, none inside another."""
    plan = splits.of_unet(unet)
    names = {one.module for one in plan.counts} | {one.layer for one in plan.splits}
    return [unet.get_submodule(name) for name in names if not any(name.startswith(f"{other}.") for other in names)]


async def bench(*, rounds: int) -> list[Round]:
    """Starts the servers and measures."""
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        models.write(MODEL, root)
        divided = overhead.workflow_with(MODEL, name=f"{MODEL.name}-divided", parallelism={"tensor": RANKS})
        workflows = [overhead.workflow(MODEL), divided]
        async with run(
            workflows, model_root=root, listen="127.0.0.1:0", threads=1, cores=RANKS, log_level="ERROR"
        ) as runtime:
            await runtime.supervisor.wait_ready(overhead.READY_SECONDS)
            async with AsyncClient(runtime.target, timeout=overhead.READY_SECONDS) as client:
                for measured in track(range(-WARM_UP_ROUNDS, rounds), "tensor", console=Console(stderr=True)):
                    whole, parts = [
                        await overhead.denoising(client, MODEL, workflow=workflow.full_name) for workflow in workflows
                    ]
                    if measured >= 0:
                        taken.append((whole, parts))
    return taken


def figures_of(rounds: Sequence[Round], share: float) -> dict[str, float]:
    """The medians over rounds of ratios within a round."""
    ideal = 1 / (1 - share + share / RANKS)
    speedup = statistics.median(whole.wall / parts.wall for whole, parts in rounds)
    figures = {"tensor_speedup": speedup, "tensor_ideal": ideal, "tensor_of_ideal": speedup / ideal}
    return {name: round(value, 3) for name, value in figures.items()}


def main() -> int:
    """Measures; returns 1 where a figure is outside its range."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    console = Console(width=110)
    console.print(f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    share = divided_share(models.wide_unet().eval(), side=MODEL.side // 8)
    taken = asyncio.run(bench(rounds=options.rounds))
    kinds = {"one process": [whole for whole, _ in taken], f"{RANKS} ranks": [parts for _, parts in taken]}
    title = f"{MODEL.name}, one thread each; divided layers take {share:.0%} of a pass"
    overhead.print_denoising(kinds, title=title, console=console)
    return ranges.conclude(figures_of(taken, share), ranges.load("tensor"), title="Tensor parallelism", console=console)


if __name__ == "__main__":
    sys.exit(main())
