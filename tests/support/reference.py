"""What plain diffusers makes of a request: the measure of everything that claims to be exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
)
from latentflow_nodes.engine.samplers import SAMPLERS
from PIL import Image

from support.stack import Request


def reference(
    root: Path, request: Request, *, xl: bool = False, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, Image.Image]:
    """What diffusers makes of a request: final latents, on the CPU, and the image."""
    # The cores are shared with the servers of the test, and a team of threads waits for its slowest one in each operation.
    torch.set_num_threads(1)
    names = [name for name, _, _ in request.controls]
    folders = {"edges": "controlnet-edges", "layout": "controlnet-layout", "control": "controlnet"}
    # Of a net of several, by the name of the net.
    nets = [ControlNetModel.from_pretrained(root / folders[name.split("/")[-1]], dtype=dtype) for name in names]
    plain: Any = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
    with_nets: Any = StableDiffusionXLControlNetPipeline if xl else StableDiffusionControlNetPipeline
    extra: dict[str, Any] = {}
    if nets:
        pipe = with_nets.from_pretrained(root, controlnet=nets if len(nets) > 1 else nets[0], dtype=dtype)
        images = [image for _, image, _ in request.controls]
        scales = [scale for _, _, scale in request.controls]
        starts, ends = zip(*map(request.control_range, names), strict=True)
        extra = {
            "guess_mode": request.guess_mode,
            "control_guidance_start": list(starts),
            "control_guidance_end": list(ends),
            "image": images if len(nets) > 1 else images[0],
            "controlnet_conditioning_scale": scales if len(nets) > 1 else scales[0],
        }
    else:
        pipe = plain.from_pretrained(root, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    if request.sampler:
        cls, settings = SAMPLERS[request.sampler]
        pipe.scheduler = getattr(diffusers, cls).from_config(pipe.scheduler.config, **settings)
    for name, _ in request.loras:
        pipe.load_lora_weights(root / "loras" / name, adapter_name=name)
    if request.loras:
        pipe.set_adapters([name for name, _ in request.loras], [weight for _, weight in request.loras])
    arguments = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "width": request.side,
        "height": request.side,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance_scale,
    }
    latents = torch.empty(0)

    def keep(_pipe: Any, _step: int, _timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        nonlocal latents
        latents = state["latents"]
        return state

    image = pipe(
        **arguments, **extra, generator=torch.Generator().manual_seed(request.seed), callback_on_step_end=keep
    ).images[0]
    return latents.cpu(), image
