"""Sleep and wake of a denoiser on the CPU, beside a copy of its weights and a forward pass.

The server runs in a process of its own, as `latentflow-node` does, with one GiB of random weights in float32. Each round
measures a forward pass, the Sleep, the Wake, and in this process a copy of as many bytes with one thread. The figures are
medians over rounds of ratios within a round. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import grpc.aio
import ranges
import torch
from latentflow.api.types import Engine
from latentflow.v1 import control_pb2, control_pb2_grpc, stage_pb2, stage_pb2_grpc
from latentflow_nodes.engine import malloc
from latentflow_nodes.engine import threads as engine_threads
from latentflow_nodes.engine.device_memory import measure
from latentflow_nodes.server import serve
from latentflow_nodes.settings import NodeSettings, usable_cores
from latentflow_nodes.tensors import codec
from rich.console import Console
from rich.progress import track
from rich.table import Table

import models
from models import MODELS

MODEL = MODELS["gib"]
SECONDS = 600.0
# As the first forward pass after a Wake.
LATENT_SIDE, TOKENS = 16, 8
STEPS = 4
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Round:
    """Seconds of one round, and bytes.

    Attributes:
        forward: One forward pass.
        sleep, wake: As the server reports them.
        residue: What the process uses while it sleeps, less what it used before it loaded the weights.
        weights: The weights.
        copy: Copying as many bytes into memory that is there.
    """

    forward: float
    sleep: float
    wake: float
    residue: int
    weights: int
    copy: float = float("nan")


def serving(root: Path, threads: int, pipe: Connection) -> None:
    """The process of the server: a round for each message, until None arrives."""
    engine_threads.compute_with(1)
    malloc.keep_freed_memory()
    asyncio.run(_serving(root, threads, pipe))


async def _serving(root: Path, threads: int, pipe: Connection) -> None:
    engine_threads.compute_alone_in_executor()
    settings = NodeSettings(role="Denoiser", uri=MODEL.name, model_root=root, engine=Engine(threads=threads))
    before = measure(CPU).used
    async with serve(settings) as node, grpc.aio.insecure_channel(node.address) as channel:
        epoch = 0
        while await asyncio.to_thread(pipe.recv):
            epoch += 2
            pipe.send(await _round(channel, epoch, before=before))


async def _round(channel: grpc.aio.Channel, epoch: int, *, before: int) -> Round:
    forward = await _forward(channel)
    control = control_pb2_grpc.ControlStub(channel)
    slept = await control.Sleep(control_pb2.SleepRequest(epoch=epoch - 1), timeout=SECONDS)
    woken = await control.Wake(control_pb2.WakeRequest(epoch=epoch), timeout=SECONDS)
    (device,) = slept.devices
    return Round(
        forward=forward,
        sleep=slept.duration.ToNanoseconds() / 1e9,
        wake=woken.duration.ToNanoseconds() / 1e9,
        residue=device.used_bytes - before,
        weights=device.weights_bytes,
    )


async def _forward(channel: grpc.aio.Channel) -> float:
    """Seconds of a forward pass of one row: the mean of a request without guidance, after one that is not measured."""
    opening = stage_pb2.DenoiseOpen(
        conditioning={"prompt_embeds": codec.inline(torch.zeros(1, TOKENS, models.GIB_CONTEXT))},
        width=LATENT_SIDE,
        height=LATENT_SIDE,
        scale_factor=1,
        steps=STEPS,
        guidance_scale=1.0,
    )
    took = 0.0
    for _ in range(2):
        requests = [stage_pb2.DenoiseRequest(open=opening)]
        async for event in stage_pb2_grpc.StageStub(channel).Denoise(requests, timeout=SECONDS):
            if event.WhichOneof("event") == "result":
                took = event.result.forward_ns / 1e9 / STEPS
    return took


def copying(size: int) -> float:
    """Seconds of a copy of so many bytes."""
    source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    started = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - started


def bench(*, rounds: int, threads: int) -> list[Round]:
    """Starts the server and measures. The first round is not measured."""
    torch.set_num_threads(1)
    taken = []
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        models.write(MODEL, Path(folder))
        server = context.Process(target=serving, args=(Path(folder), threads, its), daemon=True)
        server.start()
        its.close()
        try:
            for measured in track(range(-1, rounds), "sleeping", console=Console(stderr=True)):
                ours.send(True)
                one = ours.recv()
                if measured >= 0:
                    taken.append(Round(**vars(one) | {"copy": copying(one.weights)}))
            ours.send(None)
        finally:
            server.join(SECONDS)
    return taken


def figures_of(rounds: Sequence[Round]) -> dict[str, float]:
    """The medians over rounds of ratios within a round."""
    figures = {
        "wake_copies": statistics.median((one.wake - one.forward) / one.copy for one in rounds),
        "asleep_residue": statistics.median(one.residue / one.weights for one in rounds),
    }
    return {name: round(value, 3) for name, value in figures.items()}


def report(rounds: Sequence[Round], *, console: Console) -> None:
    """Prints the times and sizes."""
    table = Table("medians", "", box=None, title=f"{rounds[0].weights / 2**30:.2f} GiB of weights")
    for name in ("copy", "forward", "sleep", "wake"):
        table.add_row(f"{name}, s", f"{statistics.median(getattr(one, name) for one in rounds):.3f}")
    table.add_row("residue, MiB", f"{statistics.median(one.residue for one in rounds) / 2**20:.0f}")
    console.print(table)


def main() -> int:
    """Measures; returns 1 where a figure is outside its range."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=usable_cores())
    options = parser.parse_args()
    console = Console(width=110)
    console.print(f"{options.threads} threads, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    rounds = bench(rounds=options.rounds, threads=options.threads)
    report(rounds, console=console)
    return ranges.conclude(figures_of(rounds), ranges.load("sleeping"), title="Sleep and wake", console=console)


if __name__ == "__main__":
    sys.exit(main())
