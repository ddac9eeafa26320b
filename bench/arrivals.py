"""What joining and leaving at step boundaries is worth to requests that arrive at random, and what a step costs besides its pass.

Requests arrive as a Poisson process, at 80 % of the rate that the engine sustains with static batches: batches that start
with all queued requests, and that no request joins before the last one of them ends. The same engine serves the same arrivals
with static batches and with its own, in turns. The ideal of both is computed from the passes alone, as they were measured in
that round. The mid-size model, of which a pass of several requests takes as long as several passes, serves arrivals at 80 % of
its rate too: with as many requests in a pass as its profile allows, and with all of them. One step loop in this process, without
servers. Needs an idle machine. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import ranges
import torch
from diffusers import UNet2DConditionModel
from latentflow.errors import LatentflowError
from latentflow.internal import weight_files
from latentflow.internal.guidance import Guidance
from latentflow.internal.metrics import NODE, Instruments
from latentflow_nodes import families
from latentflow_nodes.adapters.merger import Merger
from latentflow_nodes.engine.compute_lock import ComputeLock
from latentflow_nodes.engine.engine import Engine
from latentflow_nodes.engine.load import Load
from latentflow_nodes.engine.profile import Profile
from latentflow_nodes.engine.runner import EagerRunner
from latentflow_nodes.engine.sample import Sample, Settings, initial_noise
from latentflow_nodes.engine.samplers import Sampler
from latentflow_nodes.engine.threads import compute_with
from latentflow_nodes.settings import usable_cores
from rich.console import Console
from rich.progress import track
from rich.table import Table

import models
from models import MODELS, BenchModel

CONCURRENT = 8
LOAD = 0.8
OVERHEAD_STEPS = 5
MID_STEPS = 5
MEASURED_PASSES = 4
GUIDANCE = 5.0
TOKENS = 77
CPU = torch.device("cpu")
DEADLINE_SECONDS = 300.0


class StaticEngine(Engine):
    """The same engine with static batches."""

    def _can_admit(self) -> bool:
        return super()._can_admit() and not any(sample.first_step_ns for sample in self._running.values())


class SharingEngine(Engine):
    """The same engine without a profile: all running requests of one size share each pass."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._profile = NoProfile()


class NoProfile(Profile):
    """Knows no durations."""

    def seconds(self, height: int, width: int) -> Mapping[int, float]:
        return {}


@dataclass(kw_only=True)
class Arrivals:
    """Requests in flight, and how long those took that ended."""

    seconds: list[float] = field(default_factory=list)
    started: dict[int, float] = field(default_factory=dict)
    error: LatentflowError | None = None
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def stepped(self, sample: Sample) -> None:
        """Progress is not used."""

    def finished(self, sample: Sample) -> None:
        with self._changed:
            self.seconds.append(time.perf_counter() - self.started[sample.key])
            self._changed.notify()

    def failed(self, sample: Sample, error: LatentflowError) -> None:
        with self._changed:
            self.error = error
            self._changed.notify()

    def wait(self, count: int) -> None:
        """Returns when so many requests have ended."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.error or len(self.seconds) == count, DEADLINE_SECONDS):
                raise TimeoutError("The engine did not end its requests.")
        if self.error:
            raise self.error


class Steps:
    """A denoiser's network, for which engines and samples are made."""

    def __init__(self, model: BenchModel, network: UNet2DConditionModel, *, threads: int, steps: int) -> None:
        self._model = model
        self._requested = steps
        self._network = network.eval()
        self._threads = threads
        self._family = families.of_pipeline(models.SHAPES)
        self._names = self._family.layer_names("unet", network)
        self._scheduler = weight_files.config(models.SHAPES / "scheduler", "scheduler_config.json")
        self._embeds = torch.randn(2, TOKENS, network.config.cross_attention_dim)

    def engine(self, cls: type[Engine]) -> Engine:
        metrics = Instruments(NODE, model=self._model.name, role="Denoiser")
        return cls(
            runner=EagerRunner(network=self._network, family=self._family, device=CPU, lock=ComputeLock(None)),
            merger=Merger(self._network, names=self._names, what="denoiser"),
            max_running=CONCURRENT,
            max_waiting=10_000,
            threads=self._threads,
            load=Load(metrics),
            metrics=metrics,
        )

    def sample(self, key: int, listener: Arrivals, *, steps: int, guidance_scale: float = GUIDANCE) -> Sample:
        side = self._model.side // 8
        guidance = Guidance(scale=guidance_scale, is_embedded=False)
        settings = Settings(seed=key, steps=steps, shape=(1, 4, side, side), guidance=guidance, sampler="")
        generator = torch.Generator().manual_seed(key)
        listener.started[key] = time.perf_counter()
        return Sample(
            key=key,
            request_id=str(key),
            settings=settings,
            inputs={"encoder_hidden_states": self._embeds[-guidance.rows :]},
            sampler=Sampler(name="", config=self._scheduler, steps=steps, device=CPU),
            generator=generator,
            latents=initial_noise(settings.shape, generator=generator, dtype=torch.float32, device=CPU),
            listener=listener,
        )

    def latencies(self, cls: type[Engine], gaps: Sequence[float]) -> list[float]:
        """Seconds of requests that arrive with these seconds between them."""
        arrivals = Arrivals()
        engine = self.engine(cls)
        engine.start()
        try:
            due = time.perf_counter()
            for key, gap in enumerate(gaps):
                due += gap
                time.sleep(max(0.0, due - time.perf_counter()))
                engine.submit(self.sample(key, arrivals, steps=self._requested))
            arrivals.wait(len(gaps))
        finally:
            engine.stop()
        return arrivals.seconds

    def pass_seconds(self, most: int = CONCURRENT) -> list[float]:
        """Seconds of a pass of 1, 2, ... up to `most` requests."""
        side = self._model.side // 8
        # In a thread that ends: beside a second team of OpenMP threads, the passes of the engine's thread take twice as long.
        with ThreadPoolExecutor(1, initializer=compute_with, initargs=(self._threads,)) as pool:
            return [pool.submit(self._seconds, 2 * count, side).result() for count in range(1, most + 1)]

    @torch.inference_mode()
    def _seconds(self, rows: int, side: int) -> float:
        inputs = torch.randn(rows, 4, side, side), torch.ones(rows), self._embeds[:1].expand(rows, -1, -1)
        times = []
        for _ in range(1 + MEASURED_PASSES):
            started = time.perf_counter()
            self._network(*inputs, return_dict=False)
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])

    def batch_seconds(self) -> float:
        """Seconds of a static batch of the most requests."""
        return max(self.latencies(StaticEngine, [0.0] * CONCURRENT))

    def overhead(self) -> float:
        """Time outside the forward pass in steps of the most requests, divided by that of the passes."""
        engine = self.engine(Engine)
        samples = [self.sample(key, Arrivals(), steps=OVERHEAD_STEPS + 1) for key in range(CONCURRENT)]
        for sample in samples:
            engine.submit(sample)
        # Measured from the second step on: the first one allocates the activations.
        engine.step()
        before = samples[0].forward_time.nanoseconds()
        started = time.perf_counter()
        while engine.step():
            pass
        wall = time.perf_counter() - started
        forward = (samples[0].forward_time.nanoseconds() - before) / 1e9
        return (wall - forward) / forward


def ideal(gaps: Sequence[float], *, passes: Sequence[float], steps: int, static: bool) -> list[float]:
    """Seconds of requests in an engine in which only passes take time.

    Args:
        gaps: Seconds between the arrivals.
        passes: Seconds of a pass of 1, 2, ... requests.
        static: Whether requests join only when none runs.
    """
    due = list(itertools.accumulate(gaps))
    now, arrived = 0.0, 0
    queued: list[float] = []
    # Arrival and steps left of each running request.
    running: list[tuple[float, int]] = []
    taken: list[float] = []
    while len(taken) < len(due):
        if not running and not queued:
            now = max(now, due[arrived])
        while arrived < len(due) and due[arrived] <= now:
            queued.append(due[arrived])
            arrived += 1
        if not (static and running):
            joining = queued[: len(passes) - len(running)]
            del queued[: len(joining)]
            running += [(arrival, steps) for arrival in joining]
        now += passes[len(running) - 1]
        taken += [now - arrival for arrival, left in running if left == 1]
        running = [(arrival, left - 1) for arrival, left in running if left > 1]
    return taken


def p95(seconds: Sequence[float]) -> float:
    return statistics.quantiles(seconds, n=20)[-1]


def bench(*, rounds: int, requests: int, threads: int, console: Console) -> dict[str, float]:
    """Measures both engines in turns, with the same arrivals in a round."""
    torch.set_num_threads(threads)
    steps = MODELS["shapes"].steps
    network = UNet2DConditionModel.from_pretrained(models.SHAPES / "unet")
    shapes = Steps(MODELS["shapes"], network, threads=threads, steps=steps)
    mid = Steps(MODELS["mid"], models.mid_unet(), threads=threads, steps=MID_STEPS)
    shapes.batch_seconds()
    capacity = CONCURRENT / statistics.median(shapes.batch_seconds() for _ in range(3))
    console.print(f"static batches of {CONCURRENT}: {capacity:.2f} images per second; arrivals: {LOAD * capacity:.2f}")
    ours: list[float] = []
    static: list[float] = []
    ideal_ours: list[float] = []
    ideal_static: list[float] = []
    for index in track(range(rounds), "arrivals", console=Console(stderr=True)):
        drawn = random.Random(index)
        gaps = [drawn.expovariate(LOAD * capacity) for _ in range(requests)]
        static += shapes.latencies(StaticEngine, gaps)
        ours += shapes.latencies(Engine, gaps)
        passes = shapes.pass_seconds()
        ideal_static += ideal(gaps, passes=passes, steps=steps, static=True)
        ideal_ours += ideal(gaps, passes=passes, steps=steps, static=False)
    mid_ours: list[float] = []
    mid_sharing: list[float] = []
    alone = MID_STEPS * mid.pass_seconds(1)[0]
    for index in track(range(rounds), "arrivals, mid-size", console=Console(stderr=True)):
        drawn = random.Random(index)
        gaps = [drawn.expovariate(LOAD / alone) for _ in range(requests // 4)]
        mid_sharing += mid.latencies(SharingEngine, gaps)
        mid_ours += mid.latencies(Engine, gaps)
    table = Table("", "mean (s)", "P95 (s)", box=None)
    for name, seconds in (
        ("static batches", static),
        ("static batches, passes alone", ideal_static),
        ("step boundaries", ours),
        ("step boundaries, passes alone", ideal_ours),
        ("mid-size, all requests in each pass", mid_sharing),
        ("mid-size, as many as the profile allows", mid_ours),
    ):
        table.add_row(name, f"{statistics.mean(seconds):.3f}", f"{p95(seconds):.3f}")
    console.print(table)
    figures = {
        "p95_vs_static": p95(ours) / p95(static),
        "mean_vs_static": statistics.mean(ours) / statistics.mean(static),
        "mean_vs_static_ideal": statistics.mean(ideal_ours) / statistics.mean(ideal_static),
        "mean_of_ideal": statistics.mean(ideal_ours) / statistics.mean(ours),
        "mean_vs_sharing_mid": statistics.mean(mid_ours) / statistics.mean(mid_sharing),
        "p95_vs_sharing_mid": p95(mid_ours) / p95(mid_sharing),
        "step_overhead": statistics.median(mid.overhead() for _ in range(rounds)),
    }
    return {name: round(value, 4) for name, value in figures.items()}


def main() -> int:
    """Measures; returns 1 where a figure is outside its range."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--requests", type=int, default=80, help="requests of each engine in a round")
    parser.add_argument("--threads", type=int, default=usable_cores())
    options = parser.parse_args()
    console = Console(width=110)
    console.print(f"{options.threads} threads, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    figures = bench(rounds=options.rounds, requests=options.requests, threads=options.threads, console=console)
    return ranges.conclude(figures, ranges.load("arrivals"), title="Requests at random times", console=console)


if __name__ == "__main__":
    sys.exit(main())
