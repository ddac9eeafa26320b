"""One forward pass of a step batch: from samples at a step boundary to the network's predictions.

The engine decides who shares a pass, a runner runs it. Network keywords, residuals and timing belong to the runner. A
pass without residuals only launches kernels: it neither waits for the device nor touches Python objects of other
threads.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Protocol

import torch
from latentflow.errors import InternalError, LatentflowError, UnavailableError
from latentflow.reasons import Reason

from latentflow_nodes.engine.compute_lock import ComputeLock
from latentflow_nodes.engine.forward_time import ForwardTime, Stopwatch
from latentflow_nodes.engine.sample import Sample
from latentflow_nodes.families.base import Family, Residuals, stack

# A ControlNet that sends nothing for so long is considered dead; the gateway retries the request elsewhere.
_RESIDUAL_SECONDS = 60.0


class SampleError(Exception):
    """A failure that belongs to one sample of a batch."""

    def __init__(self, sample: Sample, error: LatentflowError) -> None:
        super().__init__(error.message)
        self.sample = sample
        self.error = error


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The result of a forward pass.

    Attributes:
        noise: For each sample of the batch the network's prediction, [rows, channels, height, width].
        time: The pass itself, without waiting for residuals.
        residuals_wait_ns: Nanoseconds that the pass waited for residuals.
    """

    noise: tuple[torch.Tensor, ...]
    time: ForwardTime
    residuals_wait_ns: int


class Runner(Protocol):
    """Runs forward passes in the engine's thread."""

    def run(self, batch: Sequence[Sample]) -> Prediction:
        """One pass for samples of one group. SampleError where one sample's residuals fail."""
        ...

    def idle(self) -> None:
        """The thread is about to wait for samples."""
        ...


class EagerRunner:
    """Calls the network as it is.

    Args:
        network: The denoiser.
        family: How it is called.
        device: Where it runs.
        lock: Held while it computes.
    """

    def __init__(self, *, network: torch.nn.Module, family: Family, device: torch.device, lock: ComputeLock) -> None:
        self._network = network
        self._family = family
        self._stopwatch = Stopwatch(device)
        self._lock = lock

    def run(self, batch: Sequence[Sample]) -> Prediction:
        latents = [sample.model_input() for sample in batch]
        rows = [len(one) for one in latents]
        inputs = stack([sample.inputs for sample in batch])
        if len(batch) == 1:
            stacked, timestep = latents[0], batch[0].timestep
        else:
            stacked = torch.cat(latents)
            timestep = torch.cat([s.timestep.reshape(1).expand(n) for s, n in zip(batch, rows, strict=True)])
        # The group is one: all samples of a batch have active ControlNets, or none has.
        residuals = BatchResiduals(batch, latents, self._stopwatch, self._lock) if batch[0].active_controls() else None
        with self._lock:
            self._stopwatch.start()
            try:
                noise = self._family.predict(self._network, stacked, timestep, inputs=inputs, residuals=residuals)
            finally:
                self._stopwatch.stop()
                taken = self._stopwatch.take()
        return Prediction(
            noise=noise.split(rows), time=taken, residuals_wait_ns=residuals.waited_ns if residuals else 0
        )

    def idle(self) -> None:
        self._lock.idle()


class BatchResiduals:
    """The residuals of a batch's ControlNets: requested at once, waited for only where the network adds them."""

    def __init__(
        self, batch: Sequence[Sample], latents: Sequence[torch.Tensor], stopwatch: Stopwatch, lock: ComputeLock
    ) -> None:
        self._stopwatch = stopwatch
        self._lock = lock
        self.waited_ns = 0
        self._device, self._dtype = latents[0].device, latents[0].dtype
        self._ready: Residuals | None = None
        self._requested: list[tuple[Sample, int, list[Future[Residuals]]]] = [
            (
                sample,
                len(one),
                [
                    control.source.request(
                        step=sample.index, timestep=float(sample.timestep), sample=one, scale=control.scale
                    )
                    for control in sample.active_controls()
                ],
            )
            for sample, one in zip(batch, latents, strict=True)
        ]

    def wait(self) -> Residuals:
        """The residuals, summed over each sample's ControlNets in its order and stacked over the samples."""
        if self._ready is None:
            self._stopwatch.stop()
            started = time.perf_counter_ns()
            try:
                with self._lock.released():
                    summed = [self._sum(*one) for one in self._requested]
            finally:
                self._stopwatch.start()
            down = tuple(torch.cat(parts) for parts in zip(*(one.down for one in summed), strict=True))
            self._ready = Residuals(down=down, mid=torch.cat([one.mid for one in summed]))
            self.waited_ns += time.perf_counter_ns() - started
        return self._ready

    def _sum(self, sample: Sample, rows: int, futures: list[Future[Residuals]]) -> Residuals:
        total: Residuals | None = None
        for future in futures:
            try:
                one = future.result(timeout=_RESIDUAL_SECONDS)
            except LatentflowError as error:
                raise SampleError(sample, error) from None
            except FutureTimeout:
                late = UnavailableError(
                    f"A ControlNet sent no residuals for step {sample.index + 1} within {_RESIDUAL_SECONDS:g} s.",
                    reason=Reason.PEER_UNAVAILABLE,
                )
                raise SampleError(sample, late) from None
            one = Residuals(down=tuple(self._on_device(t) for t in one.down), mid=self._on_device(one.mid))
            if total is None:
                total = one
            else:
                down = tuple(a + b for a, b in zip(total.down, one.down, strict=True))
                total = Residuals(down=down, mid=total.mid + one.mid)
        if total is None or any(len(t) != rows for t in total.down):
            raise SampleError(
                sample,
                InternalError(f"A ControlNet sent residuals of other than {rows} rows; its server is defective."),
            )
        return total

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=self._device, dtype=self._dtype)
