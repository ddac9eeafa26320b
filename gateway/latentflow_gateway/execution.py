"""Runs a planned request on the replicas, and repeats what fails.

It encodes once, then denoises and decodes every image. Stages return handles of all but small tensors; their leases are renewed while
the request runs, and they are released when it ends, with or without an error. A failed stage is repeated on any ready
replica, denoising from its last checkpoint; a tensor whose owner is lost is made again by its stage.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import grpc
import structlog
from latentflow.errors import DeadlineError, LatentflowError, OwnerLostError, UnavailableError
from latentflow.internal import rpc, status
from latentflow.internal.metrics import Instruments
from latentflow.reasons import Reason
from latentflow.v1 import generation_pb2, images_pb2, stage_pb2, stage_pb2_grpc, tensors_pb2

from latentflow_gateway import retrying
from latentflow_gateway.controls import ControlPlan
from latentflow_gateway.leases import Leases
from latentflow_gateway.loans import Loan, denoise_requests
from latentflow_gateway.planning import Plan
from latentflow_gateway.replicas import Replica, Replicas
from latentflow_gateway.timing import Timing

_log = structlog.get_logger()
# How often one image makes lost tensors again before the request fails.
_MAX_REMADE = 5

T = TypeVar("T")
Emit = Callable[[generation_pb2.GenerateResponse], None]


class Execution:
    """Runs one plan.

    Args:
        deadline: In the event loop's time.
        emit: Called with every Progress, Image and Done event.
        token: The secret that gateways and model servers share.
    """

    def __init__(
        self,
        *,
        plan: Plan,
        request_id: str,
        trace: rpc.Trace,
        deadline: float,
        emit: Emit,
        replicas: Replicas,
        token: str | None,
        metrics: Instruments,
        checkpoint_interval: int,
        ready_seconds: float,
    ) -> None:
        self._plan = plan
        self._request_id = request_id
        self._trace = trace
        self._deadline = deadline
        self._emit = emit
        self._replicas = replicas
        self._token = token
        self._metrics = metrics
        self._checkpoint_interval = checkpoint_interval
        self._ready_seconds = ready_seconds
        self._leases = Leases(request_id, self._metadata)
        self._adapter_set = tuple((a.name, a.digest, a.weight) for a in plan.adapters)
        self._encoding = asyncio.Lock()
        self._encoded: stage_pb2.EncodeResponse | None = None
        self._timings: list[generation_pb2.StageTiming] = []

    async def run(self, *, arrived: float) -> None:
        """Emits all events up to Done. Raises an error that no repetition corrects. The caller then calls `release`."""
        started = time.perf_counter()
        renewing = asyncio.create_task(self._leases.renew())
        try:
            await self._conditioning(None)
            async with asyncio.TaskGroup() as group:
                for index in range(self._plan.images):
                    group.create_task(self._image(index))
        except BaseExceptionGroup as failures:
            raise _first(failures) from None
        finally:
            renewing.cancel()
        self._emit(generation_pb2.GenerateResponse(done=self._done(arrived=arrived, started=started)))

    async def _image(self, index: int) -> None:
        timing = Timing(stage="denoise", image=index)
        progress = _Checkpointed()
        decoding: Timing | None = None
        decoded: stage_pb2.DecodeResponse | None = None
        for remade in range(_MAX_REMADE + 1):
            conditioning = await self._conditioning(None)
            try:
                latents = await self._attempts(
                    timing, self._plan.denoiser, partial(self._denoise, index, conditioning, progress, timing)
                )
            except OwnerLostError:
                if remade == _MAX_REMADE:
                    raise
                self._retried(self._plan.text_encoder, "encode", Reason.OWNER_LOST)
                await self._conditioning(conditioning)
                continue
            decoding = decoding or Timing(stage="decode", image=index)
            try:
                decoded = await self._attempts(
                    decoding, self._plan.vae, partial(self._decode, latents, decoding), near=timing.replica
                )
                break
            except OwnerLostError:
                if remade == _MAX_REMADE:
                    raise
                self._retried(self._plan.denoiser, "denoise", Reason.OWNER_LOST)
        if decoded is None or decoding is None:
            raise UnavailableError(
                f"Tensors of image {index} were lost {_MAX_REMADE} times; the servers restart repeatedly. See their logs.",
                reason=Reason.STAGE_BROKEN_OFF,
            )
        self._report(timing, self._plan.denoiser)
        self._report(decoding, self._plan.vae)
        self._metrics.of("latentflow_gateway_images_total", workflow=self._plan.workflow).inc()
        image = generation_pb2.Image(
            image=index,
            content=decoded.image,
            seed=self._plan.seed + index,
            steps_without_loras=timing.steps_without_loras,
        )
        self._emit(generation_pb2.GenerateResponse(image=image))

    async def _conditioning(self, lost: stage_pb2.EncodeResponse | None) -> stage_pb2.EncodeResponse:
        """The text encoder's response; encodes again where the known response is `lost`."""
        async with self._encoding:
            if self._encoded is None or self._encoded is lost:
                timing = Timing(stage="encode", image=0)
                self._encoded = await self._attempts(timing, self._plan.text_encoder, partial(self._encode, timing))
                self._report(timing, self._plan.text_encoder)
            return self._encoded

    async def _attempts(
        self, timing: Timing, model: str, call: Callable[[Replica], Awaitable[T]], *, near: str | None = None
    ) -> T:
        """The result of the first attempt that succeeds.

        Args:
            near: As of `Replicas.pick`, for the first attempt.
        """
        failures = 0
        while True:
            wait = min(self._remaining(), self._ready_seconds)
            adapters = self._adapter_set
            async with self._replicas.acquire(model, seconds=wait, near=near, adapters=adapters) as replica:
                timing.attempts += 1
                timing.replica = replica.address
                try:
                    result = await call(replica)
                    timing.ended = time.perf_counter()
                    return result
                except grpc.RpcError as failure:
                    error = status.error_of_peer(failure)
                except LatentflowError as failure:
                    error = failure
                self._suspect(error, replica)
            near = None
            retry = retrying.decide(error, failures=failures)
            if retry is None:
                raise error
            failures = retry.failures
            self._retried(model, timing.stage, error.reason)
            _log.info("stage failed and is repeated", stage=timing.stage, replica=timing.replica, reason=error.reason)
            await asyncio.sleep(min(retry.seconds, max(0.0, self._remaining())))

    async def _encode(self, timing: Timing, replica: Replica) -> stage_pb2.EncodeResponse:
        request = stage_pb2.EncodeRequest(
            request_id=self._request_id,
            prompt=self._plan.prompt,
            guidance=self._plan.guidance,
            strict_prompt=self._plan.strict_prompt,
            adapters=await self._adapters(
                self._replicas.descriptions[self._plan.text_encoder].text_encoder.adapter_components,
                near=replica.address,
            ),
        )
        request.scheduling.deterministic = self._plan.deterministic
        if self._plan.negative_prompt is not None:
            request.negative_prompt = self._plan.negative_prompt
        with self._leases.answering(replica):
            response: stage_pb2.EncodeResponse = await stage_pb2_grpc.StageStub(replica.channel).Encode(
                request, **self._call()
            )
        timing.forward_ns += response.forward_ns
        self._leases.hold(response.conditioning.values(), replica)
        return response

    async def _denoise(
        self,
        index: int,
        encoded: stage_pb2.EncodeResponse,
        progress: _Checkpointed,
        timing: Timing,
        replica: Replica,
    ) -> tensors_pb2.Tensor:
        async with AsyncExitStack() as held:
            opening = await self._denoise_open(index, encoded, progress, replica, held)
            with self._replicas.borrow(self._plan.denoiser, beside=replica, latent=self._plan.latent) as loan:
                if loan is not None:
                    opening.guidance_peer.CopyFrom(self._named(self._plan.denoiser, loan.replica))
                with self._leases.answering(replica):
                    return await self._steps(opening, index, progress, timing, replica, loan)

    async def _denoise_open(
        self,
        index: int,
        encoded: stage_pb2.EncodeResponse,
        progress: _Checkpointed,
        replica: Replica,
        held: AsyncExitStack,
    ) -> stage_pb2.DenoiseOpen:
        """The request for one image. Its ControlNets count the request until `held` is closed."""
        plan = self._plan
        return stage_pb2.DenoiseOpen(
            request_id=self._request_id,
            conditioning=encoded.conditioning,
            width=plan.width,
            height=plan.height,
            scale_factor=plan.scale_factor,
            steps=plan.steps,
            guidance_scale=plan.guidance_scale,
            sampler=plan.sampler,
            seed=plan.seed + index,
            control_nets=[
                stage_pb2.ControlNetRef(
                    peer=await self._control_net(control, held, near=replica.address),
                    net=control.net,
                    image=images_pb2.EncodedImage(data=control.image, media_type=control.media_type),
                    scale=control.scale,
                    start=control.start,
                    end=control.end,
                    guess_mode=control.guess_mode,
                )
                for control in plan.controls
            ],
            adapters=await self._adapters(
                self._replicas.descriptions[plan.denoiser].denoiser.adapter_components, near=replica.address
            ),
            checkpoint=progress.state,
            checkpoint_interval=self._checkpoint_interval,
            preview_interval=plan.preview_interval,
            scheduling=stage_pb2.Scheduling(deterministic=plan.deterministic),
        )

    async def _steps(
        self,
        opening: stage_pb2.DenoiseOpen,
        index: int,
        progress: _Checkpointed,
        timing: Timing,
        replica: Replica,
        loan: Loan | None,
    ) -> tensors_pb2.Tensor:
        requests = denoise_requests(opening, loan)
        async for event in stage_pb2_grpc.StageStub(replica.channel).Denoise(requests, **self._call()):
            if event.WhichOneof("event") == "guidance":
                if loan is not None and event.guidance.reason:
                    loan.lost(event.guidance.reason)
                continue
            if event.WhichOneof("event") == "result":
                result = event.result
                timing.forward_ns += result.forward_ns
                timing.wait_ns += result.wait_ns
                timing.steps_without_loras = result.steps_without_adapters
                latents: tensors_pb2.Tensor = result.latents
                self._leases.hold([latents], replica)
                return latents
            step = event.progress
            if step.HasField("checkpoint"):
                progress.state = step.checkpoint.state
            self._emit(
                generation_pb2.GenerateResponse(
                    progress=generation_pb2.Progress(
                        image=index,
                        step=step.step,
                        total=step.total,
                        preview=step.preview if step.HasField("preview") else None,
                    )
                )
            )
        raise UnavailableError(
            f"{replica.address} ended a Denoise call without a result.", reason=Reason.STAGE_BROKEN_OFF
        )

    async def _decode(self, latents: tensors_pb2.Tensor, timing: Timing, replica: Replica) -> stage_pb2.DecodeResponse:
        request = stage_pb2.DecodeRequest(request_id=self._request_id, latents=latents)
        request.scheduling.deterministic = self._plan.deterministic
        response: stage_pb2.DecodeResponse = await stage_pb2_grpc.StageStub(replica.channel).Decode(
            request, **self._call()
        )
        timing.forward_ns += response.forward_ns
        return response

    async def _adapters(self, components: Iterable[str], *, near: str) -> list[stage_pb2.AdapterRef]:
        """The request's adapters that change one of these components."""
        chosen = [a for a in self._plan.adapters if not set(a.components).isdisjoint(components)]
        if not chosen or self._plan.store is None:
            return []
        store = await self._peer(self._plan.store, near=near)
        return [
            stage_pb2.AdapterRef(name=a.name, weight=a.weight, store=store, digest=a.digest, async_steps=a.async_steps)
            for a in chosen
        ]

    async def _control_net(self, control: ControlPlan, held: AsyncExitStack, *, near: str) -> stage_pb2.Peer:
        seconds = min(self._remaining(), self._ready_seconds)
        acquired = self._replicas.acquire(control.model, seconds=seconds, near=near, net=control.net)
        return self._named(control.model, await held.enter_async_context(acquired))

    async def _peer(self, model: str, *, near: str) -> stage_pb2.Peer:
        replica = await self._replicas.pick(model, seconds=min(self._remaining(), self._ready_seconds), near=near)
        return self._named(model, replica)

    def _named(self, model: str, replica: Replica) -> stage_pb2.Peer:
        digest = self._replicas.descriptions[model].content_digest
        return stage_pb2.Peer(address=replica.address, model=model, content_digest=digest)

    def _call(self) -> dict[str, Any]:
        return {"timeout": self._remaining(), "metadata": self._metadata()}

    def _metadata(self) -> list[tuple[str, str]]:
        return rpc.metadata(token=self._token, trace=self._trace.child(), request_id=self._request_id)

    def _remaining(self) -> float:
        seconds = self._deadline - asyncio.get_running_loop().time()
        if seconds <= 0:
            raise DeadlineError("The request's deadline passed before its images were finished; use a longer timeout.")
        return seconds

    def _suspect(self, error: LatentflowError, replica: Replica) -> None:
        """Has the health checked of the server that did not respond, before it gets another request."""
        if error.reason == Reason.PEER_UNAVAILABLE:
            peer = self._replicas.find(error.details.get("peer", ""))
            if peer is not None:
                peer.suspect()
        elif isinstance(error, OwnerLostError):
            owner = self._replicas.find(error.details.get("owner", ""))
            if owner is not None:
                owner.suspect()
        elif isinstance(error, UnavailableError) and error.reason != Reason.ADAPTER_CHANGED:
            replica.suspect()

    async def release(self) -> None:
        """Releases all tensors. The request's events do not wait for it."""
        await self._leases.release()

    def _retried(self, model: str, stage: str, reason: str) -> None:
        self._metrics.of("latentflow_gateway_stage_retries_total", model=model, stage=stage, reason=reason).inc()

    def _report(self, timing: Timing, model: str) -> None:
        self._metrics.of("latentflow_gateway_stage_seconds", model=model, stage=timing.stage).observe(timing.seconds)
        self._timings.append(timing.message())

    def _done(self, *, arrived: float, started: float) -> generation_pb2.Done:
        plan = self._plan
        done = generation_pb2.Done(
            stages=self._timings,
            models=[
                generation_pb2.ModelUse(
                    name=name, model=model, content_digest=self._replicas.descriptions[model].content_digest
                )
                for name, model in plan.names.items()
            ],
            seed=plan.seed,
            width=plan.width,
            height=plan.height,
            steps=plan.steps,
            requested_steps=plan.steps,
            guidance_scale=plan.guidance_scale,
            sampler=plan.sampler,
        )
        if self._encoded is not None:
            done.truncated = self._encoded.truncated
            done.negative_truncated = self._encoded.negative_truncated
        done.total.FromNanoseconds(int((time.perf_counter() - arrived) * 1e9))
        done.queued.FromNanoseconds(int((started - arrived) * 1e9))
        return done


@dataclass(kw_only=True)
class _Checkpointed:
    """The last checkpoint of an image; empty before the first."""

    state: bytes = b""


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first of several images' failures; the others are its consequences or repeat it."""
    failure = failures.exceptions[0]
    return _first(failure) if isinstance(failure, BaseExceptionGroup) else failure
