"""The public service: admits, plans, executes, streams; describes workflows."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import structlog
from latentflow.api import DiffusionWorkflow, Role, identity
from latentflow.errors import CancelledError, LatentflowError, UnavailableError
from latentflow.internal import rpc, status
from latentflow.internal.metrics import Instruments
from latentflow.v1 import generation_pb2, generation_pb2_grpc

from latentflow_gateway import api_keys, planning
from latentflow_gateway.admission import Admission
from latentflow_gateway.execution import Execution
from latentflow_gateway.joins import Broadcast, Joins
from latentflow_gateway.replicas import Replicas
from latentflow_gateway.settings import GatewaySettings

_log = structlog.get_logger()


class GenerationServicer(generation_pb2_grpc.GenerationServicer):
    """Serves Generation over the replicas."""

    def __init__(self, *, settings: GatewaySettings, replicas: Replicas, metrics: Instruments) -> None:
        self._settings = settings
        self._replicas = replicas
        self._metrics = metrics
        self._admission = Admission(max_running=settings.max_running, max_queued=settings.max_queued, metrics=metrics)
        self._joins = Joins()
        self.draining = False
        self._releasing: set[asyncio.Task[None]] = set()

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        arrived = time.perf_counter()
        sent: dict[str, Any] = dict(context.invocation_metadata() or ())
        trace = (rpc.Trace.parse(sent.get(rpc.TRACEPARENT)) or rpc.Trace.new()).child()
        request_id = secrets.token_hex(8)
        structlog.contextvars.bind_contextvars(request_id=request_id, trace_id=trace.trace_id)
        workflow, code, reason = request.workflow or "?", "OK", ""
        failure: LatentflowError | None = None
        try:
            if self.draining:
                raise UnavailableError("This gateway stops; try another.", reason="DRAINING", retry_after=0.2)
            found = planning.find(self._replicas.directory.workflows, request.workflow)
            workflow = found.full_name
            remaining = context.time_remaining()
            longest = self._settings.request_seconds
            deadline = asyncio.get_running_loop().time() + (longest if remaining is None else min(remaining, longest))

            async def work(broadcast: Broadcast) -> None:
                await self._run(
                    found, request, broadcast, request_id=request_id, trace=trace, deadline=deadline, arrived=arrived
                )

            async for event in self._joins.join(request, work, client=api_keys.caller()).listen():
                yield event
        except (asyncio.CancelledError, GeneratorExit):
            code, reason = CancelledError.code.name, CancelledError.default_reason
            raise
        except Exception as error:
            failure = status.as_error(error, where="Generate")
            code, reason = failure.code.name, failure.reason
            if not isinstance(error, LatentflowError):
                _log.exception("request failed unexpectedly")
        finally:
            self._count(workflow, code, reason, time.perf_counter() - arrived)
        if failure is not None:
            await status.abort_with(context, failure)

    async def DescribeWorkflow(
        self, request: generation_pb2.DescribeWorkflowRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> generation_pb2.DescribeWorkflowResponse:
        try:
            return self._described(planning.find(self._replicas.directory.workflows, request.workflow))
        except LatentflowError as error:
            await status.abort_with(context, error)

    async def ListWorkflows(
        self, request: generation_pb2.ListWorkflowsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> generation_pb2.ListWorkflowsResponse:
        names = [workflow.full_name for workflow in self._replicas.directory.workflows]
        return generation_pb2.ListWorkflowsResponse(workflows=names)

    async def released(self) -> None:
        """Returns when what ended requests held has been given back."""
        await asyncio.gather(*self._releasing)

    async def _run(
        self,
        workflow: DiffusionWorkflow,
        request: generation_pb2.GenerateRequest,
        broadcast: Broadcast,
        *,
        request_id: str,
        trace: rpc.Trace,
        deadline: float,
        arrived: float,
    ) -> None:
        """One request, from planning to its last event. The work of a `Broadcast`."""
        ready_seconds = min(self._settings.ready_seconds, max(0.0, deadline - asyncio.get_running_loop().time()))
        with self._admission.present(workflow.full_name):
            plan = await self._planned(workflow, request, seed=secrets.randbits(32), seconds=ready_seconds)
            accepted = generation_pb2.Accepted(
                request_id=request_id, queue_position=self._admission.queued, seed=plan.seed, workflow=plan.workflow
            )
            broadcast.emit(generation_pb2.GenerateResponse(accepted=accepted))
            _log.info("accepted", workflow=plan.workflow, images=plan.images, steps=plan.steps)
            # Those that sleep wake at the same time, and before the request takes a place that others could work at.
            await self._replicas.awake(planning.needed(workflow, request).values(), seconds=ready_seconds)
            async with self._admission.slot(plan.workflow):
                # Which models serve the workflow may have changed while the request waited.
                present = planning.find(self._replicas.directory.workflows, plan.workflow)
                if present is not workflow:
                    plan = await self._planned(present, request, seed=plan.seed, seconds=ready_seconds)
                await self._execute(
                    plan, broadcast, request_id=request_id, trace=trace, deadline=deadline, arrived=arrived
                )

    async def _execute(
        self,
        plan: planning.Plan,
        broadcast: Broadcast,
        *,
        request_id: str,
        trace: rpc.Trace,
        deadline: float,
        arrived: float,
    ) -> None:
        execution = Execution(
            plan=plan,
            request_id=request_id,
            trace=trace,
            deadline=deadline,
            emit=broadcast.emit,
            replicas=self._replicas,
            token=self._settings.token,
            metrics=self._metrics,
            checkpoint_interval=self._settings.checkpoint_interval,
            ready_seconds=self._settings.ready_seconds,
        )
        try:
            await execution.run(arrived=arrived)
        finally:
            releasing = asyncio.create_task(execution.release())
            self._releasing.add(releasing)
            releasing.add_done_callback(self._releasing.discard)

    async def _planned(
        self, workflow: DiffusionWorkflow, request: generation_pb2.GenerateRequest, *, seed: int, seconds: float
    ) -> planning.Plan:
        """The plan, once every model that it needs has said what it is.

        Args:
            seed: For a request that names none.
        """
        needed, known = planning.needed(workflow, request), self._replicas.descriptions
        await self._replicas.awake([model for model in needed.values() if model not in known], seconds=seconds)
        return planning.plan(
            workflow=workflow,
            request=request,
            descriptions=self._replicas.descriptions,
            limits=self._settings.limits,
            seed=seed,
        )

    def _count(self, workflow: str, code: str, reason: str, seconds: float) -> None:
        self._metrics.of("latentflow_gateway_requests_total", workflow=workflow, code=code).inc()
        self._metrics.of("latentflow_gateway_request_seconds", workflow=workflow).observe(seconds)
        if reason:
            self._metrics.of("latentflow_gateway_errors_total", workflow=workflow, reason=reason).inc()
        _log.info("ended", workflow=workflow, code=code, reason=reason, seconds=round(seconds, 3))

    def _described(self, workflow: DiffusionWorkflow) -> generation_pb2.DescribeWorkflowResponse:
        limits, defaults = self._settings.limits, workflow.spec.defaults
        response = generation_pb2.DescribeWorkflowResponse(
            workflow=workflow.full_name,
            task=workflow.spec.task,
            default_width=defaults.width,
            default_height=defaults.height,
            default_steps=defaults.steps,
            default_guidance_scale=defaults.guidance_scale,
            max_pixels=limits.max_pixels,
            max_steps=limits.max_steps,
            max_images=limits.max_images,
            max_control_image_bytes=limits.max_control_image_bytes,
            ready=all(self._replicas.ready(identity(model)) for model in workflow.spec.models),
        )
        for model in workflow.spec.models:
            key = identity(model)
            said = self._replicas.descriptions.get(key)
            entry = response.models.add(
                name=model.name, role=model.role.value, model=key, ready_replicas=len(self._replicas.ready(key))
            )
            if said is None:
                continue
            entry.content_digest = said.content_digest
            if model.role is Role.DENOISER:
                response.family = said.family
                own = defaults.sampler or said.denoiser.samplers[0]
                response.samplers.extend([own, *(name for name in said.denoiser.samplers if name != own)])
            elif model.role is Role.VAE:
                response.size_multiple = said.vae.scale_factor
            elif model.role is Role.TEXT_ENCODER:
                response.max_prompt_tokens = min(t.max_tokens for t in said.text_encoder.tokenizers)
            elif model.role is Role.LORA_STORE:
                entry.adapters.extend(adapter.name for adapter in said.lora_store.adapters)
        return response
