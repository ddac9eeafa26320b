"""The ControlNet: at every step of a request, the residuals that the denoiser adds."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from latentflow.errors import InvalidRequestError, UnimplementedError
from latentflow.internal import images, strengths
from latentflow.v1 import control_pb2, stage_pb2

from latentflow_nodes import families
from latentflow_nodes.context import Context
from latentflow_nodes.engine.forward_time import Stopwatch
from latentflow_nodes.engine.load import PassSize
from latentflow_nodes.engine.worker import Worker
from latentflow_nodes.families.base import warm_up_conditioning
from latentflow_nodes.roles.role import Role
from latentflow_nodes.tensors import codec
from latentflow_nodes.tensors.transfer import Sender
from latentflow_nodes.weights import files

_WARM_UP_SIDE = 8


class ControlNet(Role):
    """One ControlNet, shared by all requests that name it."""

    calls = ("Residuals",)

    def __init__(self, context: Context) -> None:
        self._context = context
        source = context.source()
        self._family = families.of_source(source, "ControlNet")
        self.family = self._family.name
        folder = source.part(self._family.parts["ControlNet"][0])
        self.content_digest = files.digest(files.check(folder, variant=source.variant))
        network = self._family.load_control_net(folder, dtype=context.dtype, variant=source.variant)
        self._network = network.to(context.device).eval()
        self._channels = self._family.latent_shape(self._network, height=1, width=1)[1]
        self._stopwatch = Stopwatch(context.device)
        settings = context.settings
        self._worker = Worker(
            threads=settings.threads,
            max_waiting=settings.engine.max_waiting,
            lock=context.compute_lock,
            load=context.load,
        )

    def describe(self, response: control_pb2.DescribeResponse) -> None:
        described = response.control_net
        described.latent_channels = self._channels
        described.conditioning.extend(self._named(self._family.conditioning_shapes(self._network)))
        described.nets.add(content_digest=self.content_digest)

    async def warm_up(self) -> None:
        side = _WARM_UP_SIDE
        pixels = side * self._family.image_scale(self._network)
        conditioning = warm_up_conditioning(self._family.conditioning_shapes(self._network), self._context.device)
        inputs = self._inputs(conditioning, rows=2, width=pixels, height=pixels)
        image = self._on_device(torch.zeros(2, 3, pixels, pixels))
        latents = self._on_device(torch.zeros(2, self._channels, side, side))
        await self._worker.run(
            lambda: self._run(latents, 1.0, inputs, image, scale=1.0), size=PassSize(rows=2, height=side, width=side)
        )

    def close(self) -> None:
        self._worker.close()

    async def residuals(
        self, requests: AsyncIterator[stage_pb2.ResidualsRequest]
    ) -> AsyncIterator[stage_pb2.ResidualsResponse]:
        """Answers a request's steps in their order."""
        inputs: dict[str, Any] | None = None
        rows = 1
        resumed = False
        image = torch.empty(0)
        with self._context.transport.sender() as sender:
            async for request in requests:
                if request.WhichOneof("message") == "open":
                    opening = request.open
                    rows = _rows(opening.half)
                    conditioning = await self._context.peers.conditioning(opening.conditioning, self._context.device)
                    inputs = self._inputs(conditioning, rows=rows, width=opening.width, height=opening.height)
                    image = self._image(opening, rows=rows)
                    yield stage_pb2.ResidualsResponse(opened=True)
                    continue
                if inputs is None:
                    raise InvalidRequestError("The first message of a Residuals stream must be `open`.")
                for response in await self._step(request.step, inputs, image, sender, rows=rows, resumed=resumed):
                    yield response
                resumed = True

    def _inputs(self, conditioning: dict[str, torch.Tensor], *, rows: int, width: int, height: int) -> dict[str, Any]:
        return self._family.control_net_inputs(
            self._network,
            {name: self._on_device(tensor) for name, tensor in conditioning.items()},
            rows=rows,
            width=width,
            height=height,
        )

    async def _step(
        self,
        step: stage_pb2.ResidualsStep,
        inputs: dict[str, Any],
        image: torch.Tensor,
        sender: Sender,
        *,
        rows: int,
        resumed: bool,
    ) -> Iterator[stage_pb2.ResidualsResponse]:
        scale = strengths.control_scale(step.scale, name=self._context.settings.identity)
        latents = self._on_device(codec.from_inline(step.sample))
        if latents.dim() != 4 or latents.shape[0] != rows or latents.shape[1] != self._channels:
            raise InvalidRequestError(
                f"A sample of shape {list(latents.shape)} does not fit this ControlNet; "
                f"[{rows}, {self._channels}, height, width] does."
            )
        bundle, forward_ns = await self._worker.run(
            lambda: self._run(latents, step.timestep, inputs, image, scale=scale),
            size=PassSize(rows=rows, height=latents.shape[2], width=latents.shape[3]),
            resumed=resumed,
        )
        return (
            stage_pb2.ResidualsResponse(step=step.step, chunk=chunk, forward_ns=forward_ns if chunk.last else 0)
            for chunk in sender.pieces(bundle, memory=step.shared_memory)
        )

    def _run(
        self, latents: torch.Tensor, timestep: float, inputs: dict[str, Any], image: torch.Tensor, *, scale: float
    ) -> tuple[dict[str, torch.Tensor], int]:
        self._stopwatch.start()
        residuals = self._family.residuals(
            self._network,
            latents,
            torch.tensor(timestep, device=latents.device),
            image=image,
            scale=scale,
            inputs=inputs,
        )
        self._stopwatch.stop()
        bundle = {f"down.{i}": tensor for i, tensor in enumerate(residuals.down)} | {"mid": residuals.mid}
        return bundle, self._stopwatch.take().nanoseconds()

    def _image(self, opening: stage_pb2.ResidualsOpen, *, rows: int) -> torch.Tensor:
        """[rows, 3, height, width] from 0 to 1, as diffusers' ControlNet pipelines prepare it."""
        picture = images.opened(opening.image, what="The control image")
        if picture.size != (opening.width, opening.height):
            raise InvalidRequestError(
                f"The control image is {picture.width}x{picture.height}, the request {opening.width}x{opening.height}; "
                "resize one to the other."
            )
        try:
            image = picture.convert("RGB")
        except Exception as error:
            # Pillow raises many kinds for damaged files; all of them mean this.
            raise InvalidRequestError(f"The control image cannot be read as {picture.format}: {error}") from None
        processor = VaeImageProcessor(do_convert_rgb=True, do_normalize=False)
        pixels = self._on_device(processor.preprocess(image, height=opening.height, width=opening.width))
        return torch.cat([pixels] * rows)

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._context.device, self._context.dtype)


def _rows(half: stage_pb2.GuidanceHalf) -> int:
    """Rows of the samples of a stream. UnimplementedError for a half that this version does not serve alone."""
    if half == stage_pb2.GUIDANCE_HALF_BOTH:
        return 2
    if half == stage_pb2.GUIDANCE_HALF_POSITIVE:
        return 1
    if half == stage_pb2.GUIDANCE_HALF_NEGATIVE:
        raise UnimplementedError("This version does not compute the negative half alone; open the stream for both.")
    raise InvalidRequestError(f"{half} is not a guidance half; choose one of GuidanceHalf.")
