"""A request that is stopped and resumed on the device ends bit for bit as one that was not, whatever its sampler."""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path

import torch
from latentflow.api.types import Engine
from latentflow.v1 import stage_pb2
from latentflow_nodes.engine.samplers import SAMPLERS
from support.packs import MODELS, SHAPES
from support.stack import Request, Stack, started

from gpucheck.parity import exact
from gpucheck.report import Report

_STEPS = 6
# Multistep samplers that a model may have as its own, beside those that a request may name.
_OWN = ("PNDMScheduler", "HeunDiscreteScheduler", "DEISMultistepScheduler")


def run(report: Report, device: str) -> None:
    exact()
    dtypes = ("float32",) if device == "cpu" else ("float32", "float16")
    for dtype in dtypes:
        with report.case(f"samplers {dtype}"):
            asyncio.run(_named(report, device, dtype))
        with tempfile.TemporaryDirectory() as folder:
            # On a CPU the tests resume with every sampler; there this only has to run.
            for cls in _OWN[:1] if device == "cpu" else _OWN:
                with report.case(f"{cls} {dtype}"):
                    asyncio.run(_own(report, device, dtype, cls, _pack(Path(folder) / cls, cls)))


def _pack(folder: Path, cls: str) -> Path:
    """The shapes pack with another sampler as its own; PNDM as Stable Diffusion 1.x has it."""
    folder.mkdir()
    for part in SHAPES.iterdir():
        if part.name != "scheduler":
            (folder / part.name).symlink_to(part)
    config = json.loads((SHAPES / "scheduler/scheduler_config.json").read_text())
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(
        json.dumps(config | {"_class_name": cls, "skip_prk_steps": True})
    )
    return folder


async def _named(report: Report, device: str, dtype: str) -> None:
    async with started(MODELS, "shapes", engine=Engine(device=device, threads=1), dtype=dtype) as stack:
        for sampler in ("dpmpp_2m",) if device == "cpu" else sorted(SAMPLERS):
            with report.case(f"{sampler} {dtype}"):
                await _resume(report, f"{sampler} {dtype}", stack, Request(sampler=sampler, steps=_STEPS))


async def _own(report: Report, device: str, dtype: str, cls: str, pack: Path) -> None:
    async with started(pack.parent, pack.name, engine=Engine(device=device, threads=1), dtype=dtype) as stack:
        await _resume(report, f"{cls} {dtype}", stack, Request(steps=_STEPS))


async def _resume(report: Report, name: str, stack: Stack, request: Request) -> None:
    message = await stack.denoise_open(request)
    states, latents = await _denoised(stack, message)
    if not torch.isfinite(latents).all():
        raise AssertionError("The latents are not finite: nothing can be compared.")
    differing = 0
    for state in states:
        message.checkpoint = state
        _, resumed = await _denoised(stack, message)
        differing += not torch.equal(resumed, latents)
    report.at_most(f"{name}, of {len(states)} resumed ended otherwise", differing, 0)


async def _denoised(stack: Stack, message: stage_pb2.DenoiseOpen) -> tuple[list[bytes], torch.Tensor]:
    """A checkpoint after every step, and the final latents."""
    message.checkpoint_interval = 1
    states: list[bytes] = []
    async for event in stack.denoising(message):
        if event.WhichOneof("event") == "result":
            return states, await stack.peers.fetch(event.result.latents, name="latents")
        if event.progress.HasField("checkpoint"):
            states.append(event.progress.checkpoint.state)
    raise AssertionError("Denoise ended without a result.")
