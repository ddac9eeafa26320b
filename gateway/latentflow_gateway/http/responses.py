"""The bodies of the HTTP API's responses, made from the gateway's events and descriptions. Pure."""

from __future__ import annotations

import base64
import io

from latentflow import pngmeta
from latentflow.api import Role
from latentflow.internal import control_names
from latentflow.results import ImageReady, Result
from latentflow.v1 import generation_pb2
from pydantic import BaseModel, Field

from latentflow_gateway.http.requests import Format, ImageRequest


class Image(BaseModel):
    """An image."""

    b64_json: str = Field(description="The file as base64.")
    seed: int = Field(description="The seed that makes this image in a request for a single one.")


class Images(BaseModel):
    """The images of a request."""

    created: int = Field(description="Unix time in seconds.")
    data: list[Image]
    output_format: Format
    size: str = Field(description="WIDTHxHEIGHT in pixels.")
    truncated: str | None = Field(
        default=None, description="The part of the prompt that was cut off; absent: nothing was."
    )
    negative_truncated: str | None = Field(default=None, description="The same of the negative prompt.")


class Model(BaseModel):
    """A workflow, as a model of OpenAI's API. Fields that depend on its servers are empty until these have been reached."""

    id: str = Field(description="NAMESPACE/NAME.")
    object: str = "model"
    created: int = Field(default=0, description="Always 0: the gateway does not know when a workflow was created.")
    owned_by: str = Field(description="The workflow's namespace.")
    ready: bool = Field(description="Whether every model of the workflow has a server that accepts requests.")
    size: str = Field(description="WIDTHxHEIGHT of images whose request names no size.")
    size_multiple: int = Field(description="Width and height must be multiples of this; 0: not yet known.")
    steps: int = Field(description="Steps of requests that name no number.")
    guidance_scale: float = Field(description="Guidance scale of requests that name none.")
    samplers: list[str] = Field(description="The first is the default.")
    loras: list[str]
    control_images: list[str] = Field(
        description="Names of the ControlNets, and MODEL/NET for each further net of one."
    )
    max_n: int = Field(description="Most images of a request.")
    max_steps: int
    max_pixels: int = Field(description="Most pixels of an image, width times height.")


class ModelList(BaseModel):
    """The workflows that the gateway serves."""

    object: str = "list"
    data: list[Model]


class Health(BaseModel):
    """Whether the gateway admits requests."""

    status: str = Field(description="serving or draining.")


def model(description: generation_pb2.DescribeWorkflowResponse) -> Model:
    """The model object of a workflow."""
    return Model(
        id=description.workflow,
        owned_by=description.workflow.partition("/")[0],
        ready=description.ready,
        size=f"{description.default_width}x{description.default_height}",
        size_multiple=description.size_multiple,
        steps=description.default_steps,
        guidance_scale=description.default_guidance_scale,
        samplers=list(description.samplers),
        loras=[name for part in description.models for name in part.adapters],
        control_images=[
            control_names.written(part.name, net)
            for part in description.models
            if part.role == Role.CONTROL_NET.value
            for net in ("", *part.nets)
        ],
        max_n=description.max_images,
        max_steps=description.max_steps,
        max_pixels=description.max_pixels,
    )


def images(request: ImageRequest, wire: generation_pb2.GenerateRequest, result: Result, *, created: int) -> bytes:
    """The JSON of a finished request. Encodes the images, which takes long.

    Args:
        wire: The request as the gateway ran it.
    """
    return (
        Images(
            created=created,
            data=[
                Image(b64_json=base64.b64encode(_file(request, wire, result, ready)).decode(), seed=ready.seed)
                for ready in result.ready
            ],
            output_format=request.file_format,
            size=f"{result.done.width}x{result.done.height}",
            truncated=result.done.truncated or None,
            negative_truncated=result.done.negative_truncated or None,
        )
        .model_dump_json(exclude_none=True)
        .encode()
    )


def _file(request: ImageRequest, wire: generation_pb2.GenerateRequest, result: Result, ready: ImageReady) -> bytes:
    if request.file_format == "png":
        return pngmeta.written(ready.png, pngmeta.recipe(wire, result, ready))
    stream = io.BytesIO()
    ready.pil.save(stream, format=request.file_format, quality=request.compression)
    return stream.getvalue()
