"""The ControlNet: at every step of a request, the residuals that the denoiser adds."""

from __future__ import annotations

from collections.abc import AsyncIterator, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from latentflow.errors import InvalidRequestError
from latentflow.internal import images, strengths
from latentflow.v1 import control_pb2, stage_pb2, tensors_pb2

from latentflow_nodes import families
from latentflow_nodes.context import Context
from latentflow_nodes.engine.forward_time import Stopwatch
from latentflow_nodes.engine.load import PassSize
from latentflow_nodes.engine.worker import Worker
from latentflow_nodes.families.base import of_half, stack, warm_up_conditioning
from latentflow_nodes.roles.role import Role
from latentflow_nodes.tensors import codec
from latentflow_nodes.weights import files

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
class _Step:
    """A step of one request.

    Attributes:
        latents: [rows, channels, height, width].
        inputs: As Family.residuals takes them, with as many rows.
        scale: Conditioning scale.
        guess_mode: As ControlNetRef.guess_mode.
    """

    latents: torch.Tensor
    timestep: float
    inputs: dict[str, Any]
    image: _ControlImage
    scale: float
    guess_mode: bool

    @property
    def size(self) -> PassSize:
        rows, _, height, width = self.latents.shape
        return PassSize(rows=rows, height=height, width=width)


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
        described.conditioning.extend(self._named(self._family.conditioning_shapes(self._network)))
        described.nets.add(content_digest=self.content_digest)

    async def warm_up(self) -> None:
        side = _WARM_UP_SIDE
        pixels = side * self._family.image_scale(self._network)
        conditioning = warm_up_conditioning(self._family.conditioning_shapes(self._network), self._context.device)
        inputs = self._inputs(conditioning, rows=2, width=pixels, height=pixels)
        image = _ControlImage(pixels=self._on_device(torch.zeros(1, 3, pixels, pixels)))
        latents = self._on_device(torch.zeros(2, self._channels, side, side))
        step = _Step(latents=latents, timestep=1.0, inputs=inputs, image=image, scale=1.0, guess_mode=False)
        await self._worker.run(step, group=None, size=step.size)

    def close(self) -> None:
        self._worker.close()

    async def residuals(
        self, requests: AsyncIterator[stage_pb2.ResidualsRequest]
    ) -> AsyncIterator[stage_pb2.ResidualsResponse]:
        """Answers a request's steps in their order."""
        inputs: dict[str, Any] | None = None
        rows = 1
        guess_mode = False
        resumed = False
        group: Hashable = None
        image = _ControlImage(pixels=torch.empty(0))
        with self._context.transport.sender() as sender:
            async for request in requests:
                if request.WhichOneof("message") == "open":
                    opening = request.open
                    rows = _rows(opening)
                    guess_mode = opening.guess_mode
                    conditioning = await self._conditioning(opening)
                    inputs = self._inputs(conditioning, rows=rows, width=opening.width, height=opening.height)
                    image = _ControlImage(pixels=self._pixels(opening))
                    group = (
                        _shapes(inputs),
                        image.pixels.shape,
                        object() if opening.scheduling.deterministic else None,
                    )
                    yield stage_pb2.ResidualsResponse(opened=True)
                    continue
                if inputs is None:
                    raise InvalidRequestError("The first message of a Residuals stream must be `open`.")
                step = self._step(request.step, inputs, image, rows=rows, guess_mode=guess_mode)
                bundle, forward_ns = await self._worker.run(step, group=group, size=step.size, resumed=resumed)
                for chunk in sender.pieces(bundle, memory=request.step.shared_memory):
                    yield stage_pb2.ResidualsResponse(
                        step=request.step.step, chunk=chunk, forward_ns=forward_ns if chunk.last else 0
                    )
                resumed = True

    async def _conditioning(self, opening: stage_pb2.ResidualsOpen) -> dict[str, torch.Tensor]:
        """The conditioning that the rows of the samples need; that of one half by the names of the positive one."""
        tensors: Mapping[str, tensors_pb2.Tensor] = opening.conditioning
        if opening.half != stage_pb2.GUIDANCE_HALF_BOTH:
            tensors = of_half(tensors, negative=opening.half == stage_pb2.GUIDANCE_HALF_NEGATIVE)
        return await self._context.peers.conditioning(tensors, self._context.device)

    def _inputs(self, conditioning: dict[str, torch.Tensor], *, rows: int, width: int, height: int) -> dict[str, Any]:
        return self._family.control_net_inputs(
            self._network,
            {name: self._on_device(tensor) for name, tensor in conditioning.items()},
            rows=rows,
            width=width,
            height=height,
        )

    def _step(
        self,
        step: stage_pb2.ResidualsStep,
        inputs: dict[str, Any],
        image: _ControlImage,
        *,
        rows: int,
        guess_mode: bool,
    ) -> _Step:
        """Raises InvalidRequestError for a sample or a scale that this ControlNet does not take."""
        scale = strengths.control_scale(step.scale, name=self._context.settings.identity)
        latents = self._on_device(codec.from_inline(step.sample))
        # The image's size fixes that of the latents, as in diffusers.
        height, width = (side // self._family.image_scale(self._network) for side in image.pixels.shape[2:])
        if latents.shape != (rows, self._channels, height, width):
            raise InvalidRequestError(
                f"A sample of shape {list(latents.shape)} does not fit this ControlNet and the request's image; "
                f"{[rows, self._channels, height, width]} does."
            )
        return _Step(
            latents=latents, timestep=step.timestep, inputs=inputs, image=image, scale=scale, guess_mode=guess_mode
        )

    def _run(self, steps: Sequence[_Step]) -> list[tuple[dict[str, torch.Tensor], int]]:
        rows = [len(step.latents) for step in steps]
        timesteps = [step.timestep for step in steps for _ in range(len(step.latents))]
        self._stopwatch.start()
        images = [self._embedded(step.image).expand(n, -1, -1, -1) for step, n in zip(steps, rows, strict=True)]
        residuals = self._family.residuals(
            self._network,
            torch.cat([step.latents for step in steps]),
            torch.tensor(timesteps, device=self._context.device),
            image=torch.cat(images),
            inputs=stack([step.inputs for step in steps]),
        )
        self._stopwatch.stop()
        forward_ns = self._stopwatch.take().nanoseconds()
        named = {f"down.{i}": tensor for i, tensor in enumerate(residuals.down)} | {"mid": residuals.mid}
        parts = {name: tensor.split(rows) for name, tensor in named.items()}
        guessing = self._family.guess_factors(len(named)).to(self._context.device)
        results = []
        for i, step in enumerate(steps):
            # Each with its own factor, in the precision in which diffusers multiplies.
            factors = (guessing * step.scale).unbind() if step.guess_mode else [step.scale] * len(named)
            scaled = {
                name: of_steps[i] * factor for (name, of_steps), factor in zip(parts.items(), factors, strict=True)
            }
            results.append((scaled, forward_ns))
        return results

    def _embedded(self, image: _ControlImage) -> torch.Tensor:
        if image.embedded is None:
            image.embedded = self._family.embed_control_image(self._network, image.pixels)
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
