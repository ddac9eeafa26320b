"""The ControlNet: at every step of a request, the residuals that the denoiser adds."""

from __future__ import annotations

from collections.abc import AsyncIterator, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from latentflow.errors import InvalidRequestError
from latentflow.internal import images, strengths
from latentflow.internal.guidance import Guidance
from latentflow.v1 import control_pb2, stage_pb2, tensors_pb2

from latentflow_nodes.context import Context
from latentflow_nodes.engine.forward_time import Stopwatch
from latentflow_nodes.engine.load import PassSize
from latentflow_nodes.engine.memory import free_bytes
from latentflow_nodes.engine.worker import Worker
from latentflow_nodes.families.base import of_half, stack, warm_up_conditioning
from latentflow_nodes.roles import nets
from latentflow_nodes.roles.conditioning import check_conditioning
from latentflow_nodes.roles.network_role import NetworkRole
from latentflow_nodes.roles.resident_nets import ResidentNets
from latentflow_nodes.tensors import codec

_WARM_UP_SIDE = 8


@dataclass(kw_only=True)
class _ControlImage:
    """The control image of one request.

    Attributes:
        pixels: [1, 3, height, width], from 0 to 1.
        embedded: As Family.embed_control_image returns it, from the first step on.
    """

    pixels: torch.Tensor
    embedded: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class _Stream:
    """What the steps of one request have in common.

    Attributes:
        net: Name of the net.
        rows: Of the latents.
        inputs: As Family.residuals takes them, with as many rows.
        guess_mode: As ControlNetRef.guess_mode.
        group: Equal for streams whose steps can share a forward pass.
    """

    net: str
    rows: int
    inputs: dict[str, Any]
    image: _ControlImage
    guess_mode: bool
    group: Hashable


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A step of one request.

    Attributes:
        network: The net of its stream, on the device.
        latents: [rows, channels, height, width].
        scale: Conditioning scale.
    """

    stream: _Stream
    network: torch.nn.Module
    latents: torch.Tensor
    timestep: float
    scale: float

    @property
    def size(self) -> PassSize:
        rows, _, height, width = self.latents.shape
        return PassSize(rows=rows, height=height, width=width)


class ControlNet(NetworkRole):
    """One ControlNet, or several nets of one architecture, shared by all requests that name it."""

    calls = ("Residuals",)

    def __init__(self, context: Context) -> None:
        self._context = context
        device, settings = context.device, context.settings
        first = nets.of_source(context)
        network = first.read()
        self._nets = nets.with_further(context, first, network)
        self._family = first.family
        self.family = self._family.name
        self.content_digest = self._nets.digest
        self._channels = self._family.latent_shape(network, height=1, width=1)[1]
        self._image_scale = self._family.image_scale(network)
        self._conditioning_shapes = self._family.conditioning_shapes(network)
        size = nets.size(network)
        capacity = nets.capacity(size=size, free=free_bytes(device), count=len(self._nets.served))
        self.weights_bytes = size * capacity
        self._resident = ResidentNets(
            {name: net.read_again for name, net in self._nets.served.items()},
            capacity=capacity,
            first=(first.name, network.to(device)),
            device=device,
            load=context.load,
            metrics=context.metrics,
        )
        self._stopwatch = Stopwatch(device)
        self._worker: Worker[_Step, tuple[dict[str, torch.Tensor], int]] = Worker(
            self._run,
            threads=settings.threads,
            max_running=settings.engine.max_running,
            max_waiting=settings.engine.max_waiting,
            lock=context.compute_lock,
            load=context.load,
        )

    def describe(self, response: control_pb2.DescribeResponse) -> None:
        described = response.control_net
        described.latent_channels = self._channels
        described.conditioning.extend(self._named(self._conditioning_shapes))
        for net in self._nets.served.values():
            described.nets.add(name=net.name, content_digest=net.digest)
        for name, problem in self._nets.problems.items():
            described.nets.add(name=name, problem=problem)

    async def warm_up(self) -> None:
        await self._resident.fill()
        pixels = _WARM_UP_SIDE * self._image_scale
        conditioning = warm_up_conditioning(self._conditioning_shapes, self._context.device)
        async with self._resident.use("") as network:
            stream = _Stream(
                net="",
                rows=2,
                inputs=self._inputs(network, conditioning, rows=2, width=pixels, height=pixels),
                image=_ControlImage(pixels=self._on_device(torch.zeros(1, 3, pixels, pixels))),
                guess_mode=False,
                group=None,
            )
            latents = self._on_device(torch.zeros(2, self._channels, _WARM_UP_SIDE, _WARM_UP_SIDE))
            step = _Step(stream=stream, network=network, latents=latents, timestep=1.0, scale=1.0)
            await self._worker.run(step, group=None, size=step.size)

    def start(self) -> None:
        self._worker.start()

    async def release(self) -> None:
        self._resident.clear()

    async def restore(self) -> None:
        """The warm-up brings the nets back."""

    def close(self) -> None:
        self._worker.close()

    async def residuals(
        self, requests: AsyncIterator[stage_pb2.ResidualsRequest]
    ) -> AsyncIterator[stage_pb2.ResidualsResponse]:
        """Answers a request's steps in their order."""
        stream: _Stream | None = None
        resumed = False
        with self._context.transport.sender() as sender:
            async for request in requests:
                if request.WhichOneof("message") == "open":
                    stream = await self._stream(request.open)
                    yield stage_pb2.ResidualsResponse(opened=True)
                    continue
                if stream is None:
                    raise InvalidRequestError("The first message of a Residuals stream must be `open`.")
                bundle, forward_ns = await self._residuals(request.step, stream, resumed=resumed)
                for chunk in sender.pieces(bundle, memory=request.step.shared_memory):
                    yield stage_pb2.ResidualsResponse(
                        step=request.step.step, chunk=chunk, forward_ns=forward_ns if chunk.last else 0
                    )
                resumed = True

    async def _residuals(
        self, request: stage_pb2.ResidualsStep, stream: _Stream, *, resumed: bool
    ) -> tuple[dict[str, torch.Tensor], int]:
        """The residuals of a step. Nothing refers to the net afterwards, so that it can leave the device."""
        async with self._resident.use(stream.net) as network:
            step = self._step(request, stream, network)
            return await self._worker.run(step, group=stream.group, size=step.size, resumed=resumed)

    async def _stream(self, opening: stage_pb2.ResidualsOpen) -> _Stream:
        """Raises NotFoundError, FailedPreconditionError or InvalidRequestError for an opening that cannot be served."""
        self._nets.check(opening.net)
        rows = _rows(opening)
        conditioning = await self._conditioning(opening)
        # A request with two rows has a guidance scale above 1.
        guidance = Guidance(scale=rows, is_embedded=False)
        check_conditioning(conditioning, self._conditioning_shapes, guidance)
        async with self._resident.use(opening.net) as network:
            inputs = self._inputs(network, conditioning, rows=rows, width=opening.width, height=opening.height)
        image = _ControlImage(pixels=self._pixels(opening))
        alone = object() if opening.scheduling.deterministic else None
        return _Stream(
            net=opening.net,
            rows=rows,
            inputs=inputs,
            image=image,
            guess_mode=opening.guess_mode,
            group=(opening.net, _shapes(inputs), image.pixels.shape, alone),
        )

    async def _conditioning(self, opening: stage_pb2.ResidualsOpen) -> dict[str, torch.Tensor]:
        """The conditioning that the rows of the samples need; that of one half by the names of the positive one."""
        tensors: Mapping[str, tensors_pb2.Tensor] = opening.conditioning
        if opening.half != stage_pb2.GUIDANCE_HALF_BOTH:
            tensors = of_half(tensors, negative=opening.half == stage_pb2.GUIDANCE_HALF_NEGATIVE)
        return await self._context.peers.conditioning(tensors, self._context.device)

    def _inputs(
        self, network: torch.nn.Module, conditioning: dict[str, torch.Tensor], *, rows: int, width: int, height: int
    ) -> dict[str, Any]:
        return self._family.control_net_inputs(
            network,
            {name: self._on_device(tensor) for name, tensor in conditioning.items()},
            rows=rows,
            width=width,
            height=height,
        )

    def _step(self, step: stage_pb2.ResidualsStep, stream: _Stream, network: torch.nn.Module) -> _Step:
        """Raises InvalidRequestError for a sample or a scale that this ControlNet does not take."""
        scale = strengths.control_scale(step.scale, name=self._context.settings.identity)
        latents = self._on_device(codec.from_inline(step.sample))
        # The image's size fixes that of the latents, as in diffusers.
        height, width = (side // self._image_scale for side in stream.image.pixels.shape[2:])
        if latents.shape != (stream.rows, self._channels, height, width):
            raise InvalidRequestError(
                f"A sample of shape {list(latents.shape)} does not fit this ControlNet and the request's image; "
                f"{[stream.rows, self._channels, height, width]} does."
            )
        return _Step(stream=stream, network=network, latents=latents, timestep=step.timestep, scale=scale)

    def _run(self, steps: Sequence[_Step]) -> list[tuple[dict[str, torch.Tensor], int]]:
        network = steps[0].network
        rows = [len(step.latents) for step in steps]
        timesteps = [step.timestep for step in steps for _ in range(len(step.latents))]
        self._stopwatch.start()
        images = [
            self._embedded(network, step.stream.image).expand(n, -1, -1, -1)
            for step, n in zip(steps, rows, strict=True)
        ]
        residuals = self._family.residuals(
            network,
            torch.cat([step.latents for step in steps]),
            torch.tensor(timesteps, device=self._context.device),
            image=torch.cat(images),
            inputs=stack([step.stream.inputs for step in steps]),
        )
        self._stopwatch.stop()
        forward_ns = self._stopwatch.take().nanoseconds()
        named = {f"down.{i}": tensor for i, tensor in enumerate(residuals.down)} | {"mid": residuals.mid}
        parts = {name: tensor.split(rows) for name, tensor in named.items()}
        guessing = self._family.guess_factors(len(named)).to(self._context.device)
        results = []
        for i, step in enumerate(steps):
            # Each with its own factor, in the precision in which diffusers multiplies.
            factors = (guessing * step.scale).unbind() if step.stream.guess_mode else [step.scale] * len(named)
            scaled = {
                name: of_steps[i] * factor for (name, of_steps), factor in zip(parts.items(), factors, strict=True)
            }
            results.append((scaled, forward_ns))
        return results

    def _embedded(self, network: torch.nn.Module, image: _ControlImage) -> torch.Tensor:
        if image.embedded is None:
            image.embedded = self._family.embed_control_image(network, image.pixels)
        return image.embedded

    def _pixels(self, opening: stage_pb2.ResidualsOpen) -> torch.Tensor:
        """[1, 3, height, width] from 0 to 1, as diffusers' ControlNet pipelines prepare it."""
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
        return self._on_device(processor.preprocess(image, height=opening.height, width=opening.width))

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._context.device, self._context.dtype)


def _shapes(inputs: Mapping[str, Any]) -> Hashable:
    """The shapes of inputs without their rows."""
    return tuple(
        (name, tuple(value.shape[1:]) if isinstance(value, torch.Tensor) else _shapes(value))
        for name, value in sorted(inputs.items())
    )


def _rows(opening: stage_pb2.ResidualsOpen) -> int:
    """Rows of the samples of a stream."""
    half = opening.half
    if opening.guess_mode and half != stage_pb2.GUIDANCE_HALF_POSITIVE:
        raise InvalidRequestError("In guess mode a ControlNet computes the positive half only.")
    if half == stage_pb2.GUIDANCE_HALF_BOTH:
        return 2
    if half in (stage_pb2.GUIDANCE_HALF_POSITIVE, stage_pb2.GUIDANCE_HALF_NEGATIVE):
        return 1
    raise InvalidRequestError(f"{half} is not a guidance half; choose one of GuidanceHalf.")
