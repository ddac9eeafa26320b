"""The VAE: latents to an image."""

from __future__ import annotations

import io

import torch
from diffusers import AutoencoderKL
from latentflow.errors import InvalidRequestError
from latentflow.v1 import control_pb2, stage_pb2

from latentflow_nodes import families
from latentflow_nodes.context import Context
from latentflow_nodes.engine.forward import ForwardTimer
from latentflow_nodes.engine.worker import Worker
from latentflow_nodes.families import FAMILIES
from latentflow_nodes.weights import files

_WARM_UP_SIDE = 8


class VAE:
    """A pipeline's autoencoder, of which serving needs the decoder."""

    def __init__(self, context: Context) -> None:
        self._context = context
        source = context.source()
        folder = source.part("vae")
        self.family = families.detect(source.pipeline)
        self.content_digest = files.digest(files.check(folder))
        self._vae = (
            AutoencoderKL.from_pretrained(
                folder, torch_dtype=context.dtype, use_safetensors=True, local_files_only=True
            )
            .to(context.device)
            .eval()
        )
        self._timer = ForwardTimer(*decoding_modules(self._vae))
        settings = context.settings
        self._worker = Worker(
            threads=settings.threads,
            max_waiting=settings.engine.max_waiting,
            turn=context.turn,
            metrics=context.metrics,
        )

    def describe(self, response: control_pb2.DescribeResponse) -> None:
        response.vae.scale_factor = 2 ** (len(self._vae.config.block_out_channels) - 1)
        response.vae.latent_channels = self._vae.config.latent_channels

    async def warm_up(self) -> None:
        latents = torch.zeros(1, self._vae.config.latent_channels, _WARM_UP_SIDE, _WARM_UP_SIDE)
        await self._worker.run(lambda: self._run(latents))

    def close(self) -> None:
        self._worker.close()

    async def decode(self, request: stage_pb2.DecodeRequest) -> stage_pb2.DecodeResponse:
        latents = await self._context.peers.fetch(request.latents, name="latents")
        if latents.dim() != 4 or latents.shape[0] != 1 or latents.shape[1] != self._vae.config.latent_channels:
            raise InvalidRequestError(
                f"Latents of shape {list(latents.shape)} cannot be decoded here; "
                f"[1, {self._vae.config.latent_channels}, height, width] can."
            )
        png, forward_ns = await self._worker.run(lambda: self._run(latents))
        return stage_pb2.DecodeResponse(png=png, forward_ns=forward_ns)

    def _run(self, latents: torch.Tensor) -> tuple[bytes, int]:
        self._timer.take()
        image = FAMILIES[self.family].decode(self._vae, latents.to(self._context.device, self._context.dtype))
        stream = io.BytesIO()
        image.save(stream, format="PNG", compress_level=4)
        return stream.getvalue(), self._timer.take()


def decoding_modules(vae: AutoencoderKL) -> list[torch.nn.Module]:
    """The modules whose forward passes make up a decoding."""
    return [module for module in (vae.post_quant_conv, vae.decoder) if module is not None]
