"""What adapters by row are worth: the rate of eight concurrent requests with four LoRA sets, two requests for each.

The same engine runs them by row, so that all share each pass, and with one set merged for each pass, which the sets take in
turn. The same requests without LoRAs are the third side. All run in turns, on networks of their own, in one step loop in this
process. The LoRAs are those of the shapes pack, at their own ranks. The requests have one row each, and are measured again with
both guidance halves: the more rows a set has, the less it gains from sharing its passes with others. Needs an idle machine. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ranges
import torch
from arrivals import CONCURRENT, GUIDANCE, Arrivals, Steps
from diffusers import UNet2DConditionModel
from latentflow_nodes.adapters import folder, lora
from latentflow_nodes.adapters.layers import Layers
from latentflow_nodes.engine.engine import Engine
from latentflow_nodes.settings import usable_cores
from rich.console import Console
from rich.progress import track
from rich.table import Table

import models
from models import MODELS, BenchModel

# Each is a set: one LoRA with its weight.
SETS = (("outline", 0.8), ("pastel", 0.8), ("neon", 0.8), ("neon", 0.4))
WARM_UP_ROUNDS = 2
UNGUIDED = 1.0


class OneSetEngine(Engine):
    """The same engine with one merged set in each pass."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._limits = replace(self._limits, by_row=0)


@dataclass(frozen=True, kw_only=True)
class Side:
    """An engine and its requests.

    Args:
        layers: Of the LoRAs by name; none: its requests have no LoRA.
    """

    steps: Steps
    engine: Engine
    layers: Mapping[str, Layers]

    def rate(self, *, steps: int, guidance_scale: float) -> float:
        """Images per second of requests that start at the same time."""
        listener = Arrivals()
        for key in range(CONCURRENT):
            sample = self.steps.sample(key, listener, steps=steps, guidance_scale=guidance_scale)
            if self.layers:
                name, weight = SETS[key % len(SETS)]
                sample.adapters, sample.adapter_key = ((self.layers[name], weight),), (name, weight)
            self.engine.submit(sample)
        started = time.perf_counter()
        while self.engine.step():
            pass
        seconds = time.perf_counter() - started
        listener.wait(CONCURRENT)
        return CONCURRENT / seconds


def sides(model: BenchModel, *, threads: int) -> dict[str, Side]:
    """The sides by name. Each has its own copy of the network, because engines change its adapters."""
    entries = folder.find(models.SHAPES / "loras", ("unet", "text_encoder"))
    layers = {name: lora.load(entries[name]).components["unet"] for name, _ in SETS}
    found = {}
    for name, cls, its in (("by row", Engine, layers), ("one set", OneSetEngine, layers), ("plain", Engine, {})):
        steps = Steps(
            model, UNet2DConditionModel.from_pretrained(models.SHAPES / "unet"), threads=threads, steps=model.steps
        )
        found[name] = Side(steps=steps, engine=steps.engine(cls), layers=its)
    return found


def bench(*, rounds: int, threads: int, console: Console) -> dict[str, float]:
    """The figures, without guidance and with it; prints a table with the rates."""
    torch.set_num_threads(threads)
    model = MODELS["shapes"]
    all_sides = sides(model, threads=threads)
    figures: dict[str, float] = {}
    for suffix, guidance_scale in (("", UNGUIDED), ("_guided", GUIDANCE)):
        rates: dict[str, list[float]] = {name: [] for name in all_sides}
        for measured in track(range(-WARM_UP_ROUNDS, rounds), f"loras{suffix}", console=Console(stderr=True)):
            for name, side in all_sides.items():
                rate = side.rate(steps=model.steps, guidance_scale=guidance_scale)
                if measured >= 0:
                    rates[name].append(rate)
        table = Table("", "images per second", box=None, title=f"{CONCURRENT} requests, guidance {guidance_scale:g}")
        for name, values in rates.items():
            table.add_row(name, f"{statistics.median(values):.2f}")
        console.print(table)
        figures[f"throughput_8_loras{suffix}"] = ratio(rates["by row"], rates["one set"])
        figures[f"loras_of_plain{suffix}"] = ratio(rates["by row"], rates["plain"])
    return {name: round(value, 3) for name, value in figures.items()}


def ratio(of: Sequence[float], to: Sequence[float]) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def main() -> int:
    """Measures; returns 1 where a figure is outside its range."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=usable_cores())
    options = parser.parse_args()
    console = Console(width=110)
    console.print(f"{options.threads} threads, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    figures = bench(rounds=options.rounds, threads=options.threads, console=console)
    return ranges.conclude(figures, ranges.load("loras"), title="LoRAs by row", console=console)


if __name__ == "__main__":
    sys.exit(main())
