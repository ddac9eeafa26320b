"""The guidance peer of a request: another replica that computes the negative half of each step.

The request starts at once and uses the peer from the step boundary on at which its streams are open. Whatever ends them,
the request continues without a peer, so a peer can be given, taken back or lost at any time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from types import TracebackType

import structlog
from latentflow.errors import FailedPreconditionError, InvalidRequestError, LatentflowError
from latentflow.internal.guidance import Guidance
from latentflow.internal.metrics import Instruments
from latentflow.reasons import Reason
from latentflow.v1 import stage_pb2, tensors_pb2

from latentflow_nodes.engine.member import Control
from latentflow_nodes.engine.sample import Assignment, GuidancePeer
from latentflow_nodes.families.base import NEGATIVE
from latentflow_nodes.tensors.peers import Peers
from latentflow_nodes.tensors.step_stream import NoiseStream, ResidualStream

_log = structlog.get_logger()


class GuidancePeers:
    """The guidance peers of one request, one at a time. Runs in the event loop.

    Args:
        opening: The request.
        is_embedded: The network takes the guidance scale as an input.
        total: Its steps, as `Sample.total`.
        content_digest: Of this server's weights, which the peer has to have.
        changed: Called when the peer in effect has changed.

    Attributes:
        assignment: What the sample reads.
    """

    def __init__(
        self,
        peers: Peers,
        opening: stage_pb2.DenoiseOpen,
        *,
        is_embedded: bool,
        total: int,
        content_digest: str,
        metrics: Instruments,
        changed: Callable[[stage_pb2.DenoiseGuidanceChanged], None],
    ) -> None:
        self.assignment = Assignment()
        self._peers = peers
        self._opening = opening
        self._is_embedded = is_embedded
        self._total = total
        self._content_digest = content_digest
        self._metrics = metrics
        self._changed = changed
        self._task: asyncio.Task[None] | None = None
        # Those of earlier peers, which end their streams.
        self._ending: set[asyncio.Task[None]] = set()

    def assign(self, peer: stage_pb2.Peer) -> None:
        """Uses a peer from the next step boundary on, in place of the present one. A peer without address: none.

        Raises as `check`.
        """
        if peer.address:
            check(self._opening, is_embedded=self._is_embedded)
        self._end()
        before, self.assignment.peer = self.assignment.peer, None
        self._task = asyncio.create_task(self._use(peer)) if peer.address else None
        if before is not None and not peer.address:
            self._changed(stage_pb2.DenoiseGuidanceChanged())

    async def __aenter__(self) -> GuidancePeers:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        await asyncio.gather(*self._ending, return_exceptions=True)

    def _end(self) -> None:
        """Ends the use of the present peer. Once for each task: a second cancellation would interrupt its clean-up."""
        if self._task is not None:
            self._task.cancel()
            self._ending.add(self._task)
            self._task.add_done_callback(self._ending.discard)
            self._task = None

    async def _use(self, peer: stage_pb2.Peer) -> None:
        used: GuidancePeer | None = None
        try:
            async with AsyncExitStack() as stack:
                stream = await stack.enter_async_context(NoiseStream(self._peers, peer, self._predict_noise_open()))
                controls = await open_controls(stack, self._peers, self._opening, half=stage_pb2.GUIDANCE_HALF_POSITIVE)
                await stream.opened()
                self.assignment.peer = used = GuidancePeer(source=stream, controls=controls)
                self._changed(stage_pb2.DenoiseGuidanceChanged(address=peer.address))
                error = await stream.ended()
        except LatentflowError as refusal:
            error = refusal
        if self.assignment.peer is used:
            self.assignment.peer = None
        self._metrics.of("latentflow_guidance_peers_lost_total", reason=error.reason).inc()
        _log.warning("guidance peer lost", peer=peer.address, reason=error.reason, problem=error.message)
        self._changed(stage_pb2.DenoiseGuidanceChanged(reason=error.reason))

    def _predict_noise_open(self) -> stage_pb2.PredictNoiseOpen:
        opening = self._opening
        return stage_pb2.PredictNoiseOpen(
            request_id=opening.request_id,
            conditioning={name: one for name, one in opening.conditioning.items() if name.startswith(NEGATIVE)},
            width=opening.width,
            height=opening.height,
            half=stage_pb2.GUIDANCE_HALF_NEGATIVE,
            control_nets=opening.control_nets,
            adapters=opening.adapters,
            total=self._total,
            content_digest=self._content_digest,
            scheduling=opening.scheduling,
        )


def check(opening: stage_pb2.DenoiseOpen, *, is_embedded: bool) -> None:
    """Raises FailedPreconditionError or InvalidRequestError for a request that cannot have a guidance peer."""
    if is_embedded:
        raise FailedPreconditionError(
            "This model takes the guidance scale as an input and computes one row a step, so there is no half for a guidance "
            "peer. Set `parallelism.latent: 1`.",
            reason=Reason.GUIDANCE_EMBEDDED,
        )
    if not Guidance(scale=opening.guidance_scale, is_embedded=False).has_halves:
        raise InvalidRequestError(
            f"A request with the guidance scale {opening.guidance_scale:g} has no negative half for a guidance peer."
        )
    if opening.scheduling.deterministic:
        raise InvalidRequestError("One server computes a deterministic request; it cannot have a guidance peer.")


async def open_controls(
    stack: AsyncExitStack,
    peers: Peers,
    opening: stage_pb2.DenoiseOpen | stage_pb2.PredictNoiseOpen,
    *,
    half: stage_pb2.GuidanceHalf,
) -> tuple[Control, ...]:
    """The ControlNets that act on these rows of a request, their streams open until the stack is closed."""
    controls = []
    for net in opening.control_nets:
        if net.guess_mode and half == stage_pb2.GUIDANCE_HALF_NEGATIVE:
            continue
        rows = stage_pb2.GUIDANCE_HALF_POSITIVE if net.guess_mode else half
        residuals = _residuals_opening(opening, net, rows)
        stream = await stack.enter_async_context(ResidualStream(peers, net, residuals))
        controls.append(
            Control(source=stream, scale=net.scale, start=net.start, end=net.end, positive_only=net.guess_mode)
        )
    return tuple(controls)


def _residuals_opening(
    opening: stage_pb2.DenoiseOpen | stage_pb2.PredictNoiseOpen,
    ref: stage_pb2.ControlNetRef,
    half: stage_pb2.GuidanceHalf,
) -> stage_pb2.ResidualsOpen:
    conditioning: Mapping[str, tensors_pb2.Tensor] = opening.conditioning
    return stage_pb2.ResidualsOpen(
        request_id=opening.request_id,
        conditioning=conditioning,
        half=half,
        image=ref.image,
        net=ref.net,
        guess_mode=ref.guess_mode,
        width=opening.width,
        height=opening.height,
        content_digest=ref.peer.content_digest,
        scheduling=opening.scheduling,
    )
