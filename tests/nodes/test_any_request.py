"""A model server answers any message with a result or a typed error, and keeps serving."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latentflow.internal.status import error_from
from latentflow.v1 import images_pb2, stage_pb2, tensors_pb2
from support.stack import Request, Stack

pytestmark = pytest.mark.asyncio(loop_scope="session")
# INTERNAL and UNKNOWN would be defects.
OURS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.UNIMPLEMENTED,
}
floats = st.floats(width=32)
sizes = st.sampled_from([0, 1, 8, 63, 64, 72])
peers = st.builds(stage_pb2.Peer, address=st.sampled_from(["", "127.0.0.1:1", "nonsense"]), model=st.text(max_size=4))
shapes_and_types = {
    "dtype": st.sampled_from(tensors_pb2.Dtype.values()),
    "shape": st.lists(st.integers(-1, 4) | st.integers(-(2**63), 2**63 - 1), max_size=4),
}
inline = st.builds(tensors_pb2.Tensor, inline=st.binary(max_size=64), **shapes_and_types)
handle = st.builds(
    tensors_pb2.Handle,
    owner=st.sampled_from(["", "127.0.0.1:1", "nonsense"]),
    id=st.binary(max_size=16),
    boot_id=st.text(max_size=8),
)
handles = st.builds(tensors_pb2.Tensor, handle=handle, **shapes_and_types)
images = st.builds(
    images_pb2.EncodedImage, data=st.binary(max_size=64), media_type=st.sampled_from(["image/png", "image/jpeg", ""])
)
controls = st.builds(stage_pb2.ControlNetRef, peer=peers, image=images, scale=floats, start=floats, end=floats)
adapters = st.builds(
    stage_pb2.AdapterRef, name=st.text(max_size=8), weight=floats, store=peers, digest=st.text(max_size=8)
)
changes = st.fixed_dictionaries(
    {},
    optional={
        "width": sizes,
        "height": sizes,
        "scale_factor": st.sampled_from([0, 1, 8]),
        "steps": st.sampled_from([0, 1, 2, 2**32 - 1]),
        "guidance_scale": floats,
        "sampler": st.sampled_from(["", "ddim", "lcm", "uni_pc", "__class__", "x" * 1000]),
        "seed": st.integers(0, 2**64 - 1),
        "eta": floats,
        "control_nets": st.lists(controls, max_size=1),
        "adapters": st.lists(adapters, max_size=1),
        "checkpoint": st.binary(max_size=64),
        "checkpoint_interval": st.integers(0, 3),
        "conditioning": st.dictionaries(
            st.sampled_from(["prompt_embeds", "negative_prompt_embeds", "pooled", ""]), inline | handles, max_size=3
        ),
    },
)


async def verdict(call: Any) -> grpc.StatusCode | None:
    """The code of a call's error; None where it has a result."""
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.RpcError as error:
        return error_from(error).code
    return None


@settings(max_examples=60, deadline=None)
@given(change=changes)
async def test_any_denoise_request_ends_in_latents_or_a_typed_error(shapes: Stack, change: dict[str, Any]) -> None:
    request = await shapes.denoise_open(Request(steps=1))
    conditioning = change.pop("conditioning", None)
    if isinstance(conditioning, dict):
        request.ClearField("conditioning")
        for name, tensor in conditioning.items():
            request.conditioning[name].CopyFrom(tensor)
    request.MergeFrom(stage_pb2.DenoiseOpen(**change))
    for name, value in change.items():
        if not isinstance(value, list):
            setattr(request, name, value)
    assert await verdict(shapes.denoising(request)) in OURS | {None}


@settings(max_examples=40, deadline=None)
@given(latents=inline | handles)
async def test_any_decode_request_ends_in_an_image_or_a_typed_error(shapes: Stack, latents: tensors_pb2.Tensor) -> None:
    request = stage_pb2.DecodeRequest(latents=latents)
    assert await verdict(shapes.stage("pixels").Decode(request, timeout=60)) in OURS | {None}


@settings(max_examples=40, deadline=None)
@given(
    prompt=st.text(max_size=200), negative=st.none() | st.text(max_size=20), references=st.lists(adapters, max_size=1)
)
async def test_any_encode_request_ends_in_embeddings_or_a_typed_error(
    shapes: Stack, prompt: str, negative: str | None, references: list[stage_pb2.AdapterRef]
) -> None:
    request = stage_pb2.EncodeRequest(prompt=prompt, negative_prompt=negative, guidance=True, adapters=references)
    assert await verdict(shapes.stage("text").Encode(request, timeout=60)) in OURS | {None}


async def test_the_servers_still_serve_after_arbitrary_requests(shapes: Stack) -> None:
    _, image = await shapes.generate(Request())
    assert image.size == (64, 64)
