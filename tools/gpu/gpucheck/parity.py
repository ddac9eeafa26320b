"""Model servers on the device make what plain diffusers makes there: float32 to rounding, half precision to the eye."""

from __future__ import annotations

import asyncio
import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from latentflow.api.types import Engine
from PIL import Image, ImageDraw
from support.packs import MODELS, SHAPES, tiny_sdxl, tiny_v_prediction
from support.reference import reference
from support.scraping import value
from support.stack import Request, Stack, started

from gpucheck.report import Report

_LATENTS, _PSNR = 1e-4, 30.0
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NETS = {"edges": "controlnet-edges", "layout": "controlnet-layout"}


def run(report: Report, device: str) -> None:
    exact()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with report.case("packs"):
            tiny_sdxl(root / "sdxl")
            tiny_v_prediction(root / "v")
        for dtype in ("float32",) if device == "cpu" else _DTYPES:
            with report.case(f"sd {dtype}"):
                asyncio.run(_shapes(report, device, dtype))
        for dtype in ("float32", "bfloat16") if device == "cpu" else _DTYPES:
            with report.case(f"sdxl {dtype}"):
                asyncio.run(_sdxl(report, device, dtype, root))
        with report.case("v prediction"):
            asyncio.run(_v_prediction(report, device, root))


def exact() -> None:
    """Float32 means float32: without TF32, which rounds a convolution's inputs to ten bits."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def edges(side: int = 64) -> Image.Image:
    """A control image for the pack's ControlNet of edges."""
    image = Image.new("RGB", (side, side))
    ImageDraw.Draw(image).ellipse((side // 5, side // 5, side * 2 // 3, side * 2 // 3), outline="white")
    return image


def psnr(image: Image.Image, expected: Image.Image) -> float:
    """Peak signal to noise ratio of two RGB images in dB; infinite where they are equal."""
    difference = np.asarray(image, dtype=float) - np.asarray(expected, dtype=float)
    squared = float((difference**2).mean())
    return math.inf if squared == 0 else 10 * math.log10(255**2 / squared)


async def _shapes(report: Report, device: str, dtype: str) -> None:
    layout = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(layout).rectangle((0, 16, 31, 47), fill=(220, 30, 30))
    cases = {
        "alone": Request(steps=8, negative_prompt="a small blue star"),
        "without guidance": Request(guidance_scale=1.0),
        "controlnet": Request(controls=[("edges", edges(), 0.8)]),
        "two controlnets": Request(controls=[("edges", edges(), 0.7), ("layout", layout, 0.9)]),
        "lora": Request(loras=[("outline", 0.8)]),
        "controlnet and loras": Request(controls=[("edges", edges(), 0.8)], loras=[("pastel", 0.9), ("neon", 0.4)]),
    }
    async with started(
        MODELS, "shapes", controls=_NETS, loras="loras", engine=Engine(device=device, threads=1), dtype=dtype
    ) as stack:
        await _compare(report, f"sd {dtype}", stack, SHAPES, cases, device=device, dtype=dtype)
        shared = [Request(seed=seed, steps=8) for seed in (1, 2, 3, 4)]
        await _together(report, f"sd {dtype}", stack, SHAPES, shared, device=device, dtype=dtype)


async def _sdxl(report: Report, device: str, dtype: str, root: Path) -> None:
    pack = root / "sdxl"
    cases = {
        "alone": Request(side=32, negative_prompt="a blue star"),
        "controlnet": Request(side=32, controls=[("control", edges(32), 0.8)]),
    }
    async with started(
        root, "sdxl", controls={"control": "controlnet"}, engine=Engine(device=device, threads=1), dtype=dtype
    ) as stack:
        await _compare(report, f"sdxl {dtype}", stack, pack, cases, device=device, dtype=dtype, xl=True)
        shared = [Request(side=32, seed=seed, steps=8) for seed in (1, 2, 3)]
        await _together(report, f"sdxl {dtype}", stack, pack, shared, device=device, dtype=dtype, xl=True)


async def _v_prediction(report: Report, device: str, root: Path) -> None:
    async with started(root, "v", engine=Engine(device=device, threads=1)) as stack:
        cases = {"alone": Request(side=32)}
        await _compare(report, "v prediction", stack, root / "v", cases, device=device, dtype="float32")


async def _compare(
    report: Report,
    name: str,
    stack: Stack,
    pack: Path,
    cases: Mapping[str, Request],
    *,
    device: str,
    dtype: str,
    xl: bool = False,
) -> None:
    for case, request in cases.items():
        with report.case(f"{name} {case}"):
            expected = reference(pack, request, xl=xl, device=device, dtype=_DTYPES[dtype])
            _gate(report, f"{name} {case}", await stack.generate(request), expected, dtype=dtype)


async def _together(
    report: Report,
    name: str,
    stack: Stack,
    pack: Path,
    requests: list[Request],
    *,
    device: str,
    dtype: str,
    xl: bool = False,
) -> None:
    """Requests that share forward passes get what diffusers makes of each alone."""
    with report.case(f"{name} shared"):
        metrics = f"127.0.0.1:{stack.nodes['base'].metrics_port}"

        def passes() -> tuple[float, float]:
            batch = "latentflow_batch_size"
            return value(metrics, f"{batch}_sum"), value(metrics, f"{batch}_count")

        # Another than those measured, so that the first passes of this size are behind.
        await stack.generate(replace(requests[0], seed=99))
        before = passes()
        made = await asyncio.gather(*(stack.generate(request) for request in requests))
        samples, count = (after - earlier for after, earlier in zip(passes(), before, strict=True))
        report.at_least(f"{name} shared, samples a pass", samples / count, 1.2)
        for request, one in zip(requests, made, strict=True):
            expected = reference(pack, request, xl=xl, device=device, dtype=_DTYPES[dtype])
            _gate(report, f"{name} shared, seed {request.seed}", one, expected, dtype=dtype)


def _gate(
    report: Report,
    name: str,
    made: tuple[torch.Tensor, Image.Image],
    expected: tuple[torch.Tensor, Image.Image],
    *,
    dtype: str,
) -> None:
    if dtype == "float32":
        # Relative to the largest value, as rounding is.
        error = (made[0].cpu() - expected[0]).abs().max() / expected[0].abs().max()
        report.at_most(f"{name}, latents", error.item(), _LATENTS)
    else:
        report.at_least(f"{name}, PSNR", min(psnr(made[1], expected[1]), 99.0), _PSNR, "dB")
