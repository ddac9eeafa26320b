"""Transports that stand in for a gateway in tests of programs that use the client.

`Client(transport=MockTransport())` returns plain images of the requested size for every request, and raises the errors
that it is given first; `AsyncClient(transport=AsyncMockTransport())` does the same.
"""

from __future__ import annotations

import colorsys
import io
from collections.abc import AsyncIterator, Iterator

from PIL import Image

from latentflow.errors import LatentflowError
from latentflow.internal import images
from latentflow.transport import Metadata
from latentflow.v1 import generation_pb2


class MockTransport:
    """Responds like a gateway that serves one workflow, "default/mock".

    Args:
        errors: Raised by the first `generate` calls, one by each; all later calls succeed.

    Attributes:
        requests: Every GenerateRequest so far.
    """

    def __init__(self, *, errors: list[LatentflowError] | None = None) -> None:
        self.requests: list[generation_pb2.GenerateRequest] = []
        self._errors = list(errors or [])

    def generate(
        self, request: generation_pb2.GenerateRequest, *, timeout: float | None, metadata: Metadata
    ) -> Iterator[generation_pb2.GenerateResponse]:
        self.requests.append(request)
        if self._errors:
            raise self._errors.pop(0)
        yield from _responses(request)

    def describe(
        self, request: generation_pb2.DescribeWorkflowRequest, *, timeout: float | None, metadata: Metadata
    ) -> generation_pb2.DescribeWorkflowResponse:
        return _description()

    def workflows(self, *, timeout: float | None, metadata: Metadata) -> generation_pb2.ListWorkflowsResponse:
        return generation_pb2.ListWorkflowsResponse(workflows=["default/mock"])

    def close(self) -> None:
        """Nothing to close."""


class AsyncMockTransport:
    """As `MockTransport`, for `AsyncClient`."""

    def __init__(self, *, errors: list[LatentflowError] | None = None) -> None:
        self._mock = MockTransport(errors=errors)

    @property
    def requests(self) -> list[generation_pb2.GenerateRequest]:
        return self._mock.requests

    async def generate(
        self, request: generation_pb2.GenerateRequest, *, timeout: float | None, metadata: Metadata
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        for response in self._mock.generate(request, timeout=timeout, metadata=metadata):
            yield response

    async def describe(
        self, request: generation_pb2.DescribeWorkflowRequest, *, timeout: float | None, metadata: Metadata
    ) -> generation_pb2.DescribeWorkflowResponse:
        return _description()

    async def workflows(self, *, timeout: float | None, metadata: Metadata) -> generation_pb2.ListWorkflowsResponse:
        return self._mock.workflows(timeout=timeout, metadata=metadata)

    async def close(self) -> None:
        """Nothing to close."""


def _responses(request: generation_pb2.GenerateRequest) -> Iterator[generation_pb2.GenerateResponse]:
    width, height, steps = request.width or 64, request.height or 64, request.steps or 2
    yield generation_pb2.GenerateResponse(
        accepted=generation_pb2.Accepted(request_id="mock", seed=request.seed, workflow="default/mock")
    )
    for index in range(request.images or 1):
        for step in range(steps):
            progress = generation_pb2.Progress(image=index, step=step + 1, total=steps)
            yield generation_pb2.GenerateResponse(progress=progress)
        seed = request.seed + index
        # The colour depends on the seed, so that tests can tell images apart.
        red, green, blue = colorsys.hsv_to_rgb((seed * 0.618034) % 1, 0.6, 0.9)
        stream = io.BytesIO()
        Image.new("RGB", (width, height), (int(red * 255), int(green * 255), int(blue * 255))).save(stream, "PNG")
        image = generation_pb2.Image(image=index, content=images.png(stream.getvalue()), seed=seed)
        yield generation_pb2.GenerateResponse(image=image)
    yield generation_pb2.GenerateResponse(
        done=generation_pb2.Done(
            seed=request.seed,
            width=width,
            height=height,
            steps=steps,
            requested_steps=steps,
            guidance_scale=request.guidance_scale,
            sampler=request.sampler,
        )
    )


def _description() -> generation_pb2.DescribeWorkflowResponse:
    return generation_pb2.DescribeWorkflowResponse(
        workflow="default/mock",
        task="TextToImage",
        family="mock",
        ready=True,
        default_width=64,
        default_height=64,
        default_steps=2,
        default_guidance_scale=5.0,
        size_multiple=8,
    )
