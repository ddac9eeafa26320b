"""What the VAE's server takes to decode an image of SDXL's size, beside diffusers' VAE alone."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from latentflow_nodes.families.sdxl import StableDiffusionXL
from PIL import Image

from gpucheck import sizes
from gpucheck.report import Report


def run(report: Report, device: str) -> None:
    network, side = sizes.vae(device), sizes.latent_side(device)
    latents = torch.randn(1, 4, side, side, device=device, dtype=sizes.dtype(device))

    def plain() -> None:
        # As the pipeline does: this VAE overflows in float16.
        network.to(torch.float32)
        image = network.decode(latents.float() / network.config.scaling_factor, return_dict=False)[0]
        network.to(sizes.dtype(device))
        image.cpu()

    def served() -> Image.Image:
        (image,) = StableDiffusionXL().decode(network, latents)
        assert isinstance(image, Image.Image)
        return image

    with torch.inference_mode(), report.case("decode"):
        picture = served()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        decoded, whole = _median(plain, device), _median(served, device)
        report.figure("plain", decoded * 1e3, "ms")
        report.figure("served", whole * 1e3, "ms")
        report.figure("served/plain", whole / decoded)
        encode = _median(lambda: picture.save(io.BytesIO(), format="PNG", compress_level=4), device)
        report.figure("PNG of noise", encode * 1e3, "ms")
        if device == "cuda":
            report.figure("peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")


def _median(work: Callable[[], Any], device: str) -> float:
    times = []
    for _ in range(2 if device == "cpu" else 6):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
