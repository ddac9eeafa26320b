"""The training loop of every stage: seeded, resumable after a kill, with a progress bar.

A checkpoint holds the weights, the optimizer, the average, the step and both random states, and replaces the
previous one by a rename, so that an interrupted training ends with the weights of an uninterrupted one.
"""

from __future__ import annotations

import math
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from .settings import Stage


class Stopped(SystemExit):
    """SIGTERM was received and the checkpoint is written."""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def half_precision() -> Iterator[None]:
    """bfloat16, and attention by matrix products: at these sizes flash attention's backward pass is half of a step's time."""
    with torch.autocast(device().type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


def cost_of(work: Path, name: str) -> dict[str, float]:
    """Seconds and threads of a stage over all its runs, from its checkpoint."""
    state = torch.load(work / f"{name}.pt", map_location="cpu", weights_only=False)
    return {"seconds": round(state["seconds"]), "threads": state["threads"]}


class Loop:
    """Trains `model`. At the end the model holds the moving average of its weights if `average` (its decay) is not 0."""

    def __init__(
        self, *, name: str, model: torch.nn.Module, stage: Stage, work: Path, seed: int, average: float = 0.0
    ) -> None:
        self.name, self.stage, self.model = name, stage, model.to(device())
        self.rng = random.Random(f"{seed}-{name}")
        self.noise = torch.Generator().manual_seed(self.rng.getrandbits(48))
        self.step = 0
        self._file = work / f"{name}.pt"
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=stage.rate, betas=(0.9, 0.99), weight_decay=1e-4)
        self._decay = average
        self._average = [p.detach().clone() for p in self._parameters] if average else []
        self._stop_requested = False
        self._seconds, self._resumed_at = 0.0, time.monotonic()
        if self._file.exists():
            self._load()

    def _load(self) -> None:
        state = torch.load(self._file, map_location=device(), weights_only=False)
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._average = [value.to(device()) for value in state["average"]]
        self.step = state["step"]
        self._seconds = state["seconds"]
        self.rng.setstate(state["rng"])
        self.noise.set_state(state["noise"].cpu())

    @property
    def finished(self) -> bool:
        return self.step >= self.stage.steps

    def save(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "average": self._average,
            "step": self.step,
            "seconds": self._seconds + time.monotonic() - self._resumed_at,
            "threads": torch.get_num_threads(),
            "rng": self.rng.getstate(),
            "noise": self.noise.get_state(),
        }
        unfinished = self._file.with_suffix(".tmp")
        torch.save(state, unfinished)
        os.replace(unfinished, self._file)

    def rate(self) -> float:
        stage, step = self.stage, self.step
        if stage.restart_at and step >= stage.restart_at:
            peak, done, fall = stage.restart_rate, step - stage.restart_at, stage.steps - stage.restart_at
        else:
            peak, done, fall = stage.rate, step, stage.first_fall or stage.steps
        warm = min(1.0, (step + 1) / max(1, stage.warmup))
        return peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done / fall)))

    def _update(self, loss: torch.Tensor) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self.rate()
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self.step += 1
        if self._decay:
            decay = min(self._decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self._average, [p.detach() for p in self._parameters], 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Puts the averaged weights into the model while entered."""
        if not self._decay:
            yield
            return
        kept = [p.detach().clone() for p in self._parameters]
        self._put(self._average)
        try:
            yield
        finally:
            self._put(kept)

    def _put(self, values: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._parameters, values, strict=True):
                parameter.copy_(value)

    def _request_stop(self, _signal: int, _frame: FrameType | None) -> None:
        self._stop_requested = True

    def run(self, loss: Callable[[], torch.Tensor], *, report: Callable[[], str], stop_at: int | None = None) -> None:
        """Trains from the last checkpoint to the last step, or to step `stop_at`, as if interrupted there. Stopped after SIGTERM."""
        before = signal.signal(signal.SIGTERM, self._request_stop)
        end = self.stage.steps if stop_at is None else stop_at
        bar = tqdm(total=self.stage.steps, initial=self.step, desc=self.name, mininterval=5, smoothing=0.05)
        try:
            while self.step < end:
                value = loss()
                self._update(value)
                bar.update()
                self._after_step(bar, float(value.detach()), report)
        finally:
            bar.close()
            signal.signal(signal.SIGTERM, before)
        if end == self.stage.steps and self._decay:
            self._put(self._average)

    def _after_step(self, bar: tqdm[None], value: float, report: Callable[[], str]) -> None:
        if self.step % 20 == 0:
            bar.set_postfix_str(f"loss {value:.4f}", refresh=False)
        last = self.step == self.stage.steps
        if self.step % self.stage.save_every == 0 or last or self._stop_requested:
            self.save()
        if self._stop_requested:
            raise Stopped(f"{self.name}: stopped at step {self.step}; the same command continues from there")
        if self.step % self.stage.report_every == 0 or last:
            with self.averaged():
                self.model.eval()
                tqdm.write(f"{self.name} step {self.step}: {report()}")
                self.model.train()
