"""Merging a LoRA into weights and undoing it, beside PEFT, and beside a copy of the weights that it changes.

The network has the sizes of Stable Diffusion 1.5. One adapter changes its attention (51 MB), the other all its layers.
PEFT injects the adapter's layers, fuses and unfuses them, and removes them. Both sides run in turn, with the same threads,
and each figure is the median over rounds of a ratio within the round. The last line is JSON.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ranges
import torch
from diffusers import UNet2DConditionModel
from latentflow_nodes.adapters.layers import Layer, layers_bytes
from latentflow_nodes.adapters.merger import Merger
from latentflow_nodes.families import layer_names
from latentflow_nodes.settings import usable_cores
from rich.console import Console
from rich.progress import track
from rich.table import Table

import models

ATTENTION = ("to_q", "to_k", "to_v", "to_out")
ATTENTION_RANK = 64
ALL_RANK = 16
WEIGHT = 0.8


@dataclass(frozen=True, kw_only=True)
class Round:
    """Seconds of one round, for one adapter.

    Attributes:
        copy: Copying the changed weights into memory that is there.
        first: The first merge, which also keeps a copy of the weights.
        merge, undo: Later ones.
        other: Merging while another adapter is merged.
        peft: PEFT's four steps; NaN where they were not measured.
    """

    copy: float
    first: float
    merge: float
    undo: float
    other: float
    peft: float = float("nan")


class Bench:
    """A network and an adapter for some of its layers.

    Args:
        endings: Last segments of the names of the layers that the adapter changes; none: all layers.
    """

    def __init__(self, network: UNet2DConditionModel, *, endings: tuple[str, ...], rank: int) -> None:
        self._network = network
        found = {
            name: one.weight
            for name, one in network.named_modules()
            if isinstance(one, torch.nn.Linear | torch.nn.Conv2d)
            and (not endings or name.removesuffix(".0").rsplit(".", 1)[-1] in endings)
        }
        self._weights = list(found.values())
        self._layers = {name: _layer(weight, rank) for name, weight in found.items()}
        self._names = layer_names.of_unet(network)

    @property
    def title(self) -> str:
        changed = sum(weight.numel() * weight.element_size() for weight in self._weights)
        return f"{layers_bytes(self._layers) / 1e6:.0f} MB, {len(self._weights)} layers of {changed / 1e6:.0f} MB"

    def round(self, *, with_peft: bool) -> Round:
        """Measures every step once. RuntimeError where undoing does not restore every weight bit for bit."""
        kept = [weight.detach().clone() for weight in self._weights]
        copy = _seconds(lambda: [to.copy_(weight) for to, weight in zip(kept, self._weights, strict=True)])
        merger = Merger(self._network, names=self._names, what="denoiser")
        first = _seconds(lambda: merger.apply([(self._layers, WEIGHT)]))
        other = _seconds(lambda: merger.apply([(self._layers, -WEIGHT)]))
        undo = _seconds(lambda: merger.apply([]))
        if not all(torch.equal(before, weight) for before, weight in zip(kept, self._weights, strict=True)):
            raise RuntimeError("undoing a merge has not restored the weights")
        merge = _seconds(lambda: merger.apply([(self._layers, WEIGHT)]))
        merger.apply([])
        peft = _seconds(self._peft) if with_peft else float("nan")
        return Round(copy=copy, first=first, merge=merge, undo=undo, other=other, peft=peft)

    def _peft(self) -> None:
        state = {f"{name}.lora_A.weight": one.a for name, one in self._layers.items()}
        state |= {f"{name}.lora_B.weight": one.b for name, one in self._layers.items()}
        self._network.load_lora_adapter(state, prefix=None, adapter_name="a")
        self._network.fuse_lora(lora_scale=WEIGHT)
        self._network.unfuse_lora()
        self._network.unload_lora()


def _layer(weight: torch.Tensor, rank: int) -> Layer:
    a = torch.randn(rank, *weight.shape[1:]) * 0.01
    b = torch.randn(len(weight), rank, *[1] * (weight.dim() - 2)) * 0.01
    return Layer(a=a, b=b, alpha=rank)


@torch.no_grad()
def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def bench(*, rounds: int, console: Console) -> dict[str, float]:
    """The figures; prints a table with the median of every step."""
    torch.manual_seed(models.SEED)
    network = models.sd15_unet().eval()
    benches = {
        "attention": Bench(network, endings=ATTENTION, rank=ATTENTION_RANK),
        "all": Bench(network, endings=(), rank=ALL_RANK),
    }
    taken: dict[str, list[Round]] = {name: [] for name in benches}
    for _ in track(range(rounds), "merging", console=Console(stderr=True)):
        for name, one in benches.items():
            taken[name].append(one.round(with_peft=name == "attention"))
    steps = ("copy", "first", "merge", "undo", "other", "peft")
    table = Table("seconds", *steps, box=None)
    for name, its in taken.items():
        medians = (statistics.median(getattr(one, step) for one in its) for step in steps)
        table.add_row(f"{name}: {benches[name].title}", *(f"{seconds:.3f}" for seconds in medians))
    console.print(table)
    return {name: round(value, 3) for name, value in figures_of(taken).items()}


def figures_of(taken: Mapping[str, list[Round]]) -> dict[str, float]:
    """The medians over rounds of the ratios within a round."""

    def median(name: str, ratio: Callable[[Round], float]) -> float:
        return statistics.median(ratio(one) for one in taken[name])

    return {
        "merge_speedup": median("attention", lambda one: one.peft / (one.merge + one.undo)),
        "merge_speedup_first": median("attention", lambda one: one.peft / (one.first + one.undo)),
        "merge_of_copy": median("all", lambda one: max(one.merge, one.undo) / one.copy),
        "merge_first_of_copy": median("all", lambda one: one.first / one.copy),
        "merge_of_copy_attention": median("attention", lambda one: max(one.merge, one.undo) / one.copy),
    }


def main() -> int:
    """Measures; returns 1 where a figure is outside its range."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=usable_cores())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=110)
    console.print(f"{options.threads} threads, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    figures = bench(rounds=options.rounds, console=console)
    return ranges.conclude(figures, ranges.load("merging"), title="Merging LoRAs", console=console)


if __name__ == "__main__":
    sys.exit(main())
