"""What a step of the engine takes beside plain diffusers' loop over the same UNet, in one run."""

from __future__ import annotations

import gc
import statistics
import threading
import time
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from latentflow.errors import LatentflowError
from latentflow.internal.guidance import Guidance
from latentflow.internal.metrics import NODE, Instruments
from latentflow_nodes.adapters.merger import Merger
from latentflow_nodes.engine.compute_lock import ComputeLock
from latentflow_nodes.engine.engine import Engine
from latentflow_nodes.engine.load import Load
from latentflow_nodes.engine.runner import EagerRunner
from latentflow_nodes.engine.sample import Sample, Settings, initial_noise
from latentflow_nodes.engine.samplers import Sampler
from latentflow_nodes.families.sdxl import StableDiffusionXL

from gpucheck import sizes
from gpucheck.report import Report

_SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
_GUIDANCE, _TOKENS = 5.0, 77


class Listener:
    """Waits for the end of several samples."""

    def __init__(self, samples: int) -> None:
        self._left = samples
        self._done = threading.Event()
        self._error: LatentflowError | None = None

    def stepped(self, sample: Sample) -> None:
        """Nobody looks at progress here."""

    def finished(self, sample: Sample) -> None:
        self._left -= 1
        if not self._left:
            self._done.set()

    def failed(self, sample: Sample, error: LatentflowError) -> None:
        self._error = error
        self._done.set()

    def wait(self) -> None:
        if not self._done.wait(100):
            raise TimeoutError("The engine did not end its samples.")
        if self._error:
            raise self._error


def run(report: Report, device: str) -> None:
    began = time.perf_counter()
    network = sizes.unet(device)
    _synchronize(device)
    report.figure("parameters", sum(p.numel() for p in network.parameters()) / 1e9, "1e9")
    report.figure("made in", time.perf_counter() - began, "s")
    # The pass of a UNet's batch: one request without guidance, then one, two and four with it.
    for rows, requests in ((1, 1), (2, 1), (4, 2), (8, 4)):
        with report.case(f"rows {rows}"):
            _measure(report, network, device, rows=rows, requests=requests)


def _measure(report: Report, network: UNet2DConditionModel, device: str, *, rows: int, requests: int) -> None:
    steps, rounds = (2, 1) if device == "cpu" else (10, 3)
    guidance = rows == 2 * requests
    inputs = _inputs(network, device, rows=2 if guidance else 1)
    with torch.inference_mode():
        _plain(network, device, inputs, requests=requests, steps=2, guidance=guidance)
    _served(network, device, inputs, requests=requests, steps=2, guidance=guidance)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    plain, served = [], []
    for _ in range(rounds):
        with torch.inference_mode():
            plain.append(_plain(network, device, inputs, requests=requests, steps=steps, guidance=guidance))
        served.append(_served(network, device, inputs, requests=requests, steps=steps, guidance=guidance))
    report.figure(f"rows {rows}, plain step", statistics.median(plain) * 1e3, "ms")
    report.figure(f"rows {rows}, served step", statistics.median(served) * 1e3, "ms")
    report.figure(f"rows {rows}, served/plain", statistics.median(served) / statistics.median(plain))
    if device == "cuda":
        report.figure(f"rows {rows}, peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
    gc.collect()


def _inputs(network: UNet2DConditionModel, device: str, *, rows: int) -> dict[str, Any]:
    config, dtype = network.config, sizes.dtype(device)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {
        "encoder_hidden_states": torch.randn(rows, _TOKENS, config.cross_attention_dim, device=device, dtype=dtype),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(rows, pooled, device=device, dtype=dtype),
            "time_ids": torch.ones(rows, 6, device=device, dtype=dtype),
        },
    }


def _plain(
    network: UNet2DConditionModel, device: str, inputs: dict[str, Any], *, requests: int, steps: int, guidance: bool
) -> float:
    """Seconds of a step in the loop of diffusers' pipeline, for several images at a time."""
    scheduler = EulerDiscreteScheduler.from_config(_SCHEDULER)
    scheduler.set_timesteps(steps, device=device)
    # All negatives first, then all positives, as the pipeline stacks them.
    embeds = inputs["encoder_hidden_states"].repeat_interleave(requests, 0)
    added = {name: tensor.repeat_interleave(requests, 0) for name, tensor in inputs["added_cond_kwargs"].items()}
    side = sizes.latent_side(device)
    latents = torch.randn(requests, 4, side, side, device=device, dtype=sizes.dtype(device))
    latents = latents * scheduler.init_noise_sigma
    _synchronize(device)
    began = time.perf_counter()
    for timestep in scheduler.timesteps:
        model_input = scheduler.scale_model_input(torch.cat([latents] * 2) if guidance else latents, timestep)
        noise = network(
            model_input, timestep, encoder_hidden_states=embeds, added_cond_kwargs=added, return_dict=False
        )[0]
        if guidance:
            negative, positive = noise.chunk(2)
            noise = negative + _GUIDANCE * (positive - negative)
        latents = scheduler.step(noise, timestep, latents, return_dict=False)[0]
    _synchronize(device)
    return (time.perf_counter() - began) / steps


def _served(
    network: UNet2DConditionModel, device: str, inputs: dict[str, Any], *, requests: int, steps: int, guidance: bool
) -> float:
    """Seconds of a step of the engine, in its thread, with several requests."""
    place = torch.device(device)
    metrics = Instruments(NODE, model="m", role="Denoiser")
    engine = Engine(
        runner=EagerRunner(network=network, family=StableDiffusionXL(), device=place, lock=ComputeLock(None)),
        merger=Merger(network, names={}, what="denoiser"),
        max_running=requests,
        max_waiting=requests,
        threads=1,
        load=Load(metrics),
        metrics=metrics,
    )
    engine.start()
    try:
        # The first request in a thread makes the thread's CUDA handles, which a server does at its start.
        warm_up = Listener(1)
        engine.submit(_sample(0, device, inputs, warm_up, steps=1, guidance=guidance))
        warm_up.wait()
        listener = Listener(requests)
        samples = [
            _sample(key, device, inputs, listener, steps=steps, guidance=guidance) for key in range(1, requests + 1)
        ]
        _synchronize(device)
        began = time.perf_counter()
        for sample in samples:
            engine.submit(sample)
        listener.wait()
        _synchronize(device)
        return (time.perf_counter() - began) / steps
    finally:
        engine.stop()


def _sample(key: int, device: str, inputs: dict[str, Any], listener: Listener, *, steps: int, guidance: bool) -> Sample:
    side, place = sizes.latent_side(device), torch.device(device)
    settings = Settings(
        seed=key,
        steps=steps,
        shape=(1, 4, side, side),
        guidance=Guidance(scale=_GUIDANCE if guidance else 1.0, is_embedded=False),
        sampler="euler",
    )
    generator = torch.Generator().manual_seed(key)
    sampler = Sampler(name="euler", config=_SCHEDULER, steps=steps, device=place)
    noise = initial_noise(settings.shape, generator=generator, dtype=sizes.dtype(device), device=place)
    return Sample(
        key=key,
        request_id=str(key),
        settings=settings,
        inputs=inputs,
        sampler=sampler,
        generator=generator,
        latents=noise * sampler.initial_sigma,
        listener=listener,
    )


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
