"""Builds a GenerateRequest from arguments, which it checks before anything is sent. Pure."""

from __future__ import annotations

import difflib
import math
import secrets
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TypeAlias, TypedDict, TypeVar

from PIL import Image

from latentflow.errors import InvalidRequestError
from latentflow.internal import control_names, images, strengths
from latentflow.v1 import generation_pb2, images_pb2

T = TypeVar("T")
ImageLike: TypeAlias = "Image.Image | bytes | str | PathLike[str]"
_MAX_UINT32 = (1 << 32) - 1
_MAX_SEED = (1 << 64) - 1
# Random seeds are short enough to be typed.
_RANDOM_SEED_BITS = 32


@dataclass(frozen=True, kw_only=True)
class ControlImage:
    """A control image, and the strength and the steps of its ControlNet.

    Attributes:
        image: A PIL image, PNG or JPEG bytes, or a path; RGB or greyscale of 8 bits, upright, in sRGB, of exactly the
            request's size.
        scale: Conditioning scale, from -100 to 100; 1 is the strength of the ControlNet's training.
        start, end: The range of steps in which it acts, as fractions from 0 to 1.
        guess_mode: As in diffusers: it acts on the positive half of guidance only, and less on fine detail than on
            composition, so that the image follows the control image without a prompt.
    """

    image: ImageLike
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess_mode: bool = False


class Arguments(TypedDict, total=False):
    """The arguments of `generate` and `stream` besides the prompt. The workflow has defaults for those that are absent.

    Keys:
        workflow: "namespace/name" or "name"; optional where the gateway serves only one.
        negative_prompt: Text that describes what the image should not contain.
        width, height: Pixels.
        steps: Denoising steps.
        guidance_scale: Scale of classifier-free guidance; 1 or less turns it off.
        sampler: A name that `describe` lists.
        seed: Image i has the seed `seed + i`; random where absent.
        images: Number of images.
        control_images: Control images by ControlNet name; MODEL/NET names one of several nets of a ControlNet.
        loras: Weights by LoRA name, from -100 to 100 and not 0, applied in this order.
        lora_async_steps: Steps that the denoiser may do before the LoRAs are loaded; 0: it waits for them, so that the
            image is exact. Counts as 0 for deterministic requests, and for those of fewer than twice as many steps.
        strict_prompt: Refuse a prompt that is too long, instead of cutting it.
        deterministic: Make images that are bit-identical whatever else the servers run; it costs throughput.
        preview_interval: Steps between previews; 0: no previews.
        idempotency_key: Identifies the request when it is sent again; random where absent.
    """

    workflow: str | None
    negative_prompt: str | None
    width: int | None
    height: int | None
    steps: int | None
    guidance_scale: float | None
    sampler: str | None
    seed: int | None
    images: int
    control_images: Mapping[str, ControlImage | ImageLike] | None
    loras: Mapping[str, float] | None
    lora_async_steps: int | None
    strict_prompt: bool
    deterministic: bool
    preview_interval: int
    idempotency_key: str | None


def build(
    prompt: str,
    *,
    workflow: str | None = None,
    negative_prompt: str | None = None,
    width: int | None = None,
    height: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    sampler: str | None = None,
    seed: int | None = None,
    images: int = 1,
    control_images: Mapping[str, ControlImage | ImageLike] | None = None,
    loras: Mapping[str, float] | None = None,
    lora_async_steps: int | None = None,
    strict_prompt: bool = False,
    deterministic: bool = False,
    preview_interval: int = 0,
    idempotency_key: str | None = None,
    **unknown: object,
) -> generation_pb2.GenerateRequest:
    """The request with these arguments; the workflow has defaults for those that are None.

    A seed and an idempotency key are always set, so that a request that is sent again runs once, or gives the same images.
    InvalidRequestError names an argument that is impossible, TypeError one that is unknown.
    """
    for name in unknown:
        near = difflib.get_close_matches(name, Arguments.__annotations__, n=1)
        raise TypeError(
            f"Requests have no argument {name!r}; "
            + (f"did you mean {near[0]!r}?" if near else f"they have {', '.join(Arguments.__annotations__)}.")
        )
    loras = _by_name("loras", loras, example='{"NAME": 0.8}')
    control_images = _by_name("control_images", control_images, example='{"NAME": image}')
    # The command line has other names for these than Python; both have the words.
    texts = {"prompt": prompt, "The negative prompt": negative_prompt, "workflow": workflow, "sampler": sampler}
    texts |= {"idempotency_key": idempotency_key}
    texts |= {f"The name {name!a}": name for name in (*control_images, *loras)}
    for name, text in texts.items():
        if text is not None:
            _check_text(name, text)
    request = generation_pb2.GenerateRequest(
        workflow=workflow or "",
        prompt=prompt,
        seed=secrets.randbits(_RANDOM_SEED_BITS) if seed is None else _whole("seed", seed, 0, _MAX_SEED),
        images=_whole("images", images, 1, _MAX_UINT32),
        strict_prompt=strict_prompt,
        deterministic=deterministic,
        preview_interval=_whole("preview_interval", preview_interval, 0, _MAX_UINT32),
        idempotency_key=idempotency_key or uuid.uuid4().hex,
    )
    if negative_prompt is not None:
        request.negative_prompt = negative_prompt
    for name, number in (("width", width), ("height", height), ("steps", steps)):
        if number is not None:
            setattr(request, name, _whole(name, number, 1, _MAX_UINT32))
    if guidance_scale is not None:
        request.guidance_scale = _finite("The guidance scale", guidance_scale)
    if sampler is not None:
        request.sampler = sampler
    for name, given in control_images.items():
        control = given if isinstance(given, ControlImage) else ControlImage(image=given)
        model, net = control_names.split(name)
        request.control_images.add(
            model=model,
            net=net,
            image=encoded(control.image, what=f"The control image {name!r}"),
            scale=strengths.control_scale(control.scale, name=name),
            start=_finite(f"The start of {name!r}", control.start),
            end=_finite(f"The end of {name!r}", control.end),
            guess_mode=control.guess_mode,
        )
    for name, weight in loras.items():
        lora = request.loras.add(name=name, weight=strengths.lora_weight(weight, name=name))
        if lora_async_steps is not None:
            lora.async_steps = _whole("lora_async_steps", lora_async_steps, 0, _MAX_UINT32)
    return request


def encoded(image: ImageLike, *, what: str) -> images_pb2.EncodedImage:
    """An image as it is sent. InvalidRequestError where it cannot be read, or is one that the gateway refuses.

    A PIL image becomes PNG. Bytes and files are sent as they are.
    """
    if isinstance(image, Image.Image):
        return images.of_picture(image, what=what)
    try:
        data = image if isinstance(image, bytes) else Path(image).read_bytes()
    except OSError as error:
        raise InvalidRequestError(f"{what} cannot be read: {image!s}: {error.strerror}.") from None
    except (TypeError, ValueError):
        raise InvalidRequestError(f"{what} must be a PIL image, bytes or a path, not {type(image).__name__}.") from None
    message = images.of_file(data, what=what)
    images.opened(message, what=what)
    return message


def _by_name(name: str, given: Mapping[str, T] | None, *, example: str) -> Mapping[str, T]:
    if given is not None and not isinstance(given, Mapping):
        raise InvalidRequestError(f"{name} must be a mapping, such as {example}, not {given!r}.")
    return given or {}


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise InvalidRequestError(f"{name} must be text, not {type(value).__name__}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError(
            f"{name} is not valid Unicode text: {value!a}. Text from files and the command line must be UTF-8."
        ) from None


def _whole(name: str, value: object, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(f"{name} must be a whole number, not {value!r}.")
    if not least <= value <= most:
        raise InvalidRequestError(f"{name} must be from {least} to {most}, not {value}.")
    return value


def _finite(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidRequestError(f"{name} must be a finite number, not {value!r}.")
    return float(value)
