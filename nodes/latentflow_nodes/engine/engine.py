"""The denoiser's step loop: submit, step, cancel.

Requests join and leave at every step boundary. A step admits queued samples, chooses who shares the next forward pass,
runs it, advances each sample and delivers its progress. One sample's failure never affects the others of its batch, and a
sample whose residuals are late sits out until they are there. The engine knows no gRPC: the denoiser's role makes the
samples, and their listeners report to the outside.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import replace

import structlog
import torch
from latentflow.errors import FailedPreconditionError, InternalError, LatentflowError, UnavailableError
from latentflow.internal.metrics import Instruments
from latentflow.reasons import Reason

from latentflow_nodes.adapters.merger import Merger
from latentflow_nodes.engine import malloc
from latentflow_nodes.engine.applied_adapters import AppliedAdapters
from latentflow_nodes.engine.batching import BY_ROW, Candidate, Limits, choose
from latentflow_nodes.engine.load import Load, PassSize, moving_mean
from latentflow_nodes.engine.member import Member
from latentflow_nodes.engine.memory import is_out_of_memory, out_of_memory
from latentflow_nodes.engine.profile import Profile
from latentflow_nodes.engine.runner import Runner, SampleError
from latentflow_nodes.engine.shares import Shares
from latentflow_nodes.engine.threads import compute_with
from latentflow_nodes.engine.worker import queue_full

_log = structlog.get_logger()

# How long a pass waits for residuals: a multiple of the usual pass, because the ControlNet runs about half of it and may
# have other requests before this one.
_PATIENCE_PASSES = 4.0
_LEAST_PATIENCE = 0.5
# A ControlNet that sends nothing for so long is considered dead; the gateway retries the request elsewhere.
_RESIDUAL_SECONDS = 60.0
# How long the step loop waits for all guidance peers of a pass, so that its samples share the next one too.
_HALF_PASSES = 0.5
# When a sample gives its guidance peer up and computes both halves itself: multiples of the usual pass and of a merge, which
# the peer may have to do first.
_HALF_LIMIT_PASSES = 8.0
_HALF_LIMIT_MERGES = 4.0
_LEAST_HALF_SECONDS = 2.0


class Engine:
    """Denoises samples, several at a time, in a thread of its own.

    Args:
        runner: Runs the forward passes.
        merger: Merges adapters into the network.
        max_running: Most samples that run at a time, and most in one forward pass.
        max_waiting: Most samples that are queued.
        threads: Torch's threads.
        load: Where running and queued samples and steps are recorded.
    """

    def __init__(
        self,
        *,
        runner: Runner,
        merger: Merger,
        max_running: int,
        max_waiting: int,
        threads: int,
        load: Load,
        metrics: Instruments,
    ) -> None:
        self._runner = runner
        self._adapters = AppliedAdapters(merger, metrics)
        self._max_running = max_running
        # The device's memory may allow fewer samples in a forward pass than run at a time.
        self._limits = Limits(merged=max_running, by_row=max_running if self._adapters.is_by_row_supported else 0)
        self._max_waiting = max_waiting
        self._load = load
        self._metrics = metrics
        self._changed = threading.Condition()
        self._queued: dict[int, Member] = {}
        self._running: dict[int, Member] = {}
        # When each running sample last took part in a pass, or was admitted.
        self._served_at: dict[int, float] = {}
        self._admitted_at: dict[int, float] = {}
        self._shares = Shares()
        self._profile = Profile()
        self._cancelled: set[int] = set()
        self._stopping = False
        self._mean_step = 0.0
        self._threads = threads
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts the loop, for the first time or after `stop`."""
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, args=(self._threads,), name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the loop at the next step boundary; samples that still run fail with UNAVAILABLE."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def undo_adapters(self) -> None:
        """After `stop`: undoes all adapters and frees their memory, so that the memory of the weights may be replaced."""
        self._adapters.undo()

    def submit(self, sample: Member) -> None:
        """Queues a sample. OverloadedError when the queue is full; for a guest, when all slots are taken."""
        with self._changed:
            members = [*self._queued.values(), *self._running.values()]
            own = sum(not member.is_guest for member in members)
            is_full = own >= self._max_waiting + self._max_running
            if is_full or (sample.is_guest and len(members) >= self._max_running):
                raise queue_full(
                    queued=len(self._queued), limit=self._max_waiting, seconds_each=self._mean_step * sample.total
                )
            self._queued[sample.key] = sample
            self._report()
            self._changed.notify()

    def cancel(self, key: int) -> None:
        """Drops a sample at the next step boundary; its listener gets no further call. Unknown keys are ignored."""
        with self._changed:
            if self._queued.pop(key, None) is None and key in self._running:
                self._cancelled.add(key)
            self._report()
            self._changed.notify()

    def step(self) -> bool:
        """One step boundary and one forward pass. False when no sample was there that could take part."""
        self._runner.reserve()
        with self._changed:
            self._admit()
            running = list(self._running.values())
        for sample in running:
            if sample.own_half is not None and not sample.sits_out:
                self._advance(sample, sample.own_half)
            elif self._seconds_left(sample) == 0:
                self._expire(sample)
        self._request()
        with self._changed:
            batch, by_row = self._choose()
        if not batch:
            return False
        started = time.perf_counter()
        size = _size(batch)
        try:
            self._run(batch, by_row=by_row)
        except SampleError as failure:
            self._fail(failure.sample, failure.error)
        except Exception as error:
            if is_out_of_memory(error) and (by_row or len(batch) > 1):
                fewer = {"by_row" if by_row else "merged": len(batch) // 2}
                self._limits = replace(self._limits, **fewer)
                _log.warning("forward pass out of memory", requests=len(batch), largest_batch=fewer)
            elif len(batch) == 1:
                self._fail(batch[0], _as_error(error))
            else:
                self._run_alone(batch)
        seconds = time.perf_counter() - started
        self._shares.serve((sample.key for sample in batch), seconds=seconds)
        self._load.passed(size, requests=len(batch), seconds=seconds)
        self._await_halves(batch)
        return True

    def _admit(self) -> None:
        for key in self._cancelled:
            self._retire(key)
        self._cancelled.clear()
        while self._can_admit():
            key = next(iter(self._queued))
            self._running[key] = self._queued.pop(key)
            self._served_at[key] = self._admitted_at[key] = time.monotonic()
            self._shares.admit(key)
        self._report()

    def _can_admit(self) -> bool:
        """Whether a queued sample may start: samples that sit out occupy nobody's slot."""
        return bool(self._queued) and sum(not s.sits_out for s in self._running.values()) < self._max_running

    def _choose(self) -> tuple[list[Member], bool]:
        """The members of the next pass, and whether each row has its own adapters."""
        now = time.monotonic()
        # Adapters that were loaded since `_request` take effect at the next step boundary.
        ready = {key: one for key, one in self._running.items() if not (one.sits_out or one.lacks_adapters)}
        sizes = {tuple(sample.latents.shape[-2:]) for sample in ready.values()}
        seconds = {size: self._profile.seconds(*size) for size in sizes}
        candidates = [
            Candidate(
                key=key,
                group=sample.group,
                adapters=sample.adapter_key,
                must_merge=sample.must_merge,
                waited=now - self._served_at[key],
                received=self._shares.of(key),
                age=now - self._admitted_at[key],
                steps_left=max(1, sample.total - sample.index),
                rows=sample.rows,
                pass_seconds=seconds[tuple(sample.latents.shape[-2:])],
            )
            for key, sample in ready.items()
        ]
        choice = choose(candidates, merged=self._adapters.merged(), limits=self._limits)
        self._served_at.update(dict.fromkeys(choice.keys, now))
        return [sample for key, sample in self._running.items() if key in choice.keys], choice.by_row

    @torch.inference_mode()
    def _request(self) -> None:
        """Requests what peers compute for the present steps. That of samples outside the next pass is computed meanwhile."""
        for sample in list(self._running.values()):
            try:
                sample.residuals()
            except Exception as error:
                self._fail(sample, _as_error(error))

    @torch.inference_mode()
    def _run(self, batch: Sequence[Member], *, by_row: bool) -> None:
        self._adapters.apply(batch, by_row=by_row)
        now = time.monotonic_ns()
        for sample in batch:
            sample.first_step_ns = sample.first_step_ns or now
        patience = max(_LEAST_PATIENCE, _PATIENCE_PASSES * self._mean_step)
        started = time.perf_counter_ns()
        prediction = self._runner.run(batch, patience=patience)
        seconds = (time.perf_counter_ns() - started - prediction.residuals_wait_ns) / 1e9
        self._mean_step = moving_mean(self._mean_step, seconds)
        if any(noise is not None for noise in prediction.noise):
            self._profile.add(_size(batch), prediction.time, factor=BY_ROW if by_row else 1.0)
        for sample, noise in zip(batch, prediction.noise, strict=True):
            if noise is None:
                self._sit_out(sample)
                continue
            sample.forward_time += prediction.time
            sample.residuals_wait_ns += prediction.residuals_wait_ns
            self._advance(sample, noise)

    @torch.inference_mode()
    def _advance(self, sample: Member, noise: torch.Tensor) -> None:
        try:
            is_done = sample.advance(noise)
        except Exception as error:
            self._fail(sample, _as_error(error))
        else:
            if is_done:
                self._deliver(sample)

    def _await_halves(self, batch: Sequence[Member]) -> None:
        """Waits a moment for the halves that guidance peers compute, unless another member can take part in a pass."""
        late = {sample.key for sample in batch if sample.own_half is not None}
        halves = [future for sample in batch if sample.own_half is not None for future in sample.awaited()]
        for future in halves:
            future.add_done_callback(self.wake)
        if all(future.done() for future in halves):
            return
        self._runner.idle()
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopping or all(future.done() for future in halves) or self._has_work(besides=late),
                _HALF_PASSES * self._mean_step,
            )

    def _sit_out(self, sample: Member) -> None:
        """The sample takes part in no pass until its residuals are there."""
        if not all(future.done() for future in sample.residuals()):
            _log.info("residuals are late", request=sample.request_id, step=sample.index + 1)
            sample.is_late = True
            self._metrics.of("latentflow_late_residuals_total").inc()
            for future in sample.residuals():
                future.add_done_callback(self.wake)

    def _seconds_left(self, sample: Member) -> float:
        """Until the sample has to do without what it awaits; infinite where it awaits nothing."""
        # Loading adapters has a limit of its own.
        if sample.lacks_adapters or not (sample.sits_out and sample.awaited()):
            return math.inf
        limit = _RESIDUAL_SECONDS
        if sample.own_half is not None:
            usual = _HALF_LIMIT_PASSES * self._mean_step + _HALF_LIMIT_MERGES * self._adapters.merge_seconds
            limit = max(_LEAST_HALF_SECONDS, usual)
        return max(0.0, sample.requested_at + limit - time.monotonic())

    def _expire(self, sample: Member) -> None:
        """What the sample awaits is overdue: it does without it, or fails."""
        late = UnavailableError(
            f"The guidance peer did not answer step {sample.index + 1} in time.", reason=Reason.PEER_UNAVAILABLE
        )
        if not sample.lost(late):
            self._fail(sample, _no_residuals(sample))

    def wake(self, _: object = None) -> None:
        """What a member awaited is there. From any thread."""
        with self._changed:
            self._changed.notify()

    def _run_alone(self, batch: Sequence[Member]) -> None:
        """Runs each sample of a failed batch by itself, so that only the sample at fault fails."""
        for sample in batch:
            try:
                self._run([sample], by_row=False)
            except SampleError as failure:
                self._fail(sample, failure.error)
            except Exception as error:
                self._fail(sample, _as_error(error))

    def _deliver(self, sample: Member) -> None:
        if sample.index < sample.total:
            sample.stepped()
            return
        with self._changed:
            self._retire(sample.key)
            self._report()
        sample.finished()

    def _fail(self, sample: Member, error: LatentflowError) -> None:
        with self._changed:
            self._retire(sample.key)
            self._report()
        sample.failed(error)

    def _fail_all(self, error: LatentflowError) -> None:
        with self._changed:
            left = [*self._running.values(), *self._queued.values()]
            self._queued.clear()
        for sample in left:
            self._fail(sample, error)

    def _retire(self, key: int) -> None:
        self._running.pop(key, None)
        self._served_at.pop(key, None)
        self._admitted_at.pop(key, None)
        self._shares.retire(key)

    def _has_work(self, *, besides: Collection[int] = ()) -> bool:
        """Whether a step would do anything, for another member than those of these keys."""
        others = [sample for key, sample in self._running.items() if key not in besides]
        return (
            bool(self._cancelled)
            or self._can_admit()
            or any(not s.sits_out or self._seconds_left(s) == 0 for s in others)
        )

    def _seconds_to_overdue(self) -> float | None:
        """Until the first sample that sits out has to do without what it awaits; None: none awaits anything."""
        left = min((self._seconds_left(sample) for sample in self._running.values()), default=math.inf)
        return None if left == math.inf else left

    def _report(self) -> None:
        self._load.set(running=len(self._running), queued=len(self._queued))

    def _loop(self, threads: int) -> None:
        compute_with(threads)
        while True:
            with self._changed:
                while not (self._stopping or self._has_work()):
                    self._runner.idle()
                    self._changed.wait(self._seconds_to_overdue())
                if self._stopping:
                    break
            try:
                self.step()
            except Exception as error:
                # A defect of ours: no request hangs, and later ones are served.
                _log.exception("step loop failed")
                self._fail_all(_as_error(error))
        # A lock that is still held would stop the other servers of the machine.
        self._runner.idle()
        self._fail_all(UnavailableError("This server is stopping; retry on another replica.", reason=Reason.DRAINING))
        malloc.return_freed_memory()


def _no_residuals(sample: Member) -> LatentflowError:
    return UnavailableError(
        f"A ControlNet sent no residuals for step {sample.index + 1} within {_RESIDUAL_SECONDS:g} s.",
        reason=Reason.PEER_UNAVAILABLE,
    )


def _size(batch: Sequence[Member]) -> PassSize:
    height, width = batch[0].latents.shape[-2:]
    return PassSize(rows=sum(sample.rows for sample in batch), height=height, width=width)


def _as_error(error: Exception) -> LatentflowError:
    if isinstance(error, LatentflowError):
        return error
    if is_out_of_memory(error):
        return out_of_memory()
    _log.exception("forward pass failed", exc_info=error)
    if isinstance(error, RuntimeError) and "size of tensor" in str(error):
        return FailedPreconditionError(
            f"A ControlNet's residuals do not fit this denoiser ({error}); it was trained for another base model.",
            reason=Reason.CONTROLNET_MISMATCH,
        )
    return InternalError(f"The forward pass failed: {type(error).__name__}: {error}. The server's log has the details.")
