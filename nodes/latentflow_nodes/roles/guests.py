"""`PredictNoise`: one guidance half of a request whose other half another replica of the same model computes.

The half is a member of this replica's step loop and shares its batches. Its ControlNets send their residuals here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack

import torch
from latentflow.errors import FailedPreconditionError, InvalidRequestError, UnavailableError
from latentflow.internal.guidance import Guidance
from latentflow.reasons import Reason
from latentflow.v1 import stage_pb2

from latentflow_nodes.adapters.layers import Layers
from latentflow_nodes.adapters.merger import Merger
from latentflow_nodes.context import Context
from latentflow_nodes.engine.engine import Engine
from latentflow_nodes.engine.guest import Guest
from latentflow_nodes.families.base import Conditioning, Family, of_half
from latentflow_nodes.roles.conditioning import check_conditioning
from latentflow_nodes.roles.guidance_peers import open_controls
from latentflow_nodes.roles.role import asleep
from latentflow_nodes.tensors import codec

_HALVES = (stage_pb2.GUIDANCE_HALF_POSITIVE, stage_pb2.GUIDANCE_HALF_NEGATIVE)


class Guests:
    """Serves `PredictNoise` with a denoiser's network and engine.

    Args:
        component: Folder of the network in its pipeline, whose part of the adapters is merged.
        content_digest: Of the network's weights.
        next_key: Makes the key of a member of the engine.
    """

    def __init__(
        self,
        context: Context,
        *,
        network: torch.nn.Module,
        family: Family,
        component: str,
        content_digest: str,
        engine: Engine,
        merger: Merger,
        next_key: Callable[[], int],
    ) -> None:
        self._context = context
        self._network = network
        self._family = family
        self._component = component
        self._content_digest = content_digest
        self._engine = engine
        self._merger = merger
        self._next_key = next_key

    async def serve(
        self, requests: AsyncIterator[stage_pb2.PredictNoiseRequest]
    ) -> AsyncIterator[stage_pb2.PredictNoiseResponse]:
        """Answers the steps of one half in their order."""
        first = await anext(requests, stage_pb2.PredictNoiseRequest())
        if first.WhichOneof("message") != "open":
            raise InvalidRequestError("The first message of a PredictNoise stream must be `open`.")
        opening = first.open
        self._check(opening)
        peers = self._context.peers
        tensors = of_half(opening.conditioning, negative=opening.half == stage_pb2.GUIDANCE_HALF_NEGATIVE)
        conditioning, adapters = await asyncio.gather(
            peers.conditioning(tensors, self._context.device), peers.adapters(opening.adapters, self._component)
        )
        for ref, (layers, _) in zip(opening.adapters, adapters, strict=True):
            self._merger.check(ref.name, layers)
        async with AsyncExitStack() as stack:
            sender = stack.enter_context(self._context.transport.sender())
            guest = self._guest(opening, conditioning)
            guest.controls = await open_controls(stack, peers, opening, half=opening.half)
            self._engine.submit(guest)
            stack.callback(self._engine.cancel, guest.key)
            yield stage_pb2.PredictNoiseResponse(opened=True)
            forward_ns = 0
            async for request in requests:
                if request.WhichOneof("message") != "step":
                    raise InvalidRequestError("Only the first message of a PredictNoise stream can be `open`.")
                if self._context.load.is_draining:
                    # The caller computes both halves itself, so nobody has to wait for the end of its request.
                    raise UnavailableError("This server is draining.", reason=Reason.DRAINING)
                if not self._context.load.is_awake:
                    raise asleep()
                noise = await self._step(guest, request.step, opening, adapters)
                before, forward_ns = forward_ns, guest.forward_time.nanoseconds()
                for chunk in sender.pieces({"noise": noise}, memory=request.step.shared_memory):
                    yield stage_pb2.PredictNoiseResponse(
                        step=request.step.step, chunk=chunk, forward_ns=forward_ns - before if chunk.last else 0
                    )

    async def _step(
        self,
        guest: Guest,
        step: stage_pb2.PredictNoiseStep,
        opening: stage_pb2.PredictNoiseOpen,
        adapters: Sequence[tuple[Layers, float]],
    ) -> torch.Tensor:
        if any(at >= len(adapters) for at in step.adapters):
            raise InvalidRequestError(f"A step names adapter {max(step.adapters)} of {len(adapters)}, from 0.")
        device, dtype = self._context.device, self._context.dtype
        answer = guest.begin(
            step=step.step,
            timestep=step.timestep,
            sample=codec.from_inline(step.sample).to(device, dtype),
            adapters=tuple(adapters[at] for at in step.adapters),
            adapter_key=adapter_key([opening.adapters[at] for at in step.adapters]),
        )
        self._engine.wake()
        return await asyncio.wrap_future(answer)

    def _check(self, opening: stage_pb2.PredictNoiseOpen) -> None:
        if self._family.embeds_guidance(self._network):
            raise FailedPreconditionError(
                "This model takes the guidance scale as an input; its steps have no halves.",
                reason=Reason.GUIDANCE_EMBEDDED,
            )
        if opening.half not in _HALVES:
            raise InvalidRequestError("A PredictNoise stream is for one guidance half, positive or negative.")
        if opening.content_digest and opening.content_digest != self._content_digest:
            raise FailedPreconditionError(
                f"The caller's weights have the digest {opening.content_digest[:12]}, this replica's "
                f"{self._content_digest[:12]}; halves of one request need the same weights.",
                reason=Reason.WEIGHTS_MISMATCH,
            )
        if not opening.total:
            raise InvalidRequestError("A PredictNoise stream needs the number of its steps, `total`.")

    def _guest(self, opening: stage_pb2.PredictNoiseOpen, conditioning: Conditioning) -> Guest:
        device, dtype = self._context.device, self._context.dtype
        one_half = Guidance(scale=1.0, is_embedded=False)
        check_conditioning(conditioning, self._family.conditioning_shapes(self._network), one_half)
        # The first step brings the size of the latents.
        shape = self._family.latent_shape(self._network, height=1, width=1)
        return Guest(
            key=self._next_key(),
            request_id=opening.request_id,
            inputs=self._family.denoiser_inputs(
                self._network,
                {name: tensor.to(dtype) for name, tensor in conditioning.items()},
                guidance=one_half,
                width=opening.width,
                height=opening.height,
            ),
            latents=torch.zeros(shape, device=device, dtype=dtype),
            steps=opening.total,
        )


def adapter_key(refs: Sequence[stage_pb2.AdapterRef]) -> tuple[tuple[str, str, float], ...]:
    """Equal for equal sets of adapters."""
    return tuple((ref.name, ref.digest, ref.weight) for ref in refs)
