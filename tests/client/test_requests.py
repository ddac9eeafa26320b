"""Requests are checked before they are sent, and always carry a seed and an idempotency key."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentflow import AsyncClient, Client, ControlImage
from latentflow.errors import InvalidRequestError
from latentflow.mock import AsyncMockTransport, MockTransport
from latentflow.requests import build
from PIL import Image


def test_a_seed_and_a_key_are_always_set_so_that_a_retry_makes_the_same_images() -> None:
    first, second = build("a"), build("a")
    assert first.HasField("seed")
    assert first.idempotency_key != second.idempotency_key


def test_absent_arguments_are_left_to_the_workflow() -> None:
    request = build("a")
    assert not any(request.HasField(name) for name in ("width", "height", "steps", "guidance_scale", "sampler"))
    assert not request.HasField("negative_prompt")


def test_a_control_image_may_be_a_pil_image_bytes_or_a_path(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8), "red")
    picture.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    for image in (picture, data, tmp_path / "a.png", str(tmp_path / "a.png")):
        request = build("a", control_images={"edges": ControlImage(image=image, scale=0.5)})
        assert request.control_images[0].image.data[:4] == b"\x89PNG"
        assert request.control_images[0].image.media_type == "image/png"
        assert request.control_images[0].scale == 0.5


def test_a_control_image_may_be_for_one_of_several_nets() -> None:
    picture = Image.new("RGB", (8, 8))
    request = build("a", control_images={"hints": picture, "hints/depth": picture})
    assert [(one.model, one.net) for one in request.control_images] == [("hints", ""), ("hints", "depth")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be from 1"),
        ({"steps": 2.5}, "steps must be a whole number, not 2.5"),
        ({"width": True}, "width must be a whole number"),
        ({"guidance_scale": math.nan}, "The guidance scale must be a finite number, not nan"),
        ({"seed": -1}, "seed must be from 0"),
        ({"images": 0}, "images must be from 1"),
        ({"loras": {"neon": math.inf}}, "The weight of the LoRA 'neon' must be from -100 to 100, not inf"),
        ({"loras": {"neon": 0}}, "The weight of the LoRA 'neon' is 0, which has no effect"),
        ({"loras": ["neon"]}, r"loras must be a mapping, such as \{\"NAME\": 0\.8\}, not \['neon'\]"),
        ({"loras": "neon"}, "loras must be a mapping"),
        ({"control_images": [b"x"]}, "control_images must be a mapping"),
        ({"loras": {"neon": 1}, "lora_async_steps": -1}, "lora_async_steps must be from 0"),
        ({"loras": {"neon": "1"}}, "The weight of the LoRA 'neon' must be from -100 to 100"),
        (
            {"control_images": {"edges": ControlImage(image=Image.new("RGB", (8, 8)), scale=100.5)}},
            "must be from -100 to 100, not 100.5",
        ),
        (
            {"control_images": {"edges": ControlImage(image=Image.new("RGB", (8, 8)), scale=math.nan)}},
            "must be from -100 to 100, not nan",
        ),
        ({"control_images": {"edges": "/absent.png"}}, "cannot be read: /absent.png"),
        ({"control_images": {"edges": 3}}, "not int"),
    ],
)
def test_an_impossible_argument_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        build("a", **arguments)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stepz", "no argument 'stepz'; did you mean 'steps'"),
        ("xyz", "no argument 'xyz'; they have workflow, negative"),
    ],
)
def test_an_unknown_argument_is_named_with_a_suggestion(name: str, message: str) -> None:
    arguments: dict[str, Any] = {name: 3}
    with Client(transport=MockTransport()) as client:
        for call in (client.generate, client.stream, AsyncClient(transport=AsyncMockTransport()).stream):
            with pytest.raises(TypeError, match=message):
                call("a", **arguments)


numbers = st.one_of(st.none(), st.integers(), st.floats(), st.booleans(), st.text(max_size=2))


@given(st.text(max_size=20), numbers, numbers, numbers, numbers)
def test_any_arguments_make_a_request_or_an_invalid_request_error(
    prompt: str, width: Any, steps: Any, guidance: Any, seed: Any
) -> None:
    with contextlib.suppress(InvalidRequestError):
        request = build(prompt, width=width, steps=steps, guidance_scale=guidance, seed=seed)
        assert request.SerializeToString()
