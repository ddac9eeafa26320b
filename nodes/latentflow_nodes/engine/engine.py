"""The denoiser's step loop: submit, step, cancel.

Requests join and leave at every step boundary. A step admits what waits, asks `batching.choose` who shares the next
forward pass, merges their adapters, runs the network, advances each sample and tells its listener. One sample's failure
never hurts the others of its batch. The engine knows no gRPC: samples come from the denoiser's role, and listeners
carry the news away.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

import structlog
import torch
from latentflow.errors import FailedPreconditionError, InternalError, LatentflowError, UnavailableError
from latentflow.internal.metrics import Instruments

from latentflow_nodes.adapters.merger import Merger
from latentflow_nodes.engine.batching import Candidate, choose
from latentflow_nodes.engine.compute_lock import Turn
from latentflow_nodes.engine.forward import ForwardTimer
from latentflow_nodes.engine.sample import Residuals, Sample
from latentflow_nodes.engine.worker import queue_full
from latentflow_nodes.families import stack

_log = structlog.get_logger()
# A ControlNet that says nothing for so long is taken for dead; the request is tried again elsewhere.
_RESIDUAL_SECONDS = 60.0


class SampleError(Exception):
    """A failure that belongs to one sample of a batch."""

    def __init__(self, sample: Sample, error: LatentflowError) -> None:
        super().__init__(error.message)
        self.sample = sample
        self.error = error


class Engine:
    """Denoises samples, several at a time, in a thread of its own.

    Args:
        network: The UNet.
        merger: Merges adapters into it.
        max_running: Samples under way at a time, and most in one forward pass.
        max_waiting: Samples that may wait for that.
        threads: Torch's threads.
        turn: Whose turn it is on this machine.
    """

    def __init__(
        self,
        *,
        network: torch.nn.Module,
        merger: Merger,
        max_running: int,
        max_waiting: int,
        threads: int,
        turn: Turn,
        metrics: Instruments,
    ) -> None:
        self._network = network
        self._timer = ForwardTimer(network)
        self._merger = merger
        self._merged: Hashable = ()
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._turn = turn
        self._metrics = metrics
        self._changed = threading.Condition()
        self._waiting: dict[int, Sample] = {}
        self._running: dict[int, Sample] = {}
        self._waited: dict[int, int] = {}
        self._cancelled: set[int] = set()
        self._stopping = False
        self._mean = 0.0
        self._thread = threading.Thread(target=self._loop, args=(threads,), name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the loop at the next step boundary; what still runs fails with UNAVAILABLE."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def submit(self, sample: Sample) -> None:
        """Queues a sample. OverloadedError when too many wait."""
        with self._changed:
            free = self._max_running - len(self._running)
            if len(self._waiting) >= self._max_waiting + max(0, free):
                raise queue_full(
                    waiting=len(self._waiting), limit=self._max_waiting, seconds_each=self._mean * sample.total
                )
            self._waiting[sample.key] = sample
            self._report()
            self._changed.notify()

    def cancel(self, key: int) -> None:
        """Drops a sample at the next step boundary; its listener hears nothing more. Unknown keys are no error."""
        with self._changed:
            if self._waiting.pop(key, None) is None and key in self._running:
                self._cancelled.add(key)
            self._report()
            self._changed.notify()

    def step(self) -> bool:
        """One step boundary and one forward pass. False when there was nothing to do."""
        with self._changed:
            batch = self._next_batch()
        if not batch:
            return False
        started = time.perf_counter()
        try:
            self._advance(batch)
        except SampleError as failure:
            self._fail(failure.sample, failure.error)
        except Exception as error:
            if len(batch) == 1:
                self._fail(batch[0], _as_error(error))
            else:
                # Whose fault it was shows when each runs alone.
                for sample in batch:
                    try:
                        self._advance([sample])
                    except SampleError as failure:
                        self._fail(sample, failure.error)
                    except Exception as own:
                        self._fail(sample, _as_error(own))
        seconds = time.perf_counter() - started
        self._mean = seconds if self._mean == 0 else 0.9 * self._mean + 0.1 * seconds
        self._metrics.of("latentflow_step_seconds").observe(seconds)
        self._metrics.of("latentflow_batch_size").observe(len(batch))
        return True

    def _next_batch(self) -> list[Sample]:
        for key in self._cancelled:
            self._running.pop(key, None)
            self._waited.pop(key, None)
        self._cancelled.clear()
        while self._waiting and len(self._running) < self._max_running:
            key = next(iter(self._waiting))
            self._running[key] = self._waiting.pop(key)
            self._waited[key] = 0
        self._report()
        candidates = [
            Candidate(key=key, group=sample.group, adapters=sample.adapter_key, waited=self._waited[key])
            for key, sample in self._running.items()
        ]
        chosen = set(choose(candidates, merged=self._merged, limit=self._max_running))
        for key in self._running:
            self._waited[key] = 0 if key in chosen else self._waited[key] + 1
        return [self._running[key] for key in self._running if key in chosen]

    @torch.inference_mode()
    def _advance(self, batch: list[Sample]) -> None:
        self._merge(batch[0])
        inputs = [sample.model_input() for sample in batch]
        extra: dict[str, Any] = stack([sample.inputs for sample in batch])
        residuals = _LazyResiduals(batch, inputs, self._turn)
        if residuals.wanted:
            extra = extra | {
                "down_block_additional_residuals": residuals,
                "mid_block_additional_residual": _Middle(residuals),
            }
        if len(batch) == 1:
            model_input, timestep = inputs[0], batch[0].timestep
        else:
            model_input = torch.cat(inputs)
            timestep = torch.cat([s.timestep.reshape(1).expand(len(i)) for s, i in zip(batch, inputs, strict=True)])
        now = time.monotonic_ns()
        for sample in batch:
            sample.first_step_ns = sample.first_step_ns or now
        with self._turn:
            noise = self._network(model_input, timestep, **extra, return_dict=False)[0]
        forward_ns = self._timer.take()
        for sample, part in zip(batch, noise.split([len(one) for one in inputs]), strict=True):
            sample.forward_ns += forward_ns - residuals.waited_ns
            sample.residuals_wait_ns += residuals.waited_ns
            try:
                sample.advance(part)
            except Exception as error:
                self._fail(sample, _as_error(error))
                continue
            done = sample.index == sample.total
            if done:
                with self._changed:
                    self._running.pop(sample.key, None)
                    self._waited.pop(sample.key, None)
                    self._report()
            (sample.listener.finished if done else sample.listener.stepped)(sample)

    def _merge(self, sample: Sample) -> None:
        if sample.adapter_key == self._merged:
            return
        started = time.perf_counter()
        # Unknown until it has worked: a merge that fails halfway is redone from the pristine weights.
        self._merged = None
        self._merger.apply(sample.adapters)
        self._merged = sample.adapter_key
        self._metrics.of("latentflow_loads_total", kind="merge").inc()
        self._metrics.of("latentflow_load_seconds_total", kind="merge").inc(time.perf_counter() - started)

    def _fail(self, sample: Sample, error: LatentflowError) -> None:
        with self._changed:
            self._running.pop(sample.key, None)
            self._waited.pop(sample.key, None)
            self._report()
        sample.listener.failed(sample, error)

    def _fail_all(self, error: LatentflowError) -> None:
        with self._changed:
            left = [*self._running.values(), *self._waiting.values()]
            self._waiting.clear()
        for sample in left:
            self._fail(sample, error)

    def _report(self) -> None:
        self._metrics.of("latentflow_queue_depth").set(len(self._waiting))
        self._metrics.of("latentflow_in_flight").set(len(self._running))

    def _loop(self, threads: int) -> None:
        torch.set_num_threads(threads)
        while True:
            with self._changed:
                while not (self._stopping or self._waiting or self._running):
                    self._changed.wait()
                if self._stopping:
                    break
            try:
                self.step()
            except Exception as error:
                # A defect of ours: no request waits for ever, and the next ones are served.
                _log.exception("the step loop failed")
                self._fail_all(_as_error(error))
        self._fail_all(UnavailableError("This server stops; try another replica.", reason="DRAINING"))


class _LazyResiduals:
    """The residuals of a batch's ControlNets, asked for at once and waited for only where the UNet adds them.

    The UNet iterates over it after its down blocks and adds `_Middle` after the middle block.
    """

    def __init__(self, batch: list[Sample], inputs: list[torch.Tensor], turn: Turn) -> None:
        self._turn = turn
        self.waited_ns = 0
        self._device, self._dtype = inputs[0].device, inputs[0].dtype
        self._ready: Residuals | None = None
        self._asked: list[tuple[Sample, int, list[Future[Residuals]]]] = [
            (
                sample,
                len(model_input),
                [
                    control.source.request(
                        step=sample.index, timestep=float(sample.timestep), sample=model_input, scale=control.scale
                    )
                    for control in sample.active_controls()
                ],
            )
            for sample, model_input in zip(batch, inputs, strict=True)
        ]

    @property
    def wanted(self) -> bool:
        # The group is one: all samples of a batch have active ControlNets, or none has.
        return bool(self._asked[0][2])

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.wait().down)

    def wait(self) -> Residuals:
        """Summed over each sample's ControlNets in its order, stacked over the samples."""
        if self._ready is None:
            started = time.perf_counter_ns()
            with self._turn.passed_on():
                summed = [self._sum(*one) for one in self._asked]
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
                    f"A ControlNet gave no residuals for step {sample.index + 1} within {_RESIDUAL_SECONDS:g} s.",
                    reason="PEER_UNAVAILABLE",
                )
                raise SampleError(sample, late) from None
            one = Residuals(down=tuple(self._own(t) for t in one.down), mid=self._own(one.mid))
            if total is None:
                total = one
            else:
                down = tuple(a + b for a, b in zip(total.down, one.down, strict=True))
                total = Residuals(down=down, mid=total.mid + one.mid)
        if total is None or any(len(t) != rows for t in total.down):
            raise SampleError(
                sample, InternalError(f"A ControlNet answered with other than {rows} rows; its server is broken.")
            )
        return total

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=self._device, dtype=self._dtype)


class _Middle:
    """Stands for the middle block's residual until the UNet adds it."""

    def __init__(self, residuals: _LazyResiduals) -> None:
        self._residuals = residuals

    def __radd__(self, sample: torch.Tensor) -> torch.Tensor:
        return sample + self._residuals.wait().mid


def _as_error(error: Exception) -> LatentflowError:
    if isinstance(error, LatentflowError):
        return error
    _log.exception("forward pass failed", exc_info=error)
    if isinstance(error, RuntimeError) and "size of tensor" in str(error):
        return FailedPreconditionError(
            f"A ControlNet's residuals do not fit this denoiser ({error}); it belongs to another base model.",
            reason="CONTROLNET_MISMATCH",
        )
    return InternalError(f"The forward pass failed: {type(error).__name__}: {error}. See the server's log.")
