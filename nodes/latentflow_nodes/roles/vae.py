"""The VAE: latents to an image."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence

import torch
from latentflow.errors import InvalidRequestError, LatentflowError
from latentflow.internal import images
from latentflow.v1 import control_pb2, stage_pb2
from PIL import Image

from latentflow_nodes import families
from latentflow_nodes.context import Context
from latentflow_nodes.engine.forward_time import measure
from latentflow_nodes.engine.load import PassSize
from latentflow_nodes.engine.worker import Worker
from latentflow_nodes.roles.network_role import NetworkRole
from latentflow_nodes.weights import files

_WARM_UP_SIDE = 8


class VAE(NetworkRole):
    """A pipeline's autoencoder, of which serving needs the decoder."""

    calls = ("Decode",)

    def __init__(self, context: Context) -> None:
        self._context = context
        source = context.source()
        self._family = families.of_source(source, "VAE")
        self.family = self._family.name
        folder = source.part(self._family.parts["VAE"][0])
        loaded = files.LoadedFiles(files.check(folder, variant=source.variant))
        self.content_digest = loaded.digest

        def load() -> torch.nn.Module:
            return self._family.load_vae(folder, dtype=context.dtype, variant=source.variant)

        self._vae = load().to(context.device).eval()
        self._keep({"vae": self._vae}, files=loaded, load=lambda: {"vae": load()})
        self._geometry = self._family.vae_geometry(self._vae)
        self._stopwatch = measure(self._family.decoding_modules(self._vae), device=context.device)
        settings = context.settings
        self._worker: Worker[torch.Tensor, tuple[Image.Image, int]] = Worker(
            self._run,
            threads=settings.threads,
            max_running=settings.engine.max_running,
            max_waiting=settings.engine.max_waiting,
            lock=context.compute_lock,
            load=context.load,
        )

    def describe(self, response: control_pb2.DescribeResponse) -> None:
        response.vae.scale_factor = self._geometry.scale_factor
        response.vae.latent_channels = self._geometry.latent_channels

    async def warm_up(self) -> None:
        latents = torch.zeros(1, self._geometry.latent_channels, _WARM_UP_SIDE, _WARM_UP_SIDE)
        await self._worker.run(latents, group=latents.shape, size=_size(latents))

    def start(self) -> None:
        self._worker.start()

    def close(self) -> None:
        self._worker.close()

    async def decode(self, request: stage_pb2.DecodeRequest) -> stage_pb2.DecodeResponse:
        latents = await self._context.peers.fetch(request.latents, name="latents")
        if latents.dim() != 4 or latents.shape[0] != 1 or latents.shape[1] != self._geometry.latent_channels:
            raise InvalidRequestError(
                f"Latents of shape {list(latents.shape)} cannot be decoded here; "
                f"[1, {self._geometry.latent_channels}, height, width] can."
            )
        group = (latents.shape, object() if request.scheduling.deterministic else None)
        image, forward_ns = await self._worker.run(latents, group=group, size=_size(latents))
        # Not in the worker's thread, where the next pass would wait for it.
        png = await asyncio.to_thread(_png, image)
        return stage_pb2.DecodeResponse(image=images.png(png), forward_ns=forward_ns)

    def _run(self, latents: Sequence[torch.Tensor]) -> list[tuple[Image.Image, int] | LatentflowError]:
        self._stopwatch.take()
        decoded = self._family.decode(self._vae, torch.cat(list(latents)).to(self._context.device, self._context.dtype))
        forward_ns = self._stopwatch.take().nanoseconds()
        return [one if isinstance(one, LatentflowError) else (one, forward_ns) for one in decoded]


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG", compress_level=4)
    return stream.getvalue()


def _size(latents: torch.Tensor) -> PassSize:
    rows, _, height, width = latents.shape
    return PassSize(rows=rows, height=height, width=width)
