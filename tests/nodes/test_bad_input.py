"""What a model server refuses, before its model runs, with which code and words."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from latentflow.errors import LatentflowError, OwnerLostError, UnimplementedError
from latentflow.internal.metrics import NODE, Instruments
from latentflow.internal.status import error_from
from latentflow.reasons import Reason
from latentflow.v1 import control_pb2, control_pb2_grpc, stage_pb2, tensors_pb2, tensors_pb2_grpc
from latentflow_nodes.server import serve
from latentflow_nodes.settings import NodeSettings
from latentflow_nodes.tensors import codec, peers
from latentflow_nodes.tensors.peers import Peers
from latentflow_nodes.tensors.transfer import Transport
from safetensors.torch import save_file
from support.packs import MODELS, SHAPES
from support.stack import Request, Stack, started

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def refused(stack: Stack, request: stage_pb2.DenoiseOpen) -> LatentflowError:
    with pytest.raises(grpc.RpcError) as caught:
        async for _ in stack.denoising(request):
            pass
    return error_from(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "steps must be from 1 to 1000"),
        ("steps", 1001, "steps must be from 1 to 1000"),
        ("width", 0, "not a multiple of the VAE's factor"),
        ("width", 63, "not a multiple of the VAE's factor"),
        ("guidance_scale", float("nan"), "finite numbers"),
        ("sampler", "magic", "Sampler 'magic' is not known; use one of"),
    ],
)
async def test_an_impossible_denoise_request_is_refused(
    shapes: Stack, field: str, value: float | str, message: str
) -> None:
    request = await shapes.denoise_open(Request())
    setattr(request, field, value)
    error = await refused(shapes, request)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert message in error.message


@pytest.mark.parametrize(
    ("opening", "message"),
    [
        ({"adapters": [{"name": "neon", "weight": 101}]}, "The weight of the LoRA 'neon' must be from -100 to 100"),
        (
            {"adapters": [{"name": "neon", "weight": 0}]},
            "The weight of the LoRA 'neon' is 0, which has no effect",
        ),
        (
            {"control_nets": [{"peer": {"model": "edges"}, "scale": -1e9}]},
            "The scale of the ControlNet 'edges' must be from",
        ),
        ({"sampler": "lcm", "steps": 999}, "The sampler 'lcm' cannot run 999 steps"),
    ],
)
async def test_values_outside_their_bounds_are_refused_before_anything_is_fetched(
    shapes: Stack, opening: dict[str, Any], message: str
) -> None:
    request = stage_pb2.DenoiseOpen(width=64, height=64, scale_factor=8, **({"steps": 4} | opening))
    error = await refused(shapes, request)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert message in error.message


async def test_a_text_encoder_refuses_a_weight_outside_its_bounds(shapes: Stack) -> None:
    request = stage_pb2.EncodeRequest(prompt="a", adapters=[{"name": "neon", "weight": 1e9}])
    with pytest.raises(grpc.RpcError) as caught:
        await shapes.stage("text").Encode(request, timeout=60)
    assert "The weight of the LoRA 'neon' must be from -100 to 100" in error_from(caught.value).message


async def test_values_that_overflow_fail_their_request_alone(shapes: Stack) -> None:
    fine, over = Request(steps=8), Request(steps=8, guidance_scale=1e38, loras=[("neon", 0.5)])
    expected, _ = await shapes.generate(fine)
    (latents, _), error = await asyncio.gather(shapes.generate(fine), _overflow(shapes, over))
    # They share passes, in which the last bits may differ.
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)
    assert error.reason == Reason.NOT_FINITE
    assert error.code is grpc.StatusCode.FAILED_PRECONDITION
    assert "not finite after 8 steps in float32 with the LoRAs 'neon' with the weight 0.5" in error.message


async def _overflow(stack: Stack, request: Request) -> LatentflowError:
    return await refused(stack, await stack.denoise_open(request))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
async def test_an_image_that_is_not_finite_is_refused(shapes: Stack, value: float) -> None:
    latents = codec.inline(torch.full((1, 4, 8, 8), value))
    with pytest.raises(grpc.RpcError) as caught:
        await shapes.stage("pixels").Decode(stage_pb2.DecodeRequest(latents=latents), timeout=60)
    error = error_from(caught.value)
    assert error.reason == Reason.NOT_FINITE
    assert "The image of the VAE is not finite in float32" in error.message


async def test_a_model_whose_scheduler_needs_several_steps_is_served(tmp_path: Path) -> None:
    shutil.copytree(SHAPES, tmp_path / "m")
    config = {"_class_name": "PNDMScheduler", "num_train_timesteps": 1000, "skip_prk_steps": False}
    (tmp_path / "m/scheduler/scheduler_config.json").write_text(json.dumps(config))
    async with started(tmp_path, "m") as stack:
        latents, _ = await stack.generate(Request(steps=4))
        assert torch.isfinite(latents).all()
        error = await refused(stack, await stack.denoise_open(Request(steps=3)))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "The sampler 'PNDMScheduler' cannot run 3 steps" in error.message


@pytest.mark.parametrize("name", ["prompt_embeds", "negative_prompt_embeds"])
async def test_lost_embeddings_name_their_owner(shapes: Stack, name: str) -> None:
    request = await shapes.denoise_open(Request())
    handle = request.conditioning[name].handle
    await shapes.tensors("text").Release(tensors_pb2.ReleaseRequest(boot_id=handle.boot_id, ids=[handle.id]))
    error = await refused(shapes, request)
    assert isinstance(error, OwnerLostError)
    assert error.details == {"owner": shapes.nodes["text"].address, "tensor": name}


class Owner(tensors_pb2_grpc.TensorsServicer):
    """Answers every Fetch with the same bundles, or never.

    Attributes:
        requests: The ids of each call.
    """

    def __init__(self, *bundles: dict[str, torch.Tensor], answers: bool = True) -> None:
        self._bundles = bundles
        self._answers = answers
        self.requests: list[list[bytes]] = []

    async def Fetch(self, request: Any, context: Any) -> AsyncIterator[tensors_pb2.FetchResponse]:  # noqa: N802
        self.requests.append(list(request.ids))
        if not self._answers:
            await asyncio.Event().wait()
        for bundle in self._bundles:
            for chunk in codec.chunks(bundle):
                yield tensors_pb2.FetchResponse(chunk=chunk)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        server = grpc.aio.server()
        tensors_pb2_grpc.add_TensorsServicer_to_server(self, server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        try:
            yield address
        finally:
            await server.stop(None)


def held(owner: str, name: bytes) -> tensors_pb2.Tensor:
    return tensors_pb2.Tensor(handle=tensors_pb2.Handle(owner=owner, id=name))


async def test_the_tensors_of_one_owner_are_fetched_by_one_call(shapes: Stack) -> None:
    # The first bundle takes several pieces.
    first, second = torch.rand(600_000), torch.rand(3)
    owner = Owner({"tensor": first}, {"tensor": second})
    async with owner.serving() as address:
        wanted = {"a": held(address, b"1"), "here": codec.inline(torch.ones(2)), "b": held(address, b"2")}
        pulled = await shapes.peers.conditioning(wanted, torch.device("cpu"))
    assert owner.requests == [[b"1", b"2"]]
    assert list(pulled) == ["a", "here", "b"]
    assert torch.equal(pulled["a"], first)
    assert torch.equal(pulled["here"], torch.ones(2))
    assert torch.equal(pulled["b"], second)


@pytest.mark.parametrize(
    "bundles",
    [[{"tensor": torch.ones(2)}], [{"tensor": torch.ones(2)}, {}], [{"tensor": torch.ones(2)}, {"x": torch.ones(2)}]],
)
async def test_an_owner_that_sends_too_few_tensors_has_lost_the_first_missing_one(
    shapes: Stack, bundles: list[dict[str, torch.Tensor]]
) -> None:
    async with Owner(*bundles).serving() as address:
        with pytest.raises(OwnerLostError) as caught:
            await shapes.peers.conditioning({"a": held(address, b"1"), "b": held(address, b"2")}, torch.device("cpu"))
    assert caught.value.details == {"owner": address, "tensor": "b"}


async def test_tensors_beyond_those_requested_are_ignored(shapes: Stack) -> None:
    async with Owner({"tensor": torch.ones(2)}, {"tensor": torch.zeros(2)}).serving() as address:
        assert torch.equal(await shapes.peers.fetch(held(address, b"1"), name="latents"), torch.ones(2))


async def test_a_tensor_whose_owner_does_not_answer_is_lost(shapes: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_FETCH_SECONDS", 0.2)
    async with Owner(answers=False).serving() as address:
        with pytest.raises(OwnerLostError) as caught:
            await shapes.peers.fetch(held(address, b"1"), name="latents")
    assert caught.value.details == {"owner": address, "tensor": "latents"}


async def test_an_adapter_for_another_base_model_is_refused_before_the_first_step(
    shapes: Stack, tmp_path: Path
) -> None:
    folder = tmp_path / "pack/loras"
    folder.mkdir(parents=True)
    key = "unet.nowhere.to_q.lora"
    save_file(
        {f"{key}_A.weight": torch.zeros(2, 8), f"{key}_B.weight": torch.zeros(8, 2)}, folder / "alien.safetensors"
    )
    settings = NodeSettings(role="LoRAStore", uri="pack", subfolder="loras", model_root=tmp_path, identity="s")
    async with serve(settings) as store:
        request = await shapes.denoise_open(Request())
        peer = stage_pb2.Peer(address=store.address, model="s")
        request.adapters.append(stage_pb2.AdapterRef(name="alien", weight=1, store=peer))
        error = await refused(shapes, request)
    assert error.reason == Reason.ADAPTER_MISMATCH
    assert "trained for another base model" in error.message


async def test_the_refusal_of_an_unknown_adapter_lists_the_known_ones(shapes: Stack) -> None:
    request = await shapes.denoise_open(Request())
    request.adapters.append(stage_pb2.AdapterRef(name="none", weight=1, store=shapes.peer("styles")))
    error = await refused(shapes, request)
    assert error.reason == Reason.UNKNOWN_ADAPTER
    assert "it has" in error.message


async def test_a_long_prompt_is_truncated_and_reported_or_refused_if_strict(shapes: Stack) -> None:
    long = "a red circle " * 30
    answer = await shapes.encode(Request(prompt=long))
    assert "red circle" in answer.truncated
    with pytest.raises(grpc.RpcError) as caught:
        await shapes.stage("text").Encode(stage_pb2.EncodeRequest(prompt=long, strict_prompt=True), timeout=60)
    assert error_from(caught.value).reason == Reason.PROMPT_TOO_LONG


async def test_a_server_refuses_the_calls_of_other_roles(shapes: Stack) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await shapes.stage("pixels").Encode(stage_pb2.EncodeRequest(prompt="x"), timeout=60)
    error = error_from(caught.value)
    assert isinstance(error, UnimplementedError)
    assert "This server is a VAE" in error.message


async def test_a_protocol_two_versions_away_is_refused(shapes: Stack) -> None:
    stub = control_pb2_grpc.ControlStub(shapes.channel("base"))
    with pytest.raises(grpc.RpcError) as caught:
        await stub.Describe(control_pb2.DescribeRequest(protocol_version=3), timeout=60)
    assert error_from(caught.value).reason == Reason.PROTOCOL_MISMATCH


async def test_callers_without_the_token_are_refused() -> None:
    async with started(MODELS, "shapes", token="secret") as stack:
        with pytest.raises(grpc.RpcError) as caught:
            await stack.encode(Request())
        assert error_from(caught.value).code is grpc.StatusCode.UNAUTHENTICATED
        metrics = Instruments(NODE, model="m", role="r")
        transport = Transport(memory=None, metrics=metrics)
        async with Peers(token="secret", tls=None, transport=transport, metrics=metrics) as peers:
            stub = control_pb2_grpc.ControlStub(peers.channel(stack.nodes["text"].address))
            said = await stub.Describe(
                control_pb2.DescribeRequest(protocol_version=1), timeout=60, metadata=peers.metadata()
            )
    assert said.role == control_pb2.ROLE_TEXT_ENCODER


@pytest.mark.parametrize(
    ("role", "subfolder", "uri", "message"),
    [
        ("VAE", None, "absent", "There is no weights folder"),
        ("VAE", None, "../shapes", "leaves the model root"),
        ("VAE", None, "oci://registry/x", "cannot read oci:// sources"),
        ("LoRAStore", "vae", "shapes", None),
        ("ControlNet", "loras", "shapes", "config.json is missing"),
    ],
)
async def test_a_source_that_cannot_be_served_is_named(
    role: str, subfolder: str | None, uri: str, message: str | None
) -> None:
    settings = NodeSettings(role=role, uri=uri, subfolder=subfolder, model_root=SHAPES.parent, identity="x")  # type: ignore[arg-type]
    if message is None:
        # A file that is no adapter is listed with its problem; the store itself serves.
        async with serve(settings) as node:
            assert node.address
        return
    with pytest.raises(LatentflowError) as caught:
        async with serve(settings):
            pass
    assert message in caught.value.message
