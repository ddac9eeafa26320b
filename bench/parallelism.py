"""What a second replica is worth to one request: its guidance halves on two replicas, beside both halves on one.

Each replica has one thread. Three kinds of requests run in turns: one with a guidance peer, one without, and two without
guidance at the same time, one on each replica. The last kind measures a pass of one row while the other core does the same
work. No step on two replicas is quicker than that pass, so the ideal is the time of a pass of two rows on one replica divided
by it. Speeds are those of the denoising stage. Needs an idle machine with two cores. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import overhead
import ranges
import torch
from latentflow import AsyncClient
from latentflow.results import StageTiming
from latentflow_local.runtime import run
from rich.console import Console
from rich.progress import track

import models
from models import MODELS

MODEL = MODELS["mid"]
REPLICAS = 2
WARM_UP_ROUNDS = 2


@dataclass(frozen=True, kw_only=True)
class Round:
    """The denoising of each kind of request in one round.

    Attributes:
        alone: Both halves on one replica.
        peer: The halves on two replicas.
        one_row: Without guidance, while the other replica does the same.
    """

    alone: StageTiming
    peer: StageTiming
    one_row: StageTiming

    @property
    def speedup(self) -> float:
        return self.alone.wall / self.peer.wall

    @property
    def ideal(self) -> float:
        return self.alone.forward / self.one_row.forward


async def requests(client: AsyncClient) -> Round:
    """The requests of a round."""
    peer = await overhead.denoising(client, MODEL, guidance_scale=overhead.GUIDANCE)
    # One server computes a deterministic request.
    alone = await overhead.denoising(client, MODEL, guidance_scale=overhead.GUIDANCE, deterministic=True)
    both = await asyncio.gather(*(overhead.denoising(client, MODEL, guidance_scale=1.0) for _ in range(REPLICAS)))
    if len({one.replica for one in both}) < REPLICAS:
        raise RuntimeError("both requests without guidance ran on one replica")
    return Round(alone=alone, peer=peer, one_row=both[0])


async def bench(*, rounds: int) -> list[Round]:
    """Starts the servers and measures."""
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        models.write(MODEL, root)
        scaling = {"minReplicas": REPLICAS, "maxReplicas": REPLICAS}
        workflow = overhead.workflow_with(MODEL, scaling=scaling, parallelism={"latent": REPLICAS})
        async with run(
            [workflow], model_root=root, listen="127.0.0.1:0", threads=1, cores=REPLICAS, log_level="ERROR"
        ) as runtime:
            await runtime.supervisor.wait_ready(overhead.READY_SECONDS)
            async with AsyncClient(runtime.target, timeout=overhead.READY_SECONDS) as client:
                for measured in track(range(-WARM_UP_ROUNDS, rounds), "parallelism", console=Console(stderr=True)):
                    one = await requests(client)
                    if measured >= 0:
                        taken.append(one)
    return taken


def figures_of(rounds: Sequence[Round]) -> dict[str, float]:
    """The medians over rounds of ratios within a round."""
    figures = {
        "latent_speedup": statistics.median(one.speedup for one in rounds),
        "latent_ideal": statistics.median(one.ideal for one in rounds),
        "latent_of_ideal": statistics.median(one.speedup / one.ideal for one in rounds),
    }
    return {name: round(value, 3) for name, value in figures.items()}


def main() -> int:
    """Measures; returns 1 where a figure is outside its range."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    console = Console(width=110)
    console.print(f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    taken = asyncio.run(bench(rounds=options.rounds))
    kinds = {name: [getattr(one, name) for one in taken] for name in ("alone", "peer", "one_row")}
    overhead.print_denoising(kinds, title=f"{MODEL.name}, one thread each", console=console)
    return ranges.conclude(figures_of(taken), ranges.load("latent"), title="Latent parallelism", console=console)


if __name__ == "__main__":
    sys.exit(main())
