"""The recipe of an image: everything that its generation needs, written into its PNG file and read from it. Pure.

The text chunk `latentflow` holds the recipe as JSON; `parameters` holds it in the form that other image tools display.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from latentflow.errors import InvalidRequestError
from latentflow.internal import control_names
from latentflow.results import ImageReady, Result
from latentflow.v1 import generation_pb2

_CHUNK = "latentflow"


class Recipe(BaseModel):
    """The settings and models of one image.

    Attributes:
        loras: Weights by LoRA name.
        steps_without_loras: Steps that ran before they were loaded.
        control_images: SHA-256 of each control image's bytes, by ControlNet name; the images themselves are not kept.
        control_settings: Scale, start and end, by ControlNet name.
        guess_mode: Names of the ControlNets that ran in guess mode.
        models: Identities by the models' names in the workflow.
        digests: Digests of the weights by the models' names in the workflow.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    prompt: str
    negative_prompt: str | None = None
    workflow: str
    seed: int
    width: int
    height: int
    steps: int
    guidance_scale: float
    sampler: str
    loras: dict[str, float] = Field(default_factory=dict)
    steps_without_loras: int = 0
    control_images: dict[str, str] = Field(default_factory=dict)
    control_settings: dict[str, tuple[float, float, float]] = Field(default_factory=dict)
    guess_mode: list[str] = Field(default_factory=list)
    models: dict[str, str] = Field(default_factory=dict)
    digests: dict[str, str] = Field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """Arguments of `generate` that generate the image again, without its control images."""
        return {
            "workflow": self.workflow,
            "negative_prompt": self.negative_prompt,
            "width": self.width,
            "height": self.height,
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "sampler": self.sampler,
            "seed": self.seed,
            "loras": dict(self.loras),
        }


def recipe(request: generation_pb2.GenerateRequest, result: Result, ready: ImageReady) -> Recipe:
    """The recipe of one image of a finished request."""
    done = result.done
    controls = {control_names.written(one.model, one.net): one for one in request.control_images}
    return Recipe(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt if request.HasField("negative_prompt") else None,
        workflow=result.accepted.workflow,
        seed=ready.seed,
        width=done.width,
        height=done.height,
        steps=done.steps,
        guidance_scale=done.guidance_scale,
        sampler=done.sampler,
        loras={lora.name: lora.weight for lora in request.loras},
        steps_without_loras=ready.steps_without_loras,
        control_images={name: hashlib.sha256(one.image.data).hexdigest() for name, one in controls.items()},
        control_settings={name: (one.scale, one.start, one.end) for name, one in controls.items()},
        guess_mode=[name for name, one in controls.items() if one.guess_mode],
        models={used.name: used.model for used in done.models},
        digests={used.name: used.content_digest for used in done.models},
    )


def written(png: bytes, contents: Recipe) -> bytes:
    """The PNG with the recipe added; its pixels are unchanged."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(_CHUNK, contents.model_dump_json())
    info.add_itxt("parameters", _parameters(contents))
    stream = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        image.save(stream, format="PNG", pnginfo=info)
    return stream.getvalue()


def read(path: Path) -> Recipe:
    """The recipe in a PNG file. InvalidRequestError where it has none."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            text = getattr(image, "text", {}).get(_CHUNK)
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be read as PNG: {error}.") from None
    if text is None:
        raise InvalidRequestError(
            f"{path} contains no recipe; only PNG files that `latentflow generate` or the HTTP API of a gateway made contain "
            "one, as long as no other program has written them again."
        )
    try:
        return Recipe.model_validate(json.loads(text))
    except (ValueError, ValidationError) as error:
        raise InvalidRequestError(f"The recipe in {path} is damaged: {error}") from None


def _parameters(contents: Recipe) -> str:
    loras = "".join(f" <lora:{name}:{weight:g}>" for name, weight in contents.loras.items())
    negative = f"\nNegative prompt: {contents.negative_prompt}" if contents.negative_prompt else ""
    late = f", Steps without LoRAs: {contents.steps_without_loras}" if contents.steps_without_loras else ""
    return (
        f"{contents.prompt}{loras}{negative}\nSteps: {contents.steps}, Sampler: {contents.sampler}, CFG scale: "
        f"{contents.guidance_scale:g}, Seed: {contents.seed}, Size: {contents.width}x{contents.height}, Workflow: {contents.workflow}{late}"
    )
