"""What the gateway does for its clients, whatever their protocol: it runs requests for images and describes workflows.

The gRPC service and the HTTP API are thin layers over it, so that both have the same admission, limits and metrics.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial

import structlog
from latentflow.api import DiffusionWorkflow, Role, identity
from latentflow.errors import DeadlineError, NotFoundError
from latentflow.internal.calls import Accounting, Call, Outcome, Running
from latentflow.internal.metrics import Instruments
from latentflow.v1 import generation_pb2

from latentflow_gateway import api_keys, planning
from latentflow_gateway.admission import Admission
from latentflow_gateway.execution import Execution
from latentflow_gateway.idempotency import Broadcast, IdempotentRequests
from latentflow_gateway.replicas import Replicas
from latentflow_gateway.settings import GatewaySettings

_log = structlog.get_logger()


class Generation:
    """Runs requests over the replicas of a directory, and describes its workflows."""

    def __init__(self, *, settings: GatewaySettings, replicas: Replicas, metrics: Instruments) -> None:
        self._settings = settings
        self._replicas = replicas
        self._metrics = metrics
        self._admission = Admission(max_running=settings.max_running, max_queued=settings.max_queued, metrics=metrics)
        self._requests = IdempotentRequests()
        self.running = Running()
        self._releasing: set[asyncio.Task[None]] = set()

    @property
    def workflows(self) -> tuple[DiffusionWorkflow, ...]:
        """The workflows that the gateway serves."""
        return self._replicas.directory.workflows

    def accounting(self, request: generation_pb2.GenerateRequest) -> Accounting:
        """What the gateway records of the call that carries a request."""
        return Accounting(running=self.running, ended=partial(self._ended, self._name(request)))

    def describe(self, name: str) -> generation_pb2.DescribeWorkflowResponse:
        """The workflow of a name. NotFoundError lists those that are served."""
        return self._described(planning.find(self.workflows, name))

    async def released(self) -> None:
        """Returns when the tensors of ended requests have been released."""
        await asyncio.gather(*self._releasing)

    async def events(
        self, call: Call, request: generation_pb2.GenerateRequest
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        """The events of a request, which may have started with an earlier call with the same idempotency key.

        LatentflowError where the request is refused or fails. To leave early cancels it.
        """
        workflow = planning.find(self.workflows, request.workflow)
        longest = asyncio.get_running_loop().time() + self._settings.request_seconds
        late = (
            f"The request was not finished within {self._settings.request_seconds:g} s, the longest time that this gateway "
            "allows (--request-seconds). Use fewer steps or a smaller image, or raise the limit; if requests are queued, "
            "give the models more replicas."
            if longest < call.deadline
            else "The request was not finished before the deadline that its client set; use a longer timeout."
        )
        call = replace(call, deadline=min(call.deadline, longest))

        async def work(broadcast: Broadcast) -> None:
            try:
                await self._run(call, workflow, request, broadcast)
            except DeadlineError:
                raise DeadlineError(late) from None

        async for event in self._requests.submit(request, work, client=api_keys.caller()).listen():
            yield event

    async def _run(
        self,
        call: Call,
        workflow: DiffusionWorkflow,
        request: generation_pb2.GenerateRequest,
        broadcast: Broadcast,
    ) -> None:
        """One request, from planning to its last event. The work of a `Broadcast`."""
        ready_seconds = min(self._settings.ready_seconds, max(0.0, call.deadline - asyncio.get_running_loop().time()))
        with self._admission.admit(workflow.full_name):
            plan = await self._planned(workflow, request, seed=secrets.randbits(32), seconds=ready_seconds)
            accepted = generation_pb2.Accepted(
                request_id=call.request_id,
                queue_position=self._admission.queued,
                seed=plan.seed,
                workflow=plan.workflow,
            )
            broadcast.emit(generation_pb2.GenerateResponse(accepted=accepted))
            _log.info("request accepted", workflow=plan.workflow, images=plan.images, steps=plan.steps)
            # All models that are not ready start at the same time, before the request takes a running slot.
            await self._replicas.wait_ready(planning.needed(workflow, request).values(), seconds=ready_seconds)
            async with self._admission.slot(plan.workflow):
                # The workflow's binding to models may have changed while the request was queued.
                current = planning.find(self.workflows, plan.workflow)
                if current is not workflow:
                    plan = await self._planned(current, request, seed=plan.seed, seconds=ready_seconds)
                await self._execute(call, plan, broadcast)

    async def _execute(self, call: Call, plan: planning.Plan, broadcast: Broadcast) -> None:
        execution = Execution(
            plan=plan,
            request_id=call.request_id,
            trace=call.trace,
            deadline=call.deadline,
            emit=broadcast.emit,
            replicas=self._replicas,
            token=self._settings.token,
            metrics=self._metrics,
            checkpoint_interval=self._settings.checkpoint_interval,
            ready_seconds=self._settings.ready_seconds,
        )
        try:
            await execution.run(arrived=call.arrived)
        finally:
            releasing = asyncio.create_task(execution.release())
            self._releasing.add(releasing)
            releasing.add_done_callback(self._releasing.discard)

    async def _planned(
        self, workflow: DiffusionWorkflow, request: generation_pb2.GenerateRequest, *, seed: int, seconds: float
    ) -> planning.Plan:
        """The plan of a request, which needs the description of each of its models; waits for those.

        Args:
            seed: For a request without a seed.
        """
        needed, known = planning.needed(workflow, request), self._replicas.descriptions
        await self._replicas.wait_ready([model for model in needed.values() if model not in known], seconds=seconds)
        return planning.plan(
            workflow=workflow,
            request=request,
            descriptions=self._replicas.descriptions,
            limits=self._settings.limits,
            seed=seed,
        )

    def _name(self, request: generation_pb2.GenerateRequest) -> str:
        """The request's workflow for metrics and logs; "?" for any that does not exist, so that clients create no series."""
        try:
            return planning.find(self.workflows, request.workflow).full_name
        except NotFoundError:
            return "?"

    def _ended(self, workflow: str, outcome: Outcome) -> None:
        code, reason = outcome.code.name, outcome.reason
        self._metrics.of("latentflow_gateway_requests_total", workflow=workflow, code=code).inc()
        self._metrics.of("latentflow_gateway_request_seconds", workflow=workflow).observe(outcome.seconds)
        if reason:
            self._metrics.of("latentflow_gateway_errors_total", workflow=workflow, reason=reason).inc()
        _log.info("request ended", workflow=workflow, code=code, reason=reason, seconds=round(outcome.seconds, 3))

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
            description = self._replicas.descriptions.get(key)
            entry = response.models.add(
                name=model.name, role=model.role.value, model=key, ready_replicas=len(self._replicas.ready(key))
            )
            if description is None:
                continue
            entry.content_digest = description.content_digest
            if model.role is Role.DENOISER:
                response.family = description.family
                own = defaults.sampler or description.denoiser.samplers[0]
                response.samplers.extend([own, *(name for name in description.denoiser.samplers if name != own)])
            elif model.role is Role.VAE:
                response.size_multiple = description.vae.scale_factor
            elif model.role is Role.TEXT_ENCODER:
                response.max_prompt_tokens = min(t.max_tokens for t in description.text_encoder.tokenizers)
            elif model.role is Role.CONTROL_NET:
                entry.nets.extend(net.name for net in description.control_net.nets if net.name and not net.problem)
            elif model.role is Role.LORA_STORE:
                for adapter in description.lora_store.adapters:
                    if adapter.problem:
                        entry.unusable_adapters.add(name=adapter.name, problem=adapter.problem)
                    else:
                        entry.adapters.append(adapter.name)
        return response
