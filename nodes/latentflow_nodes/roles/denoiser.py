"""The denoiser: conditioning to latents, step by step in the engine."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import torch
from latentflow.errors import FailedPreconditionError, InvalidRequestError, LatentflowError
from latentflow.internal import strengths
from latentflow.internal.guidance import Guidance
from latentflow.reasons import Reason
from latentflow.v1 import control_pb2, stage_pb2

from latentflow_nodes import families
from latentflow_nodes.context import Context
from latentflow_nodes.engine import samplers
from latentflow_nodes.engine.engine import Engine
from latentflow_nodes.engine.sample import Assignment, Sample, Settings, initial_noise
from latentflow_nodes.engine.samplers import Sampler
from latentflow_nodes.families.base import Conditioning, warm_up_conditioning
from latentflow_nodes.roles import denoiser_network, guidance_peers
from latentflow_nodes.roles.conditioning import check_conditioning
from latentflow_nodes.roles.guests import Guests, adapter_key
from latentflow_nodes.roles.guidance_peers import GuidancePeers, open_controls
from latentflow_nodes.roles.loading_adapters import Adapters, LoadingAdapters
from latentflow_nodes.roles.mailbox import Mailbox
from latentflow_nodes.roles.network_role import NetworkRole
from latentflow_nodes.roles.role import asleep
from latentflow_nodes.weights import files

_MAX_STEPS = 1000


class Denoiser(NetworkRole):
    """A denoiser network and its engine."""

    calls = ("Denoise", "PredictNoise")

    def __init__(self, context: Context) -> None:
        self._context = context
        source = context.source()
        self._family = families.of_source(source, "Denoiser")
        self.family = self._family.name
        self._component = self._family.parts["Denoiser"][0]
        folder = source.part(self._component)
        self._scheduler = families.scheduler_config(source)
        self._fewest_steps = samplers.fewest(self._scheduler)
        read = files.LoadedFiles(files.check(folder, variant=source.variant))
        self.content_digest = read.digest
        loaded = denoiser_network.load(
            context, self._family, component=self._component, path=folder, variant=source.variant
        )
        self._network, self._merger = loaded.module, loaded.merger
        self._end_ranks = loaded.close
        self._keep({"": self._network}, files=read, load=lambda: {"": loaded.read()})
        settings = context.settings
        self._engine = Engine(
            runner=loaded.runner,
            merger=loaded.merger,
            max_running=settings.engine.max_running,
            max_waiting=settings.engine.max_waiting,
            threads=settings.threads,
            load=context.load,
            metrics=context.metrics,
        )
        self._keys = itertools.count(1)
        # Samplers and numbers of steps that are known to run.
        self._runnable: set[tuple[str, int]] = set()
        self._embeds_guidance = self._family.embeds_guidance(self._network)
        self._conditioning = self._family.conditioning_shapes(self._network)
        self._guests = Guests(
            context,
            network=self._network,
            family=self._family,
            component=self._component,
            content_digest=self.content_digest,
            engine=self._engine,
            merger=self._merger,
            next_key=lambda: next(self._keys),
        )
        # The requests in the engine.
        self._submitted: dict[Mailbox, Sample] = {}
        self.start()

    def describe(self, response: control_pb2.DescribeResponse) -> None:
        described = response.denoiser
        described.latent_channels = self._family.latent_shape(self._network, height=1, width=1)[1]
        described.conditioning.extend(self._named(self._conditioning))
        described.samplers.extend(samplers.available(self._scheduler))
        described.classifier_free_guidance = not self._embeds_guidance
        described.adapter_components.append(self._component)
        described.guidance_peers = not self._embeds_guidance

    async def warm_up(self) -> None:
        side = self._family.warm_up_side(self._network)
        opening = stage_pb2.DenoiseOpen(
            steps=self._fewest_steps, guidance_scale=1.0, width=side, height=side, scale_factor=1
        )
        conditioning = warm_up_conditioning(self._conditioning, self._context.device)
        mailbox = Mailbox(checkpoint_interval=0)
        sample = self._sample(opening, self._sampler(opening), conditioning, (), mailbox, Assignment())
        self._engine.submit(sample)
        await mailbox.get()

    def start(self) -> None:
        self._engine.start()

    def undo_merges(self) -> None:
        self._engine.undo_adapters()

    async def stop_calls(self) -> None:
        submitted = dict(self._submitted)
        for mailbox, sample in submitted.items():
            mailbox.stop_with(asleep(), sample)
        await asyncio.gather(*(mailbox.left.wait() for mailbox in submitted))

    def close(self) -> None:
        self._engine.stop()
        self._end_ranks()

    def predict_noise(
        self, requests: AsyncIterator[stage_pb2.PredictNoiseRequest]
    ) -> AsyncIterator[stage_pb2.PredictNoiseResponse]:
        return self._guests.serve(requests)

    async def denoise(
        self, opening: stage_pb2.DenoiseOpen, later: AsyncIterator[stage_pb2.DenoiseRequest]
    ) -> AsyncIterator[stage_pb2.DenoiseResponse]:
        """The events of one image. Leaving the iterator early frees the engine at the next step boundary."""
        arrived = time.monotonic_ns()
        _check(opening)
        if opening.HasField("guidance_peer"):
            guidance_peers.check(opening, is_embedded=self._embeds_guidance)
        await self._check_sampler(opening.sampler, opening.steps)
        peers = self._context.peers
        loading = LoadingAdapters(
            peers,
            opening.adapters,
            component=self._component,
            merger=self._merger,
            # A request that is resumed may have used them already.
            may_be_late=not opening.checkpoint,
        )
        pulling = asyncio.gather(
            peers.conditioning(opening.conditioning, self._context.device), loading.before_first_step()
        )
        # The calls to the peers leave before the sampler is made, which takes about as long as their answers.
        await asyncio.sleep(0)
        sampler = self._sampler(opening)
        mailbox = Mailbox(checkpoint_interval=opening.checkpoint_interval)
        async with AsyncExitStack() as stack:
            stack.callback(loading.cancel)
            guidance = await stack.enter_async_context(
                GuidancePeers(
                    peers,
                    opening,
                    is_embedded=self._embeds_guidance,
                    total=len(sampler.timesteps),
                    content_digest=self.content_digest,
                    metrics=self._context.metrics,
                    changed=mailbox.guidance_changed,
                )
            )
            guidance.assign(opening.guidance_peer)
            conditioning, adapters = await pulling
            sample = self._sample(opening, sampler, conditioning, adapters, mailbox, guidance.assignment)
            if late := loading.late():
                sample.late_adapters = late
                late.loaded.add_done_callback(self._engine.wake)
            half = stage_pb2.GUIDANCE_HALF_BOTH if sample.rows == 2 else stage_pb2.GUIDANCE_HALF_POSITIVE
            sample.controls = await open_controls(stack, peers, opening, half=half)
            if opening.checkpoint:
                sample.restore(opening.checkpoint)
                mailbox.checkpoint = stage_pb2.Checkpoint(state=opening.checkpoint, step=sample.index)
            self._engine.submit(sample)
            self._submitted[mailbox] = sample
            following = asyncio.create_task(_follow(later, sample, mailbox, guidance))
            try:
                while (event := await mailbox.get()) is not None:
                    yield event
            finally:
                self._engine.cancel(sample.key)
                del self._submitted[mailbox]
                mailbox.left.set()
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
        took = {
            "forward_ns": sample.forward_time.nanoseconds(),
            "wait_ns": (sample.first_step_ns or time.monotonic_ns()) - arrived,
            "residuals_wait_ns": sample.residuals_wait_ns,
        }
        if mailbox.is_stopped:
            yield stage_pb2.DenoiseResponse(stopped=stage_pb2.DenoiseStopped(checkpoint=mailbox.checkpoint, **took))
        else:
            _check_finite(sample, opening)
            latents = self._context.store.put(sample.latents, request_id=opening.request_id)
            result = stage_pb2.DenoiseResult(
                latents=latents, steps_without_adapters=sample.steps_without_adapters, **took
            )
            yield stage_pb2.DenoiseResponse(result=result)

    async def _check_sampler(self, name: str, steps: int) -> None:
        if (name, steps) not in self._runnable:
            # In a thread, because hundreds of steps take a good part of a second.
            await asyncio.to_thread(samplers.check, name=name, config=self._scheduler, steps=steps)
            self._runnable.add((name, steps))

    def _sampler(self, opening: stage_pb2.DenoiseOpen) -> Sampler:
        return Sampler(
            name=self._sampler_name(opening),
            config=self._scheduler,
            steps=opening.steps,
            device=self._context.device,
        )

    def _sampler_name(self, opening: stage_pb2.DenoiseOpen) -> str:
        return opening.sampler or samplers.available(self._scheduler)[0]

    def _sample(
        self,
        opening: stage_pb2.DenoiseOpen,
        sampler: Sampler,
        conditioning: Conditioning,
        adapters: Adapters,
        mailbox: Mailbox,
        assignment: Assignment,
    ) -> Sample:
        device, dtype = self._context.device, self._context.dtype
        guidance = Guidance(scale=opening.guidance_scale, is_embedded=self._embeds_guidance)
        check_conditioning(conditioning, self._conditioning, guidance)
        settings = Settings(
            seed=opening.seed,
            steps=opening.steps,
            shape=self._family.latent_shape(
                self._network,
                height=opening.height // opening.scale_factor,
                width=opening.width // opening.scale_factor,
            ),
            guidance=guidance,
            sampler=self._sampler_name(opening),
            eta=opening.eta,
        )
        generator = torch.Generator("cpu").manual_seed(settings.seed)
        noise = initial_noise(settings.shape, generator=generator, dtype=dtype, device=device)
        return Sample(
            key=next(self._keys),
            request_id=opening.request_id,
            settings=settings,
            inputs=self._family.denoiser_inputs(
                self._network,
                {name: tensor.to(dtype) for name, tensor in conditioning.items()},
                guidance=guidance,
                width=opening.width,
                height=opening.height,
            ),
            sampler=sampler,
            generator=generator,
            latents=noise * sampler.initial_sigma,
            listener=mailbox,
            guidance=assignment,
            adapters=adapters,
            adapter_key=adapter_key(opening.adapters) if adapters else (),
            is_deterministic=opening.scheduling.deterministic,
        )


async def _follow(
    later: AsyncIterator[stage_pb2.DenoiseRequest], sample: Sample, mailbox: Mailbox, guidance: GuidancePeers
) -> None:
    """Acts on the messages after the opening one."""
    try:
        async for request in later:
            match request.WhichOneof("message"):
                case "stop":
                    mailbox.stop(sample)
                case "guidance":
                    guidance.assign(request.guidance.peer)
                case _:
                    raise InvalidRequestError("Only the first message of a Denoise stream can be `open`.")
    except LatentflowError as error:
        mailbox.refuse(error)


def _check(opening: stage_pb2.DenoiseOpen) -> None:
    """Refuses what no denoiser can do, before anything is pulled."""
    if not 1 <= opening.steps <= _MAX_STEPS:
        raise InvalidRequestError(f"steps must be from 1 to {_MAX_STEPS}, not {opening.steps}.")
    factor = opening.scale_factor
    if not factor or not opening.width or not opening.height or opening.width % factor or opening.height % factor:
        raise InvalidRequestError(
            f"The size {opening.width}x{opening.height} is not a multiple of the VAE's factor {factor}; choose one that is."
        )
    for adapter in opening.adapters:
        strengths.lora_weight(adapter.weight, name=adapter.name)
        if adapter.async_steps and opening.scheduling.deterministic:
            raise InvalidRequestError(
                f"A deterministic request cannot begin without its LoRA {adapter.name!r}: the result would depend on how long "
                "it takes to load it."
            )
    for net in opening.control_nets:
        strengths.control_scale(net.scale, name=net.peer.model)
    numbers = [opening.guidance_scale, opening.eta]
    numbers += [value for net in opening.control_nets for value in (net.start, net.end)]
    if not all(math.isfinite(number) for number in numbers):
        raise InvalidRequestError("Guidance, eta and the steps of a ControlNet must be finite numbers.")


def _check_finite(sample: Sample, opening: stage_pb2.DenoiseOpen) -> None:
    """Once at the end: on a GPU every look at the values waits for the device, as reading the result does anyway."""
    if not torch.isfinite(sample.latents).all():
        dtype = str(sample.latents.dtype).removeprefix("torch.")
        loras = ", ".join(f"{ref.name!r} with the weight {ref.weight:g}" for ref in opening.adapters)
        nets = ", ".join(f"{ref.peer.model!r} with the scale {ref.scale:g}" for ref in opening.control_nets)
        used = [f"the LoRAs {loras}"] * bool(loras) + [f"the ControlNets {nets}"] * bool(nets)
        raise FailedPreconditionError(
            f"The latents are not finite after {sample.total} steps in {dtype}"
            f"{' with ' + ' and '.join(used) if used else ''}. Lower the weights, scales or guidance, or give the models a "
            "dtype of larger range: bfloat16 or float32.",
            reason=Reason.NOT_FINITE,
        )
