"""A workflow's model servers in this process, with real gRPC, and requests sent to each stage directly.

Tests of the model servers use it, because their claims do not concern the gateway.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import torch
from latentflow.api.types import Engine
from latentflow.internal import control_names, images
from latentflow.v1 import control_pb2, control_pb2_grpc, stage_pb2, stage_pb2_grpc, tensors_pb2_grpc
from latentflow_nodes.server import Node, serve
from latentflow_nodes.settings import NodeSettings
from latentflow_nodes.tensors.peers import Peers
from latentflow_nodes.tensors.transfer import Transport
from PIL import Image

SECONDS = 120.0


@dataclass(kw_only=True)
class Request:
    """A request of a test."""

    prompt: str = "a large red circle on the left, white background"
    negative_prompt: str | None = None
    seed: int = 7
    steps: int = 4
    guidance_scale: float = 5.0
    sampler: str = ""
    side: int = 64
    controls: list[tuple[str, Image.Image, float]] = field(default_factory=list)
    control_ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    guess_mode: bool = False
    loras: list[tuple[str, float]] = field(default_factory=list)
    lora_async_steps: int = 0

    def control_range(self, name: str) -> tuple[float, float]:
        """The part of the steps in which a ControlNet acts."""
        return self.control_ranges.get(name, (0.0, 1.0))


class Stack:
    """Model servers by name: text, base, pixels, and the ControlNets and LoRA stores of the workflow."""

    def __init__(self, nodes: dict[str, Node], peers: Peers) -> None:
        self.nodes = nodes
        self.peers = peers

    def channel(self, name: str) -> grpc.aio.Channel:
        return self.peers.channel(self.nodes[name].address)

    def stage(self, name: str) -> stage_pb2_grpc.StageStub:
        return stage_pb2_grpc.StageStub(self.channel(name))

    def tensors(self, name: str) -> tensors_pb2_grpc.TensorsStub:
        return tensors_pb2_grpc.TensorsStub(self.channel(name))

    async def describe(self, name: str) -> control_pb2.DescribeResponse:
        stub = control_pb2_grpc.ControlStub(self.channel(name))
        description: control_pb2.DescribeResponse = await stub.Describe(
            control_pb2.DescribeRequest(protocol_version=1), timeout=SECONDS
        )
        return description

    def passes(self, name: str) -> float:
        """Forward passes of a server so far."""
        metrics = self.nodes[name].context.metrics
        role = self.nodes[name].context.settings.role
        return metrics.registry.get_sample_value("latentflow_step_seconds_count", {"model": name, "role": role}) or 0.0

    def peer(self, name: str) -> stage_pb2.Peer:
        return stage_pb2.Peer(address=self.nodes[name].address, model=name)

    async def adapters(
        self, loras: Sequence[tuple[str, float]], component: str, *, async_steps: int = 0
    ) -> list[stage_pb2.AdapterRef]:
        if not loras:
            return []
        known = {a.name: a for a in (await self.describe("styles")).lora_store.adapters}
        return [
            stage_pb2.AdapterRef(
                name=name,
                weight=weight,
                store=self.peer("styles"),
                digest=known[name].digest,
                async_steps=async_steps,
            )
            for name, weight in loras
            if component in known[name].components
        ]

    async def encode(self, request: Request) -> stage_pb2.EncodeResponse:
        message = stage_pb2.EncodeRequest(
            prompt=request.prompt,
            guidance=request.guidance_scale > 1,
            adapters=await self.adapters(request.loras, "text_encoder"),
        )
        if request.negative_prompt is not None:
            message.negative_prompt = request.negative_prompt
        encoded: stage_pb2.EncodeResponse = await self.stage("text").Encode(message, timeout=SECONDS)
        return encoded

    async def denoise_open(self, request: Request) -> stage_pb2.DenoiseOpen:
        vae = (await self.describe("pixels")).vae
        return stage_pb2.DenoiseOpen(
            conditioning=(await self.encode(request)).conditioning,
            width=request.side,
            height=request.side,
            scale_factor=vae.scale_factor,
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            sampler=request.sampler,
            seed=request.seed,
            control_nets=[
                stage_pb2.ControlNetRef(
                    peer=self.peer(control_names.split(name)[0]),
                    net=control_names.split(name)[1],
                    image=images.png(png(image)),
                    scale=scale,
                    start=request.control_range(name)[0],
                    end=request.control_range(name)[1],
                    guess_mode=request.guess_mode,
                )
                for name, image, scale in request.controls
            ],
            adapters=await self.adapters(request.loras, "unet", async_steps=request.lora_async_steps),
        )

    def denoising(self, opening: stage_pb2.DenoiseOpen) -> Any:
        """The call for one image, without later messages."""
        return self.stage("base").Denoise([stage_pb2.DenoiseRequest(open=opening)], timeout=SECONDS)

    async def denoise(self, request: Request) -> stage_pb2.DenoiseResult:
        async for event in self.denoising(await self.denoise_open(request)):
            if event.WhichOneof("event") == "result":
                result: stage_pb2.DenoiseResult = event.result
                return result
        raise AssertionError("Denoise ended without a result")

    async def generate(self, request: Request) -> tuple[torch.Tensor, Image.Image]:
        """The final latents and the image."""
        result = await self.denoise(request)
        latents = await self.peers.fetch(result.latents, name="latents")
        decoded = await self.stage("pixels").Decode(stage_pb2.DecodeRequest(latents=result.latents), timeout=SECONDS)
        return latents, Image.open(io.BytesIO(decoded.image.data))


@contextlib.asynccontextmanager
async def started(
    root: Path,
    uri: str,
    *,
    controls: dict[str, str] | None = None,
    loras: str | None = None,
    denoisers: Sequence[str] = (),
    own: Mapping[str, dict[str, object]] | None = None,
    **settings: object,
) -> AsyncIterator[Stack]:
    """The servers of a workflow over one pack.

    Args:
        denoisers: Further replicas of the denoiser.
        own: Settings by server, which go before those for all.
    """
    parts: dict[str, tuple[str, str | None]] = {
        "text": ("TextEncoder", None),
        "base": ("Denoiser", None),
        "pixels": ("VAE", None),
    }
    parts |= {name: ("ControlNet", subfolder) for name, subfolder in (controls or {}).items()}
    parts |= dict.fromkeys(denoisers, ("Denoiser", None))
    if loras:
        parts["styles"] = ("LoRAStore", loras)
    async with contextlib.AsyncExitStack() as stack:
        nodes = {}
        for name, (role, subfolder) in parts.items():
            shared = {"uri": uri, "subfolder": subfolder, "engine": Engine(threads=1)} | settings
            its = shared | (own or {}).get(name, {})
            node = NodeSettings(role=role, model_root=root, identity=name, **its)  # type: ignore[arg-type]
            nodes[name] = await stack.enter_async_context(serve(node))
        metrics = next(iter(nodes.values())).context.metrics
        peers = await stack.enter_async_context(
            Peers(token=None, tls=None, transport=Transport(memory=None, metrics=metrics), metrics=metrics)
        )
        yield Stack(nodes, peers)


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()
