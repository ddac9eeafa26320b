"""A request resumes on another replica with a bit-identical result, from any step and with any sampler."""

from __future__ import annotations

import grpc
import pytest
import torch
from latentflow.errors import DataLossError
from latentflow.internal.status import error_from
from latentflow.v1 import stage_pb2
from latentflow_nodes.engine.samplers import SAMPLERS
from support.stack import Request, Stack

pytestmark = pytest.mark.asyncio(loop_scope="session")
STEPS = 6


async def checkpoints(shapes: Stack, request: stage_pb2.DenoiseOpen) -> tuple[list[bytes], torch.Tensor]:
    """A checkpoint after every step, and the final latents."""
    request.checkpoint_interval = 1
    states: list[bytes] = []
    async for event in shapes.denoising(request):
        if event.WhichOneof("event") == "result":
            return states, await shapes.peers.fetch(event.result.latents, name="latents")
        if event.progress.HasField("checkpoint"):
            states.append(event.progress.checkpoint.state)
    raise AssertionError("no result")


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
async def test_every_sampler_resumes_from_every_step_bit_for_bit(shapes: Stack, sampler: str) -> None:
    request = await shapes.denoise_open(Request(sampler=sampler, steps=STEPS))
    states, latents = await checkpoints(shapes, request)
    assert len(states) == STEPS - 1
    for state in states:
        request.checkpoint = state
        _, resumed = await checkpoints(shapes, request)
        assert torch.equal(resumed, latents)


async def test_a_checkpoint_of_another_request_is_refused(shapes: Stack) -> None:
    states, _ = await checkpoints(shapes, await shapes.denoise_open(Request(steps=STEPS)))
    other = await shapes.denoise_open(Request(steps=STEPS, seed=8))
    other.checkpoint = states[0]
    with pytest.raises(grpc.RpcError) as caught:
        await checkpoints(shapes, other)
    error = error_from(caught.value)
    assert isinstance(error, DataLossError)
    assert "another request" in error.message


async def test_a_checkpoint_is_small(shapes: Stack) -> None:
    states, _ = await checkpoints(shapes, await shapes.denoise_open(Request(steps=STEPS, sampler="uni_pc")))
    assert max(len(state) for state in states) < 32 * 1024
