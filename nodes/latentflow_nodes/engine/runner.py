"""One forward pass of a step batch: from samples at a step boundary to the network's predictions.

The engine decides who shares a pass, a runner runs it. Network keywords, residuals and timing belong to the runner. A
pass without residuals only launches kernels: it neither waits for the device nor touches Python objects of other
threads.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from latentflow.errors import InternalError, LatentflowError

from latentflow_nodes.engine.compute_lock import ComputeLock
from latentflow_nodes.engine.forward_time import ForwardTime, Stopwatch
from latentflow_nodes.engine.member import Member
from latentflow_nodes.families.base import Family, LazyResiduals, Residuals, stack


class SampleError(Exception):
    """A failure that belongs to one sample of a batch."""

    def __init__(self, sample: Member, error: LatentflowError) -> None:
        super().__init__(error.message)
        self.sample = sample
        self.error = error


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The result of a forward pass.

    Attributes:
        noise: For each sample of the batch the network's prediction, [rows, channels, height, width]; None for a sample
            whose residuals were late.
        time: The pass itself, without waiting for residuals.
        residuals_wait_ns: Nanoseconds that the pass waited for residuals.
    """

    noise: tuple[torch.Tensor | None, ...]
    time: ForwardTime
    residuals_wait_ns: int


class Runner(Protocol):
    """Runs forward passes in the engine's thread."""

    def run(self, batch: Sequence[Member], *, patience: float) -> Prediction:
        """One pass for samples of one group. SampleError where one sample's residuals fail.

        Args:
            patience: Seconds that the pass may wait for residuals.
        """
        ...

    def reserve(self) -> None:
        """Waits until the device is free for a pass. Samples that arrive meanwhile can still take part in it.

        `run` and `idle` end the reservation.
        """
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

    def run(self, batch: Sequence[Member], *, patience: float) -> Prediction:
        # Requests what peers compute, where the engine has not.
        requested = [sample.residuals() for sample in batch]
        latents = [sample.model_input() for sample in batch]
        rows = [len(one) for one in latents]
        inputs = stack([sample.network_inputs() for sample in batch])
        if len(batch) == 1:
            stacked, timestep = latents[0], batch[0].timestep
        else:
            stacked = torch.cat(latents)
            timestep = torch.cat([s.timestep.reshape(1).expand(n) for s, n in zip(batch, rows, strict=True)])
        residuals = None
        if any(requested):
            residuals = BatchResiduals(batch, latents, self._stopwatch, self._lock, patience=patience)
        noise: Sequence[torch.Tensor | None] = [None] * len(batch)
        with self._lock:
            self._stopwatch.start()
            try:
                predicted = self._predict(stacked, timestep, inputs, residuals)
                noise = predicted.split(rows)
            except _NoResiduals:
                pass
            finally:
                self._stopwatch.stop()
                taken = self._stopwatch.take()
        late = residuals.late if residuals else ()
        return Prediction(
            noise=tuple(None if sample in late else one for sample, one in zip(batch, noise, strict=True)),
            time=taken,
            residuals_wait_ns=residuals.waited_ns if residuals else 0,
        )

    def _predict(
        self, latents: torch.Tensor, timestep: torch.Tensor, inputs: dict[str, Any], residuals: LazyResiduals | None
    ) -> torch.Tensor:
        return self._family.predict(self._network, latents, timestep, inputs=inputs, residuals=residuals)

    def reserve(self) -> None:
        self._lock.take()

    def idle(self) -> None:
        self._lock.idle()


class _NoResiduals(Exception):
    """All residuals of a batch are late, so the pass cannot go on."""


class BatchResiduals:
    """The residuals of a batch's ControlNets, waited for only where the network adds them.

    Attributes:
        late: The samples whose residuals were not there in time. Zeros stand for their residuals.
        waited_ns: Nanoseconds that the pass waited.
    """

    def __init__(
        self,
        batch: Sequence[Member],
        latents: Sequence[torch.Tensor],
        stopwatch: Stopwatch,
        lock: ComputeLock,
        *,
        patience: float,
    ) -> None:
        self._batch = batch
        self._latents = latents
        self._stopwatch = stopwatch
        self._lock = lock
        self._patience = patience
        self.late: list[Member] = []
        self.waited_ns = 0
        self._ready: Residuals | None = None

    def wait(self) -> Residuals:
        """The residuals, summed over each sample's ControlNets in its order and stacked over the samples."""
        if self._ready is None:
            self._stopwatch.stop()
            started = time.perf_counter_ns()
            try:
                with self._lock.released():
                    wait([future for sample in self._batch for future in sample.residuals()], self._patience)
                    summed = list(self._sums())
            finally:
                self._stopwatch.start()
            self._ready = self._stacked(summed)
            self.waited_ns += time.perf_counter_ns() - started
        return self._ready

    def _sums(self) -> Iterator[Residuals | None]:
        """For each sample the sum over its ControlNets; None where there is nothing to add, or not yet."""
        for sample, latents in zip(self._batch, self._latents, strict=True):
            futures = sample.residuals()
            if all(future.done() for future in futures):
                yield self._sum(sample, len(latents), futures)
            else:
                self.late.append(sample)
                yield None

    def _sum(self, sample: Member, rows: int, futures: Sequence[Future[Residuals]]) -> Residuals | None:
        total: Residuals | None = None
        for control, future in zip(sample.active_controls(), futures, strict=True):
            expected = control.rows(rows)
            try:
                one = future.result()
            except LatentflowError as error:
                raise SampleError(sample, error) from None
            if any(len(tensor) != expected for tensor in (*one.down, one.mid)):
                raise SampleError(
                    sample,
                    InternalError(
                        f"A ControlNet sent residuals of other than {expected} rows; its server is defective."
                    ),
                )
            one = Residuals(down=tuple(self._of_rows(t, rows) for t in one.down), mid=self._of_rows(one.mid, rows))
            if total is None:
                total = one
            else:
                down = tuple(a + b for a, b in zip(total.down, one.down, strict=True))
                total = Residuals(down=down, mid=total.mid + one.mid)
        return total

    def _stacked(self, summed: Sequence[Residuals | None]) -> Residuals:
        some = next((one for one in summed if one is not None), None)
        if some is None:
            raise _NoResiduals
        rows = [len(one) for one in self._latents]
        down = zip(*(_tensors(one, some, n)[:-1] for one, n in zip(summed, rows, strict=True)), strict=True)
        mid = [_tensors(one, some, n)[-1] for one, n in zip(summed, rows, strict=True)]
        return Residuals(down=tuple(torch.cat(parts) for parts in down), mid=torch.cat(mid))

    def _of_rows(self, tensor: torch.Tensor, rows: int) -> torch.Tensor:
        """On the device; with zeros for the rows on which a ControlNet does not act."""
        there = tensor.to(device=self._latents[0].device, dtype=self._latents[0].dtype)
        if len(there) == rows:
            return there
        return torch.cat([there.new_zeros((rows - len(there), *there.shape[1:])), there])


def _tensors(residuals: Residuals | None, like: Residuals, rows: int) -> tuple[torch.Tensor, ...]:
    """The tensors of residuals, the middle block's last; None: zeros, which change no result."""
    if residuals is not None:
        return (*residuals.down, residuals.mid)
    return tuple(tensor.new_zeros((rows, *tensor.shape[1:])) for tensor in (*like.down, like.mid))
