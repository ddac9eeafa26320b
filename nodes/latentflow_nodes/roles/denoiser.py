"""The denoiser: conditioning to latents, step by step in the engine."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from latentflow.errors import FailedPreconditionError, InvalidRequestError, LatentflowError
from latentflow.v1 import control_pb2, stage_pb2

from latentflow_nodes import families
from latentflow_nodes.adapters.layers import Layers
from latentflow_nodes.adapters.merger import Merger
from latentflow_nodes.context import Context
from latentflow_nodes.engine import samplers
from latentflow_nodes.engine.engine import Engine
from latentflow_nodes.engine.sample import Control, Sample, Settings, guidance_embedding, initial_noise
from latentflow_nodes.engine.samplers import Sampler
from latentflow_nodes.families import FAMILIES
from latentflow_nodes.tensors.step_stream import ResidualStream
from latentflow_nodes.weights import files

_MAX_STEPS = 1000
_WARM_UP_SIDE = 16
# Progress is for eyes: quicker steps are not all told, because every message takes the step loop's thread from it for a
# while (20 steps of 9 ms each took 12 % longer).
_PROGRESS_SECONDS = 0.1


class Denoiser:
    """A UNet and its engine."""

    def __init__(self, context: Context) -> None:
        self._context = context
        source = context.source()
        folder = source.part("unet")
        if not folder.is_dir() and (source.pipeline / "transformer").is_dir():
            raise FailedPreconditionError(
                f"{source.pipeline} has a transformer as its denoiser; this server runs UNets.",
                reason="UNSUPPORTED_FAMILY",
            )
        self.family = families.detect(source.pipeline)
        self._scheduler = files.config(source.pipeline / "scheduler", "scheduler_config.json")
        self.content_digest = files.digest(files.check(folder))
        self._network = (
            UNet2DConditionModel.from_pretrained(
                folder, torch_dtype=context.dtype, use_safetensors=True, local_files_only=True
            )
            .to(context.device)
            .eval()
        )
        self._merger = Merger(self._network, what="denoiser")
        settings = context.settings
        self._engine = Engine(
            network=self._network,
            merger=self._merger,
            max_running=settings.engine.max_running,
            max_waiting=settings.engine.max_waiting,
            threads=settings.threads,
            turn=context.turn,
            metrics=context.metrics,
        )
        self._keys = itertools.count(1)
        self._guidance_width: int | None = self._network.config.time_cond_proj_dim

    def describe(self, response: control_pb2.DescribeResponse) -> None:
        described, config = response.denoiser, self._network.config
        described.latent_channels = config.in_channels
        described.cross_attention_dim = config.cross_attention_dim
        described.prediction_type = str(self._scheduler.get("prediction_type", "epsilon"))
        described.samplers.extend(samplers.available(self._scheduler))
        described.classifier_free_guidance = self._guidance_width is None

    async def warm_up(self) -> None:
        config = self._network.config
        width = config.cross_attention_dim
        conditioning = {name: torch.zeros(1, 8, width) for name in ("prompt_embeds", "negative_prompt_embeds")}
        if self.family == "sdxl":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            conditioning |= {f"{half}pooled_prompt_embeds": torch.zeros(1, pooled) for half in ("", "negative_")}
        side = min(int(config.sample_size or _WARM_UP_SIDE), _WARM_UP_SIDE)
        request = stage_pb2.DenoiseRequest(steps=1, guidance_scale=2.0, width=side, height=side, scale_factor=1)
        mailbox = _Mailbox(checkpoint_interval=0)
        sample = self._sample(request, self._sampler(request), self._to_device(conditioning), [], (), mailbox)
        self._engine.start()
        self._engine.submit(sample)
        await mailbox.get()

    def close(self) -> None:
        self._engine.stop()

    async def denoise(self, request: stage_pb2.DenoiseRequest) -> AsyncIterator[stage_pb2.DenoiseResponse]:
        """The events of one image. Leaving the iterator early frees the engine at the next step boundary."""
        arrived = time.monotonic_ns()
        _check(request)
        peers = self._context.peers
        pulling = asyncio.gather(
            peers.conditioning(request.conditioning, self._context.device), peers.adapters(request.adapters, "unet")
        )
        # The peers are asked before the sampler is made, which takes about as long as their answers.
        await asyncio.sleep(0)
        try:
            sampler = self._sampler(request)
        except LatentflowError:
            pulling.cancel()
            raise
        conditioning, adapters = await pulling
        for ref, (layers, _) in zip(request.adapters, adapters, strict=True):
            self._merger.check(ref.name, layers)
        mailbox = _Mailbox(checkpoint_interval=request.checkpoint_interval)
        async with AsyncExitStack() as stack:
            controls = []
            for net in request.control_nets:
                stream = await stack.enter_async_context(ResidualStream(peers, net, _opening(request, net)))
                controls.append(Control(source=stream, scale=net.scale, start=net.start, end=net.end))
            sample = self._sample(request, sampler, conditioning, adapters, tuple(controls), mailbox)
            if request.checkpoint:
                sample.restore(request.checkpoint)
            self._engine.submit(sample)
            try:
                while (event := await mailbox.get()) is not None:
                    yield stage_pb2.DenoiseResponse(progress=event)
            finally:
                self._engine.cancel(sample.key)
        yield stage_pb2.DenoiseResponse(
            result=stage_pb2.DenoiseResult(
                latents=self._context.store.put(sample.latents),
                forward_ns=sample.forward_ns,
                wait_ns=sample.first_step_ns - arrived,
                residuals_wait_ns=sample.residuals_wait_ns,
            )
        )

    def _sampler(self, request: stage_pb2.DenoiseRequest) -> Sampler:
        name = request.sampler or samplers.available(self._scheduler)[0]
        return Sampler(name=name, config=self._scheduler, steps=request.steps, device=self._context.device)

    def _sample(
        self,
        request: stage_pb2.DenoiseRequest,
        sampler: Sampler,
        conditioning: dict[str, torch.Tensor],
        adapters: list[tuple[Layers, float]],
        controls: tuple[Control, ...],
        mailbox: _Mailbox,
    ) -> Sample:
        guidance = request.guidance_scale > 1 and self._guidance_width is None
        missing = {"prompt_embeds"} | ({"negative_prompt_embeds"} if guidance else set())
        if missing - conditioning.keys():
            raise InvalidRequestError(f"The conditioning lacks {', '.join(sorted(missing - conditioning.keys()))}.")
        width = self._network.config.cross_attention_dim
        if conditioning["prompt_embeds"].shape[-1] != width:
            raise FailedPreconditionError(
                f"The text encoder's embeddings are {conditioning['prompt_embeds'].shape[-1]} wide, this denoiser "
                f"takes {width}; they belong to different base models.",
                reason="TEXT_ENCODER_MISMATCH",
            )
        inputs: dict[str, Any] = FAMILIES[self.family].network_inputs(
            {name: tensor.to(self._context.dtype) for name, tensor in conditioning.items()},
            guidance=guidance,
            width=request.width,
            height=request.height,
        )
        device, dtype = self._context.device, self._context.dtype
        if self._guidance_width is not None:
            inputs["timestep_cond"] = guidance_embedding(request.guidance_scale, self._guidance_width).to(device, dtype)
        settings = Settings(
            seed=request.seed,
            steps=request.steps,
            channels=self._network.config.in_channels,
            height=request.height // request.scale_factor,
            width=request.width // request.scale_factor,
            guidance_scale=request.guidance_scale,
            guidance=guidance,
            sampler=request.sampler or samplers.available(self._scheduler)[0],
            eta=request.eta,
        )
        generator = torch.Generator("cpu").manual_seed(settings.seed)
        noise = initial_noise(settings, generator=generator, dtype=dtype, device=device)
        return Sample(
            key=next(self._keys),
            request_id=request.request_id,
            settings=settings,
            inputs=inputs,
            sampler=sampler,
            generator=generator,
            latents=noise * sampler.initial_sigma,
            listener=mailbox,
            adapters=tuple(adapters),
            adapter_key=tuple((ref.name, ref.digest, ref.weight) for ref in request.adapters),
            controls=controls,
        )

    def _to_device(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self._context.device) for name, tensor in tensors.items()}


class _Mailbox:
    """Carries a sample's news from the engine's thread to the event loop."""

    def __init__(self, *, checkpoint_interval: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._interval = checkpoint_interval
        self._told = time.monotonic()
        self._news: asyncio.Queue[stage_pb2.DenoiseProgress | LatentflowError | None] = asyncio.Queue()

    def stepped(self, sample: Sample) -> None:
        keep = self._interval and sample.index % self._interval == 0
        now = time.monotonic()
        if not keep and now - self._told < _PROGRESS_SECONDS:
            return
        self._told = now
        progress = stage_pb2.DenoiseProgress(step=sample.index, total=sample.total)
        if keep:
            # Taken here, in the engine's thread: a step later the state would be another.
            progress.checkpoint.CopyFrom(stage_pb2.Checkpoint(state=sample.checkpoint(), step=sample.index))
        self._post(progress)

    def finished(self, sample: Sample) -> None:
        self._post(stage_pb2.DenoiseProgress(step=sample.index, total=sample.total))
        self._post(None)

    def failed(self, sample: Sample, error: LatentflowError) -> None:
        self._post(error)

    async def get(self) -> stage_pb2.DenoiseProgress | None:
        """The next progress; None at the end. Raises what made the sample fail."""
        news = await self._news.get()
        if isinstance(news, LatentflowError):
            raise news
        return news

    def _post(self, news: stage_pb2.DenoiseProgress | LatentflowError | None) -> None:
        self._loop.call_soon_threadsafe(self._news.put_nowait, news)


def _check(request: stage_pb2.DenoiseRequest) -> None:
    """What no denoiser can do, before anything is pulled."""
    if not 1 <= request.steps <= _MAX_STEPS:
        raise InvalidRequestError(f"steps has to be from 1 to {_MAX_STEPS}, not {request.steps}.")
    factor = request.scale_factor
    if not factor or not request.width or not request.height or request.width % factor or request.height % factor:
        raise InvalidRequestError(
            f"The size {request.width}x{request.height} is no multiple of the VAE's factor {factor}; choose one that is."
        )
    numbers = [request.guidance_scale, request.eta, *(ref.weight for ref in request.adapters)]
    numbers += [value for ref in request.control_nets for value in (ref.scale, ref.start, ref.end)]
    if not all(math.isfinite(number) for number in numbers):
        raise InvalidRequestError("Guidance, eta, adapter weights and ControlNet scales have to be finite numbers.")


def _opening(request: stage_pb2.DenoiseRequest, ref: stage_pb2.ControlNetRef) -> stage_pb2.ResidualsOpen:
    return stage_pb2.ResidualsOpen(
        request_id=request.request_id,
        conditioning=request.conditioning,
        guidance=request.guidance_scale > 1,
        image=ref.image,
        width=request.width,
        height=request.height,
    )
