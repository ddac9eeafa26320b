"""The mailbox of a denoiser's request, between the event loop, which serves the call, and the thread of the step loop."""

from __future__ import annotations

import asyncio
import time

from latentflow.errors import LatentflowError
from latentflow.v1 import stage_pb2

from latentflow_nodes.engine.sample import Sample

# Progress is for people to watch. Messages of quicker steps are left out, because each one takes the processor from the
# step loop for a while (20 steps of 9 ms each took 12 % longer).
_PROGRESS_SECONDS = 0.25


class Mailbox:
    """Carries a sample's progress from the engine's thread to the event loop, and a request to stop the other way.

    Args:
        checkpoint_interval: Steps after which progress carries a checkpoint; 0: it never does.

    Attributes:
        left: Set when the caller has read its last event or has gone.
        is_stopped: `stop` has ended the sample before its last step.
        checkpoint: Where a stopped sample can be resumed; None: at its start.
    """

    def __init__(self, *, checkpoint_interval: int) -> None:
        self.left = asyncio.Event()
        self.is_stopped = False
        self.checkpoint: stage_pb2.Checkpoint | None = None
        self._stopping = False
        # With which the sample ends at its next step boundary.
        self._error: LatentflowError | None = None
        self._loop = asyncio.get_running_loop()
        self._interval = checkpoint_interval
        self._posted_at = time.monotonic()
        self._queue: asyncio.Queue[stage_pb2.DenoiseResponse | LatentflowError | None] = asyncio.Queue()

    def stepped(self, sample: Sample) -> None:
        if self._stopping:
            self.checkpoint = _checkpoint(sample)
            self._end_stopped()
            return
        if self._error is not None:
            self._progress(sample, _checkpoint(sample))
            self._post(self._error)
            return
        keep = self._interval and sample.index % self._interval == 0
        now = time.monotonic()
        if not keep and now - self._posted_at < _PROGRESS_SECONDS:
            return
        self._posted_at = now
        self._progress(sample, _checkpoint(sample) if keep else None)

    def finished(self, sample: Sample) -> None:
        self._progress(sample, None)
        self._post(None)

    def failed(self, sample: Sample, error: LatentflowError) -> None:
        self._post(error)

    def stop(self, sample: Sample) -> None:
        """Ends the sample at its next step boundary, or now if it has not begun its first step. From the event loop."""
        self._stopping = True
        if not sample.first_step_ns:
            self._end_stopped()

    def stop_with(self, error: LatentflowError, sample: Sample) -> None:
        """As `stop`, for a sample that its caller has not stopped: a checkpoint comes as progress before the error."""
        self._error = error
        if not sample.first_step_ns:
            self._post(error)

    def refuse(self, error: LatentflowError) -> None:
        """Ends the sample with an error of its caller's."""
        self._post(error)

    def guidance_changed(self, change: stage_pb2.DenoiseGuidanceChanged) -> None:
        """Another guidance peer is in effect. From the event loop."""
        self._post(stage_pb2.DenoiseResponse(guidance=change))

    async def get(self) -> stage_pb2.DenoiseResponse | None:
        """The next event; None at the end. Raises the error that failed the sample."""
        posted = await self._queue.get()
        if isinstance(posted, LatentflowError):
            raise posted
        return posted

    def _end_stopped(self) -> None:
        self.is_stopped = True
        self._post(None)

    def _progress(self, sample: Sample, checkpoint: stage_pb2.Checkpoint | None) -> None:
        progress = stage_pb2.DenoiseProgress(step=sample.index, total=sample.total, checkpoint=checkpoint)
        self._post(stage_pb2.DenoiseResponse(progress=progress))

    def _post(self, item: stage_pb2.DenoiseResponse | LatentflowError | None) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, item)


def _checkpoint(sample: Sample) -> stage_pb2.Checkpoint:
    """The sample's state. In the engine's thread: a step later it would be another."""
    return stage_pb2.Checkpoint(state=sample.checkpoint(), step=sample.index)
