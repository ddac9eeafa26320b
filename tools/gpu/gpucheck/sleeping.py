"""Servers of every role on the device sleep and wake, with bit-identical results, and a full device refuses the wake."""

from __future__ import annotations

import asyncio

import grpc
import torch
from latentflow.api.types import Engine
from latentflow.internal.status import error_from
from latentflow.reasons import Reason
from latentflow.v1 import control_pb2, control_pb2_grpc
from PIL import Image, ImageDraw
from support.packs import MODELS
from support.stack import SECONDS, Request, Stack, started

from gpucheck.parity import exact
from gpucheck.report import Report

_SERVERS = ("text", "base", "pixels", "edges", "styles")


def run(report: Report, device: str) -> None:
    exact()
    for dtype in ("float32",) if device == "cpu" else ("float32", "float16"):
        with report.case(f"servers {dtype}"):
            asyncio.run(_servers(report, device, dtype))


async def _servers(report: Report, device: str, dtype: str) -> None:
    controls = {"edges": "controlnet-edges"}
    engine = Engine(device=device, threads=1)
    async with started(MODELS, "shapes", controls=controls, loras="loras", engine=engine, dtype=dtype) as stack:
        request = Request(loras=[("neon", 0.8)], controls=[("edges", _circle(), 1.0)])
        before, _ = await stack.generate(request)
        slept = [await _control(stack, name).Sleep(_epoch(1), timeout=SECONDS) for name in _SERVERS]
        if device != "cpu":
            # All servers of this process use one allocator.
            report.at_most(f"memory asleep {dtype}", slept[-1].devices[0].used_bytes / 2**20, 32, "MiB")
            with report.case(f"full device {dtype}"):
                await _full(report, stack, dtype)
        for name in _SERVERS:
            await _control(stack, name).Wake(control_pb2.WakeRequest(epoch=2), timeout=SECONDS)
        after, _ = await stack.generate(request)
        report.at_most(f"latents after the sleep {dtype}, differing values", int((before != after).sum()), 0)


async def _full(report: Report, stack: Stack, dtype: str) -> None:
    free, _ = torch.cuda.mem_get_info()
    blocks = []
    size = free
    while size > 2**20:
        try:
            blocks.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
    reason = ""
    try:
        await _control(stack, "base").Wake(control_pb2.WakeRequest(epoch=2), timeout=SECONDS)
    except grpc.RpcError as error:
        reason = error_from(error).reason
    del blocks
    torch.cuda.empty_cache()
    report.at_most(f"wakes on a full device {dtype}", int(reason != Reason.DEVICE_FULL), 0)


def _control(stack: Stack, name: str) -> control_pb2_grpc.ControlStub:
    return control_pb2_grpc.ControlStub(stack.channel(name))


def _epoch(epoch: int) -> control_pb2.SleepRequest:
    return control_pb2.SleepRequest(epoch=epoch)


def _circle() -> Image.Image:
    image = Image.new("RGB", (64, 64))
    ImageDraw.Draw(image).ellipse((12, 12, 44, 44), outline="white")
    return image
