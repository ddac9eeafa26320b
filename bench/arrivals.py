"""What joining and leaving at step boundaries is worth to requests that arrive at random, and what a step costs besides its pass.

Requests arrive as a Poisson process, at 80 % of the rate that the engine sustains with static batches: batches that start
with all queued requests, and that no request joins before the last one of them ends. The same engine serves the same arrivals
with static batches and with its own, in turns. One step loop in this process, without servers. Needs an idle machine. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

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
from latentflow_nodes.engine.runner import EagerRunner
from latentflow_nodes.engine.sample import Sample, Settings, initial_noise
from latentflow_nodes.engine.samplers import Sampler
from latentflow_nodes.settings import usable_cores
from rich.console import Console
from rich.progress import track

import models
from models import MODELS, BenchModel

CONCURRENT = 8
LOAD = 0.8
OVERHEAD_STEPS = 5
GUIDANCE = 5.0
TOKENS = 77
CPU = torch.device("cpu")
DEADLINE_SECONDS = 300.0


class StaticEngine(Engine):
    """The same engine with static batches."""

    def _can_admit(self) -> bool:
        return super()._can_admit() and not any(sample.first_step_ns for sample in self._running.values())


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

    def __init__(self, model: BenchModel, network: UNet2DConditionModel, *, threads: int) -> None:
        self._model = model
        self._network = network.eval()
        self._threads = threads
        self._family = families.of_pipeline(models.SHAPES)
        self._scheduler = weight_files.config(models.SHAPES / "scheduler", "scheduler_config.json")
        self._embeds = torch.randn(2, TOKENS, network.config.cross_attention_dim)

    def engine(self, cls: type[Engine]) -> Engine:
        metrics = Instruments(NODE, model=self._model.name, role="Denoiser")
        return cls(
            runner=EagerRunner(network=self._network, family=self._family, device=CPU, lock=ComputeLock(None)),
            merger=Merger(self._network, names={}, what="denoiser"),
            max_running=CONCURRENT,
            max_waiting=10_000,
            threads=self._threads,
            load=Load(metrics),
            metrics=metrics,
        )

    def sample(self, key: int, listener: Arrivals, *, steps: int) -> Sample:
        side = self._model.side // 8
        guidance = Guidance(scale=GUIDANCE, is_embedded=False)
        settings = Settings(seed=key, steps=steps, shape=(1, 4, side, side), guidance=guidance, sampler="")
        generator = torch.Generator().manual_seed(key)
        listener.started[key] = time.perf_counter()
        return Sample(
            key=key,
            request_id=str(key),
            settings=settings,
            inputs={"encoder_hidden_states": self._embeds},
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
                engine.submit(self.sample(key, arrivals, steps=self._model.steps))
            arrivals.wait(len(gaps))
        finally:
            engine.stop()
        return arrivals.seconds

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


def p95(seconds: Sequence[float]) -> float:
    return statistics.quantiles(seconds, n=20)[-1]


def bench(*, rounds: int, requests: int, threads: int, console: Console) -> dict[str, float]:
    """Measures both engines in turns, with the same arrivals in a round."""
    torch.set_num_threads(threads)
    shapes = Steps(MODELS["shapes"], UNet2DConditionModel.from_pretrained(models.SHAPES / "unet"), threads=threads)
    mid = Steps(MODELS["mid"], models.mid_unet(), threads=threads)
    shapes.batch_seconds()
    capacity = CONCURRENT / statistics.median(shapes.batch_seconds() for _ in range(3))
    console.print(f"static batches of {CONCURRENT}: {capacity:.2f} images per second; arrivals: {LOAD * capacity:.2f}")
    ours: list[float] = []
    static: list[float] = []
    for index in track(range(rounds), "arrivals", console=Console(stderr=True)):
        drawn = random.Random(index)
        gaps = [drawn.expovariate(LOAD * capacity) for _ in range(requests)]
        static += shapes.latencies(StaticEngine, gaps)
        ours += shapes.latencies(Engine, gaps)
    for name, seconds in (("static batches", static), ("step boundaries", ours)):
        console.print(f"{name}: mean {statistics.mean(seconds):.3f} s, P95 {p95(seconds):.3f} s")
    figures = {
        "p95_vs_static": p95(ours) / p95(static),
        "mean_vs_static": statistics.mean(ours) / statistics.mean(static),
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
