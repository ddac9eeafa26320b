"""The ControlNet: at every step of a request, the residuals that the denoiser adds."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Iterator
from typing import Any

import torch
from diffusers import ControlNetModel
from diffusers.image_processor import VaeImageProcessor
from latentflow.errors import InvalidRequestError
from latentflow.v1 import control_pb2, stage_pb2
from PIL import Image

from latentflow_nodes.context import Context
from latentflow_nodes.engine.forward import ForwardTimer
from latentflow_nodes.engine.worker import Worker
from latentflow_nodes.families import FAMILIES
from latentflow_nodes.tensors import codec
from latentflow_nodes.tensors.transfer import Sender
from latentflow_nodes.weights import files


class ControlNet:
    """One ControlNet, shared by all requests that name it."""

    def __init__(self, context: Context) -> None:
        self._context = context
        source = context.source()
        folder = source.part("controlnet")
        self.content_digest = files.digest(files.check(folder))
        self._network = (
            ControlNetModel.from_pretrained(
                folder, torch_dtype=context.dtype, use_safetensors=True, local_files_only=True
            )
            .to(context.device)
            .eval()
        )
        self.family = "sdxl" if self._network.config.addition_embed_type == "text_time" else "sd"
        self._timer = ForwardTimer(self._network)
        settings = context.settings
        self._worker = Worker(
            threads=settings.threads,
            max_waiting=settings.engine.max_waiting,
            turn=context.turn,
            metrics=context.metrics,
        )

    def describe(self, response: control_pb2.DescribeResponse) -> None:
        network = self._network
        response.control_net.cross_attention_dim = network.config.cross_attention_dim
        response.control_net.latent_channels = network.config.in_channels
        blocks = [*network.controlnet_down_blocks, network.controlnet_mid_block]
        response.control_net.residual_channels.extend(block.out_channels for block in blocks)

    async def warm_up(self) -> None:
        config = self._network.config
        side = 8
        scale = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
        width = config.cross_attention_dim
        conditioning = {name: torch.zeros(1, 8, width) for name in ("prompt_embeds", "negative_prompt_embeds")}
        if self.family == "sdxl":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            conditioning |= {f"{half}pooled_prompt_embeds": torch.zeros(1, pooled) for half in ("", "negative_")}
        inputs = FAMILIES[self.family].network_inputs(
            {name: self._here(tensor) for name, tensor in conditioning.items()},
            guidance=True,
            width=side * scale,
            height=side * scale,
        )
        image = self._here(torch.zeros(2, 3, side * scale, side * scale))
        sample = self._here(torch.zeros(2, config.in_channels, side, side))
        await self._worker.run(lambda: self._run(sample, 1.0, inputs, image, scale=1.0))

    def close(self) -> None:
        self._worker.close()

    async def residuals(
        self, requests: AsyncIterator[stage_pb2.ResidualsRequest]
    ) -> AsyncIterator[stage_pb2.ResidualsResponse]:
        """Answers a request's steps in their order."""
        inputs: dict[str, Any] | None = None
        begun = False
        image = torch.empty(0)
        with self._context.transport.sender() as sender:
            async for request in requests:
                if request.WhichOneof("message") == "open":
                    conditioning = await self._context.peers.conditioning(
                        request.open.conditioning, self._context.device
                    )
                    inputs = FAMILIES[self.family].network_inputs(
                        conditioning,
                        guidance=request.open.guidance,
                        width=request.open.width,
                        height=request.open.height,
                    )
                    image = self._image(request.open)
                    continue
                if inputs is None:
                    raise InvalidRequestError("The first message of a Residuals stream has to be `open`.")
                for response in await self._step(request.step, inputs, image, sender, begun=begun):
                    yield response
                begun = True

    async def _step(
        self, step: stage_pb2.ResidualsStep, inputs: dict[str, Any], image: torch.Tensor, sender: Sender, *, begun: bool
    ) -> Iterator[stage_pb2.ResidualsResponse]:
        sample = self._here(codec.from_inline(step.sample))
        rows = inputs["encoder_hidden_states"].shape[0]
        if sample.dim() != 4 or sample.shape[0] != rows or sample.shape[1] != self._network.config.in_channels:
            raise InvalidRequestError(
                f"A sample of shape {list(sample.shape)} does not fit this ControlNet; "
                f"[{rows}, {self._network.config.in_channels}, height, width] does."
            )
        bundle, forward_ns = await self._worker.run(
            lambda: self._run(sample, step.timestep, inputs, image, scale=step.scale), begun=begun
        )
        return (
            stage_pb2.ResidualsResponse(step=step.step, chunk=chunk, forward_ns=forward_ns if chunk.last else 0)
            for chunk in sender.pieces(bundle, memory=step.memory)
        )

    def _run(
        self, sample: torch.Tensor, timestep: float, inputs: dict[str, Any], image: torch.Tensor, *, scale: float
    ) -> tuple[dict[str, torch.Tensor], int]:
        self._timer.take()
        down, mid = self._network(
            sample,
            torch.tensor(timestep, device=sample.device),
            controlnet_cond=image,
            conditioning_scale=scale,
            return_dict=False,
            **inputs,
        )
        return {f"down.{i}": tensor for i, tensor in enumerate(down)} | {"mid": mid}, self._timer.take()

    def _image(self, message: stage_pb2.ResidualsOpen) -> torch.Tensor:
        """[1 or 2, 3, height, width] in 0 to 1, as diffusers' ControlNet pipelines prepare it."""
        try:
            picture = Image.open(io.BytesIO(message.image)).convert("RGB")
        except Exception as error:
            # Pillow raises many kinds for damaged files; all of them mean this.
            raise InvalidRequestError(f"The control image cannot be read as PNG or JPEG: {error}") from None
        if picture.size != (message.width, message.height):
            raise InvalidRequestError(
                f"The control image is {picture.width}x{picture.height}, the request {message.width}x{message.height}; "
                "resize one to the other."
            )
        processor = VaeImageProcessor(do_convert_rgb=True, do_normalize=False)
        image = self._here(processor.preprocess(picture, height=message.height, width=message.width))
        return torch.cat([image] * 2) if message.guidance else image

    def _here(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._context.device, self._context.dtype)
