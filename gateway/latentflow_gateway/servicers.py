"""The public gRPC service: passes each call to `Generation`."""

from __future__ import annotations

from collections.abc import AsyncIterator

from latentflow.internal.calls import Call, Context, answered, served
from latentflow.v1 import generation_pb2, generation_pb2_grpc

from latentflow_gateway.generation import Generation


class GenerationServicer(generation_pb2_grpc.GenerationServicer):
    """The service `latentflow.v1.Generation`."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        # At once, so that a client distinguishes a request that is queued here from one that has not arrived.
        await context.send_initial_metadata(())
        call = Call.of("Generate", context).identified()
        events = self._generation.events(call, request)
        async for response in served(call, events, context, self._generation.accounting(request)):
            yield response

    async def DescribeWorkflow(
        self, request: generation_pb2.DescribeWorkflowRequest, context: Context
    ) -> generation_pb2.DescribeWorkflowResponse:
        async def description() -> generation_pb2.DescribeWorkflowResponse:
            return self._generation.describe(request.workflow)

        described: generation_pb2.DescribeWorkflowResponse = await answered(
            Call.of("DescribeWorkflow", context), description, context
        )
        return described

    async def ListWorkflows(
        self, request: generation_pb2.ListWorkflowsRequest, context: Context
    ) -> generation_pb2.ListWorkflowsResponse:
        names = [workflow.full_name for workflow in self._generation.workflows]
        return generation_pb2.ListWorkflowsResponse(workflows=names)
