"""The body of a request for images: what is accepted, what is refused and how, and what the gateway runs of it."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentflow.errors import InvalidRequestError
from latentflow.v1 import generation_pb2
from latentflow_gateway.http.requests import ImageRequest, parse, to_wire
from PIL import Image
from support.paths import ROOT

PNG = b"\x89PNG\r\n\x1a\n and the rest"
ENCODED = base64.b64encode(PNG).decode()


def read(body: bytes) -> generation_pb2.GenerateRequest:
    return to_wire(parse(body), idempotency_key="")


def wire(**fields: Any) -> generation_pb2.GenerateRequest:
    return read(json.dumps({"prompt": "a"} | fields).encode())


def refusal(body: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        read(body if isinstance(body, bytes) else json.dumps(body).encode())
    return caught.value


def test_every_field_reaches_the_request_that_the_gateway_runs() -> None:
    found = wire(
        model="art/shapes",
        n=2,
        size="64x128",
        seed=(1 << 64) - 1,
        steps=9,
        guidance_scale=3,
        negative_prompt="b",
        sampler="euler",
        strict_prompt=True,
        loras={"outline": 0.5, "neon": -1},
        lora_async_steps=3,
        control_images={"edges": {"image": ENCODED, "scale": 0.5, "end": 0.75, "guess_mode": True}},
    )
    expected = generation_pb2.GenerateRequest(
        workflow="art/shapes",
        prompt="a",
        images=2,
        width=64,
        height=128,
        seed=(1 << 64) - 1,
        steps=9,
        guidance_scale=3,
        negative_prompt="b",
        sampler="euler",
        strict_prompt=True,
    )
    expected.loras.add(name="outline", weight=0.5, async_steps=3)
    expected.loras.add(name="neon", weight=-1, async_steps=3)
    control = expected.control_images.add(model="edges", scale=0.5, start=0, end=0.75, guess_mode=True)
    control.image.data, control.image.media_type = PNG, "image/png"
    assert found == expected


def test_absent_null_and_auto_leave_the_choice_to_the_workflow() -> None:
    nothing = generation_pb2.GenerateRequest(prompt="a")
    assert wire() == nothing
    assert wire(size="auto") == nothing
    for name in ImageRequest.model_fields.keys() - {"prompt"}:
        assert wire(**{name: None}) == nothing


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("user", "someone"),
        ("safety_identifier", "someone"),
        ("response_format", "b64_json"),
        ("quality", "auto"),
        ("quality", "standard"),
        ("style", "auto"),
        ("background", "auto"),
        ("background", "opaque"),
        ("moderation", "auto"),
        ("moderation", "low"),
        ("stream", False),
        ("partial_images", 0),
    ],
)
def test_options_that_have_no_meaning_here_are_accepted_where_they_are_harmless(field: str, value: object) -> None:
    assert wire(**{field: value}) == wire()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("response_format", "url", 'must be "b64_json", not "url". The gateway stores no images'),
        ("stream", True, "must be false, not true. The HTTP API sends an image when it is finished"),
        ("partial_images", 2, "must be 0, not 2. The HTTP API sends"),
        ("quality", "high", "Set steps and guidance_scale instead"),
        ("style", "vivid", "Describe the style in the prompt"),
        ("background", "transparent", "Images are opaque"),
        ("output_format", "gif", 'must be "png", "jpeg" or "webp", not "gif"'),
        ("output_compression", 50, "is the quality of jpeg and webp; leave it out for png"),
        ("size", "64", 'must be WIDTHxHEIGHT in pixels, such as 512x512, or auto, not "64"'),
        ("size", "0x64", "must be WIDTHxHEIGHT"),
        ("n", 0, "greater than or equal to 1"),
        ("n", "2", "valid integer"),
        ("seed", -1, "greater than or equal to 0. Leave it out for a random seed."),
        ("guidance_scale", "5", "valid number"),
        ("prompt", 5, "valid string"),
        ("loras", ["neon"], 'must be an object such as {"neon": 0.8}, with the weights by LoRA name, not ["neon"].'),
        (
            "control_images",
            ["x.png"],
            'must be an object such as {"edges": {"image": "BASE64"}}, with the control images',
        ),
    ],
)
def test_a_refusal_names_the_field_and_what_to_do(field: str, value: object, words: str) -> None:
    error = refusal({"prompt": "a", field: value})
    assert error.details == {"field": field}
    assert field in error.message
    assert words in error.message


def test_a_control_image_that_is_no_object_is_refused_with_the_form_of_one() -> None:
    error = refusal({"prompt": "a", "control_images": {"edges": "x.png"}})
    assert error.details == {"field": "control_images.edges"}
    assert error.message == (
        'control_images.edges must be an object such as {"image": "BASE64"}, with the PNG or JPEG file as base64 or as a '
        'data: URL, not "x.png".'
    )
    assert len(refusal({"prompt": "a", "control_images": {"edges": "A" * 10_000}}).message) < 250


@pytest.mark.parametrize(("form", "longest"), [("webp", 16_383), ("jpeg", 65_500)])
def test_a_size_that_the_file_format_cannot_hold_is_refused(form: str, longest: int) -> None:
    error = refusal({"prompt": "a", "output_format": form, "size": f"64x{longest + 1}"})
    assert f"A {form} has at most {longest} pixels on a side" in error.message
    Image.new("RGB", (1, longest)).save(io.BytesIO(), form)
    with pytest.raises(Exception, match=r"encod|broken"):
        Image.new("RGB", (1, longest + 1)).save(io.BytesIO(), form)


def test_unknown_fields_are_refused_by_name_with_the_nearest_known_one() -> None:
    error = refusal({"prompt": "a", "negative_promt": "b"})
    assert error.message == "The field 'negative_promt' is unknown; did you mean 'negative_prompt'?"
    inner = refusal({"prompt": "a", "control_images": {"edges": {"image": ENCODED, "sclae": 1}}})
    assert inner.details == {"field": "control_images.edges.sclae"}
    assert "did you mean 'scale'?" in inner.message
    for name, field in (("width", "size"), ("num_inference_steps", "steps"), ("n_iter", "n")):
        assert f"did you mean {field!r}?" in refusal({"prompt": "a", name: 1}).message
    assert "the fields are prompt, model, n" in refusal({"prompt": "a", "xyz": 1}).message
    assert "the fields are prompt, model, n" in refusal({"prompt": "a", "x.yz": 1}).message


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"prompt": "a", "seed": 1, "seed": 2}', "seed"),
        (b'{"prompt": {"x": [1e99]}, "seed": ' + b"1" * 4000 + b', "prompt": "a", "seed": 2}', "prompt"),
        (b'{"prompt": "a", "loras": {"neon": 1, "neon": 0.5}}', "loras.neon"),
        (b'{"prompt": "a", "control_images": {"e": {"image": "", "image": "?"}}}', "control_images.e.image"),
    ],
)
def test_a_field_that_occurs_twice_is_refused_by_name(body: bytes, field: str) -> None:
    error = refusal(body)
    assert error.message == f"The field {field!r} occurs twice; send it once."
    assert error.details == {"field": field}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "The body is not JSON"),
        (b"{", "The body is not JSON"),
        (b'{"prompt": "\xff"}', "The body is not JSON"),
        (b'{"prompt": "\\ud800"}', "The body is not JSON"),
        (b"[]", "The body must be a JSON object"),
        (b"null", "The body must be a JSON object"),
        (b"{}", "The field 'prompt' is required"),
        (b'{"prompt": "a", "guidance_scale": NaN}', "finite number"),
    ],
)
def test_a_body_that_is_no_request_is_refused(body: bytes, words: str) -> None:
    assert words in refusal(body).message


def test_a_control_image_may_be_for_one_of_several_nets() -> None:
    (control,) = wire(control_images={"hints/depth": {"image": ENCODED}}).control_images
    assert (control.model, control.net) == ("hints", "depth")


@pytest.mark.parametrize(
    "text",
    [
        ENCODED,
        f"data:image/png;base64,{ENCODED}",
        f"DATA:image/png;BASE64,{ENCODED}",
        f"{ENCODED[:8]}\n{ENCODED[8:]}\n",
    ],
)
def test_a_control_image_is_base64_or_a_data_url(text: str) -> None:
    (control,) = wire(control_images={"edges": {"image": text}}).control_images
    assert control.image.data == PNG
    assert (control.scale, control.start, control.end) == (1, 0, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("https://example.com/a.png", "the gateway fetches no URLs"),
        ("file:///etc/passwd", "the gateway fetches no URLs"),
        ("data:image/png,abc", "is not base64"),
        ("?", "is not base64"),
        (base64.b64encode(b"GIF89a").decode(), "neither PNG nor JPEG"),
    ],
)
def test_other_control_images_are_refused_by_name(text: str, words: str) -> None:
    error = refusal({"prompt": "a", "control_images": {"edges": {"image": text}}})
    assert words in error.message
    assert "'edges'" in error.message
    assert error.details == {"field": "control_images.edges.image"}


def test_the_page_of_the_api_describes_every_field() -> None:
    page = (ROOT / "docs/http.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", page.partition("## The request")[2].partition("## Errors")[0], re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == ImageRequest.model_fields.keys()


SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
JSON = SCALAR | st.lists(SCALAR, max_size=3) | st.dictionaries(st.text(), SCALAR, max_size=3)


@given(st.dictionaries(st.sampled_from([*ImageRequest.model_fields, "other"]), JSON, max_size=4) | JSON)
def test_any_json_is_a_request_or_is_refused(body: object) -> None:
    with contextlib.suppress(InvalidRequestError):
        read(json.dumps(body).encode())
