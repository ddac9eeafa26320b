"""The body of a request for images, checked and converted to the request that the gateway runs. Pure."""

from __future__ import annotations

import base64
import binascii
import difflib
import json
from typing import Annotated, Any, Literal

from latentflow.errors import InvalidRequestError
from latentflow.internal import control_names, images
from latentflow.v1 import generation_pb2, images_pb2
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from latentflow_gateway.fields import FIELD

_MAX_UINT32 = (1 << 32) - 1
# Characters of a wrong value in a message: it may be a whole image.
_SHOWN = 40
_MAX_SEED = (1 << 64) - 1
Format = Literal["png", "jpeg", "webp"]
Count = Annotated[int, Field(ge=1, le=_MAX_UINT32)]

# Why a value of OpenAI's API is refused, by field.
_REFUSED = {
    "response_format": "The gateway stores no images, so it returns them in the response.",
    "stream": "The HTTP API sends an image when it is finished. The gRPC API streams progress.",
    "partial_images": "The HTTP API sends an image when it is finished. The gRPC API streams progress.",
    "quality": "Set steps and guidance_scale instead.",
    "style": "Describe the style in the prompt, or use a LoRA.",
    "background": "Images are opaque.",
    "moderation": "The gateway does not moderate.",
}
# The fields for what A1111's API and diffusers name differently.
_FIELD_FOR = {
    "width": "size",
    "height": "size",
    "num_inference_steps": "steps",
    "cfg_scale": "guidance_scale",
    "batch_size": "n",
    "n_iter": "n",
    "num_images_per_prompt": "n",
}
# In pixels; longer ones cannot be written in these formats.
_LONGEST_SIDE = {"jpeg": 65_500, "webp": 16_383}
# Of the fields that are objects, and of a control image.
_FORMS = {
    "loras": '{"neon": 0.8}, with the weights by LoRA name',
    "control_images": '{"edges": {"image": "BASE64"}}, with the control images by ControlNet',
}
_CONTROL_IMAGE = '{"image": "BASE64"}, with the PNG or JPEG file as base64 or as a data: URL'
_SIZE = "size must be WIDTHxHEIGHT in pixels, such as 512x512, or auto"


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ControlImage(_Body):
    """A control image, and the strength and the steps of its ControlNet."""

    image: str = Field(
        description="A PNG or JPEG file as base64 or as a data: URL; of exactly the size of the result. Other URLs are refused."
    )
    scale: float = Field(
        default=1.0, description="Conditioning scale, from -100 to 100; 1 is the strength of the ControlNet's training."
    )
    start: float = Field(default=0.0, description="First part of the steps in which it acts, from 0 to 1.")
    end: float = Field(default=1.0, description="Last part of the steps in which it acts, from 0 to 1.")
    guess_mode: bool = Field(
        default=False,
        description="As in diffusers: it acts on the positive half of guidance only, and less on fine detail than on "
        "composition, so that the image follows the control image without a prompt.",
    )


class ImageRequest(_Body):
    """A request for images. Absent and null mean the same. The workflow has defaults for what is absent."""

    prompt: str = Field(description="What the image should show.")
    model: str | None = Field(
        default=None,
        description="The workflow: NAMESPACE/NAME, or NAME in the namespace default. Optional where the gateway serves only one.",
    )
    n: Count | None = Field(default=None, description="Number of images; absent: 1.")
    size: Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]{0,5}x[1-9][0-9]{0,5})$")] | None = Field(
        default=None, description="WIDTHxHEIGHT in pixels, or auto for the workflow's default."
    )
    output_format: Format | None = Field(
        default=None, description="File format of the images; absent: png. A PNG also contains the recipe of the image."
    )
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = Field(
        default=None, description="Quality of jpeg and webp, from 0 to 100; absent: 100. For png, only 100."
    )
    response_format: Literal["b64_json"] | None = Field(default=None, description="b64_json; url is refused.")
    seed: Annotated[int, Field(ge=0, le=_MAX_SEED)] | None = Field(
        default=None, description="Image i, counted from 0, has the seed `seed + i`. Absent: random."
    )
    steps: Count | None = Field(default=None, description="Denoising steps.")
    guidance_scale: float | None = Field(
        default=None, description="Scale of classifier-free guidance, from 0 to 100; 1 or less turns it off."
    )
    negative_prompt: str | None = Field(default=None, description="What the image should not show.")
    sampler: str | None = Field(default=None, description="A sampler that the model object lists.")
    strict_prompt: bool | None = Field(
        default=None, description="Refuse a prompt that is too long, instead of cutting it."
    )
    deterministic: bool | None = Field(
        default=None, description="Make the same bits whatever else the servers run; it costs throughput."
    )
    loras: dict[str, float] | None = Field(
        default=None, description="Weights by LoRA name, from -100 to 100 and not 0, applied in this order."
    )
    lora_async_steps: Annotated[int, Field(ge=0, le=_MAX_UINT32)] | None = Field(
        default=None,
        description="Steps that may run before the LoRAs are loaded; 0: the image is exact. Absent: the setting of the workflow.",
    )
    control_images: dict[str, ControlImage] | None = Field(
        default=None,
        description="Control images by ControlNet; MODEL/NET names one of several nets of a ControlNet.",
    )
    user: str | None = Field(default=None, description="Accepted without effect.")
    safety_identifier: str | None = Field(default=None, description="Accepted without effect.")
    quality: Literal["auto", "standard"] | None = Field(default=None, description="Accepted without effect.")
    style: Literal["auto"] | None = Field(default=None, description="Accepted without effect.")
    background: Literal["auto", "opaque"] | None = Field(default=None, description="Images are opaque.")
    moderation: Literal["auto", "low"] | None = Field(
        default=None, description="Accepted without effect: the gateway does not moderate."
    )
    stream: Literal[False] | None = Field(default=None, description="false; true is refused.")
    partial_images: Literal[0] | None = Field(default=None, description="0; previews are not sent.")

    @property
    def sides(self) -> tuple[int, int] | None:
        """Width and height; None: those of the workflow."""
        if self.size in (None, "auto"):
            return None
        width, _, height = str(self.size).partition("x")
        return int(width), int(height)

    @property
    def file_format(self) -> Format:
        """The file format of the images."""
        return self.output_format or "png"

    @property
    def compression(self) -> int:
        """The quality of jpeg and webp."""
        return 100 if self.output_compression is None else self.output_compression


def parse(body: bytes) -> ImageRequest:
    """The request in a body. InvalidRequestError names the field that is wrong."""
    try:
        request = ImageRequest.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        param = ".".join(str(part) for part in problem["loc"])
        raise InvalidRequestError(_message(problem, param), details={FIELD: param} if param else None) from None
    # pydantic takes the last of several values without an error. The body has passed it, so it is well-formed and shallow.
    if twice := _repeated(json.loads(body, object_pairs_hook=tuple)):
        raise InvalidRequestError(f"The field {twice!r} occurs twice; send it once.", details={FIELD: twice})
    longest = _LONGEST_SIDE.get(request.file_format)
    if request.sides and longest and max(request.sides) > longest:
        raise InvalidRequestError(
            f"A {request.file_format} has at most {longest} pixels on a side; choose another size or output_format.",
            details={FIELD: "size"},
        )
    if request.file_format == "png" and request.compression != 100:
        raise InvalidRequestError(
            "output_compression is the quality of jpeg and webp; leave it out for png, which loses nothing.",
            details={FIELD: "output_compression"},
        )
    return request


def to_wire(request: ImageRequest, *, idempotency_key: str) -> generation_pb2.GenerateRequest:
    """The request that the gateway runs. InvalidRequestError for a control image that is no base64, PNG or JPEG."""
    wire = generation_pb2.GenerateRequest(
        workflow=request.model or "",
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        steps=request.steps,
        guidance_scale=request.guidance_scale,
        sampler=request.sampler,
        seed=request.seed,
        images=request.n,
        strict_prompt=bool(request.strict_prompt),
        deterministic=bool(request.deterministic),
        idempotency_key=idempotency_key,
        loras=[
            generation_pb2.Lora(name=name, weight=weight, async_steps=request.lora_async_steps)
            for name, weight in (request.loras or {}).items()
        ],
        control_images=[
            generation_pb2.ControlImage(
                model=control_names.split(name)[0],
                net=control_names.split(name)[1],
                image=_decoded(name, control.image),
                scale=control.scale,
                start=control.start,
                end=control.end,
                guess_mode=control.guess_mode,
            )
            for name, control in (request.control_images or {}).items()
        ],
    )
    if request.sides:
        wire.width, wire.height = request.sides
    return wire


def _repeated(value: object, path: str = "") -> str | None:
    """The path of a field that an object has twice; None: there is none.

    Args:
        value: JSON, in which an object is a tuple of its names and values.
    """
    names = set()
    for name, inner in value if isinstance(value, tuple) else ():
        here = f"{path}.{name}" if path else name
        if name in names:
            return here
        names.add(name)
        if found := _repeated(inner, here):
            return found
    return None


def _decoded(name: str, image: str) -> images_pb2.EncodedImage:
    param = {FIELD: f"control_images.{name}.image"}
    text = image
    # The scheme and the word base64 may have any case.
    if image[:5].lower() == "data:":
        header, _, text = image.partition(",")
        if not header.lower().endswith(";base64"):
            raise InvalidRequestError(f"The data: URL of the control image {name!r} is not base64.", details=param)
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequestError(
            f"The control image {name!r} is not base64. Send the file as base64 or as a data: URL; the gateway fetches "
            "no URLs.",
            details=param,
        ) from None
    try:
        return images.of_file(data, what=f"The control image {name!r}")
    except InvalidRequestError as error:
        raise InvalidRequestError(error.message, details=param) from None


def _message(problem: Any, param: str) -> str:
    kind, given = problem["type"], problem["input"]
    if kind == "json_invalid":
        return f"The body is not JSON: {problem['msg'].removeprefix('Invalid JSON: ')}."
    if not param:
        return "The body must be a JSON object with the fields of the request, such as prompt."
    if kind == "extra_forbidden":
        known = ControlImage.model_fields if len(problem["loc"]) > 1 else ImageRequest.model_fields
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        near = [_FIELD_FOR[param]] if param in _FIELD_FOR else near
        hint = f"; did you mean {near[0]!r}?" if near else f"; the fields are {', '.join(known)}."
        return f"The field {param!r} is unknown{hint}"
    if kind == "missing":
        return f"The field {param!r} is required."
    if kind == "literal_error":
        accepted = problem["msg"].removeprefix("Input should be ").replace("'", '"').replace("False", "false")
        return f"{param} must be {accepted}, not {json.dumps(given)}. {_REFUSED.get(param, '')}".strip()
    if kind == "string_pattern_mismatch":
        return f"{_SIZE}, not {json.dumps(given)}."
    if kind in ("dict_type", "model_type"):
        return (
            f"{param} must be an object such as {_FORMS.get(param, _CONTROL_IMAGE)}, not {json.dumps(given)[:_SHOWN]}."
        )
    hint = " Leave it out for a random seed." if param == "seed" else ""
    return f"{param}: {problem['msg']}.{hint}"
