"""A request is planned, or refused with its cause, before any model runs."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st
from latentflow.api import DiffusionWorkflow, Role, identity, load_workflows
from latentflow.errors import (
    FailedPreconditionError,
    InvalidRequestError,
    LatentflowError,
    NotFoundError,
    UnimplementedError,
)
from latentflow.internal import images
from latentflow.reasons import Reason
from latentflow.v1 import control_pb2, generation_pb2, images_pb2
from latentflow_gateway import fields, planning
from latentflow_gateway.settings import Limits
from PIL import Image
from support.paths import EXAMPLES

(SHAPES,) = load_workflows(EXAMPLES / "shapes.yaml")
LIMITS = Limits(max_pixels=256 * 256, max_steps=50, max_images=4, max_control_image_bytes=20_000, max_prompt_chars=100)


def descriptions(workflow: DiffusionWorkflow = SHAPES) -> dict[str, control_pb2.DescribeResponse]:
    """Descriptions as the model servers of a workflow return them."""
    described = {}
    for model in workflow.spec.models:
        one = control_pb2.DescribeResponse(family="sd", model=identity(model))
        if model.role is Role.DENOISER:
            one.denoiser.latent_channels = 4
            one.denoiser.conditioning.add(name="prompt_embeds", shape=[1, 0, 96])
            one.denoiser.samplers.extend(["ddim", "euler"])
            one.denoiser.classifier_free_guidance = True
            one.denoiser.adapter_components.append("unet")
        elif model.role is Role.VAE:
            one.vae.scale_factor = 8
            one.vae.latent_channels = 4
        elif model.role is Role.CONTROL_NET:
            one.control_net.latent_channels = 4
            one.control_net.conditioning.add(name="prompt_embeds", shape=[1, 0, 96])
            one.control_net.nets.add(name="")
            one.control_net.nets.add(name="depth")
            one.control_net.nets.add(name="broken", problem="it is damaged.")
        elif model.role is Role.LORA_STORE:
            one.lora_store.adapters.add(name="neon", components=["unet", "text_encoder"], digest="d")
            one.lora_store.adapters.add(name="broken", problem="the file is cut off")
            one.lora_store.adapters.add(name="other", components=["unet", "text_encoder_2"], digest="e")
        else:
            one.text_encoder.tokenizers.add(max_tokens=32)
            one.text_encoder.conditioning.add(name="prompt_embeds", shape=[1, 32, 96])
            one.text_encoder.adapter_components.append("text_encoder")
        described[identity(model)] = one
    return described


def plan(**fields: Any) -> planning.Plan:
    request = generation_pb2.GenerateRequest(prompt="a red circle")
    for name, value in fields.items():
        if isinstance(value, list):
            getattr(request, name).extend(value)
        else:
            field = getattr(request, name)
            field.CopyFrom(value) if isinstance(field, Message) else setattr(request, name, value)
    return planning.plan(workflow=SHAPES, request=request, descriptions=descriptions(), limits=LIMITS, seed=9)


def picture(size: tuple[int, int] = (64, 64), mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, format="PNG")
    return stream.getvalue()


def control(**fields: Any) -> generation_pb2.ControlImage:
    given: dict[str, Any] = {"model": "edges"} | fields
    return generation_pb2.ControlImage(**given | {"image": images.png(given.get("image", picture()))})


def of_type(media_type: str) -> generation_pb2.ControlImage:
    """A PNG under another media type."""
    return generation_pb2.ControlImage(
        model="edges", image=images_pb2.EncodedImage(data=picture(), media_type=media_type)
    )


def test_fields_that_a_request_omits_come_from_the_workflow() -> None:
    made = plan()
    assert (made.width, made.height, made.steps, made.guidance_scale) == (64, 64, 20, 3.0)
    assert (made.seed, made.images, made.sampler, made.guidance) == (9, 1, "ddim", True)


def test_fields_of_a_request_override_the_workflow_s_defaults() -> None:
    made = plan(width=128, steps=3, guidance_scale=1.0, seed=0, images=2, sampler="euler", negative_prompt="x")
    assert (made.width, made.steps, made.guidance, made.seed, made.images) == (128, 3, False, 0, 2)
    assert (made.sampler, made.negative_prompt) == ("euler", "x")


def test_only_the_models_that_a_request_uses_are_needed() -> None:
    request = generation_pb2.GenerateRequest(prompt="x")
    assert set(planning.needed(SHAPES, request)) == {"text", "base", "pixels"}
    request.loras.add(name="neon", weight=1)
    request.control_images.add(model="edges")
    assert set(planning.needed(SHAPES, request)) == {"text", "base", "pixels", "styles", "edges"}


def test_controlnets_and_loras_are_planned_with_the_servers_descriptions() -> None:
    made = plan(
        control_images=[control(scale=0.5, guess_mode=True)], loras=[generation_pb2.Lora(name="neon", weight=0.7)]
    )
    (planned,) = made.controls
    assert (planned.name, planned.scale, planned.end, planned.guess_mode) == ("edges", 0.5, 1.0, True)
    assert [(one.name, one.digest, one.components) for one in made.adapters] == [
        ("neon", "d", ("unet", "text_encoder"))
    ]
    assert made.store == identity(SHAPES.of_role(Role.LORA_STORE)[0])


def test_a_request_may_use_several_nets_of_one_controlnet() -> None:
    made = plan(control_images=[control(), control(net="depth", scale=0.5)])
    assert [(one.name, one.net, one.scale) for one in made.controls] == [
        ("edges", "", 1),
        ("edges/depth", "depth", 0.5),
    ]
    assert len({one.model for one in made.controls}) == 1


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"width": 65}, InvalidRequestError, "width must be a multiple of 8, such as 64, not 65"),
        ({"height": 0}, InvalidRequestError, "height must be a multiple of 8, such as 8, not 0"),
        ({"width": 512}, InvalidRequestError, None),
        ({"width": 2048, "height": 2048}, InvalidRequestError, "this gateway accepts at most 65536"),
        ({"steps": 0}, InvalidRequestError, "steps must be from 1 to 50, not 0"),
        ({"steps": 51}, InvalidRequestError, "steps must be from 1 to 50"),
        ({"images": 0}, InvalidRequestError, "The number of images must be from 1 to 4"),
        ({"images": 5}, InvalidRequestError, "The number of images must be from 1 to 4"),
        ({"guidance_scale": math.nan}, InvalidRequestError, "The guidance scale must be from 0 to 100, not nan"),
        ({"guidance_scale": -1.0}, InvalidRequestError, "guidance scale"),
        ({"seed": (1 << 64) - 1, "images": 2}, InvalidRequestError, "is too large for 2 images"),
        ({"sampler": "magic"}, InvalidRequestError, "use one of ddim, euler"),
        ({"prompt": "x" * 101}, InvalidRequestError, "prompt has 101 characters"),
        ({"idempotency_key": "x" * 129}, InvalidRequestError, "idempotency key"),
        ({"priority": 101}, InvalidRequestError, "priority must be from 0 to 100"),
        ({"deadline": Duration()}, InvalidRequestError, "deadline must be a positive duration"),
        ({"media_type": "image/webp"}, UnimplementedError, "as image/png only"),
        (
            {"control_images": [control(net="canny")]},
            NotFoundError,
            "ControlNet 'edges' has no net 'canny'; it has depth.",
        ),
        (
            {"control_images": [control(net="broken")]},
            FailedPreconditionError,
            "The net 'broken' of ControlNet 'edges' cannot be used: it is damaged.",
        ),
        (
            {"control_images": [control(net="depth"), control(net="depth")]},
            InvalidRequestError,
            "'edges/depth' has two",
        ),
        ({"control_images": [control(model="nets")]}, NotFoundError, "has no ControlNet 'nets'; it has edges, layout"),
        ({"control_images": [control(), control()]}, InvalidRequestError, "has two control images"),
        ({"control_images": [control(image=picture((32, 64)))]}, InvalidRequestError, "is 32x64, the request 64x64"),
        ({"control_images": [control(image=picture(mode="RGBA"))]}, InvalidRequestError, "has the mode RGBA"),
        ({"control_images": [control(image=b"no image")]}, InvalidRequestError, "cannot be read as PNG"),
        ({"control_images": [control(image=picture()[:20])]}, InvalidRequestError, "cannot be read as PNG"),
        ({"control_images": [of_type("image/jpeg")]}, InvalidRequestError, "cannot be read as JPEG"),
        (
            {"control_images": [of_type("image/webp")]},
            InvalidRequestError,
            "has the media type 'image/webp'; use image/png",
        ),
        ({"control_images": [control(image=b"x" * 20_001)]}, InvalidRequestError, "accepts at most 20000"),
        (
            {"control_images": [control(scale=math.inf)]},
            InvalidRequestError,
            "'edges' must be from -100 to 100, not inf",
        ),
        ({"control_images": [control(scale=-101)]}, InvalidRequestError, "must be from -100 to 100, not -101.0"),
        (
            {"loras": [generation_pb2.Lora(name="neon", weight=1e6)]},
            InvalidRequestError,
            "must be from -100 to 100, not 1000000.0",
        ),
        ({"control_images": [control(start=0.5, end=0.5)]}, InvalidRequestError, "0 <= start < end <= 1"),
        (
            {"loras": [generation_pb2.Lora(name="x", weight=1)]},
            NotFoundError,
            "LoRA store 'styles' has no LoRA 'x'; it has neon, other",
        ),
        (
            {"loras": [generation_pb2.Lora(name="neon")]},
            InvalidRequestError,
            "is 0, which has no effect; leave the LoRA out",
        ),
        ({"loras": [generation_pb2.Lora(name="broken", weight=1)]}, FailedPreconditionError, "the file is cut off"),
        (
            {"loras": [generation_pb2.Lora(name="other", weight=1)]},
            FailedPreconditionError,
            "changes the text_encoder_2, which no model of workflow default/shapes has",
        ),
        ({"loras": [generation_pb2.Lora(name="neon", weight=1)] * 2}, InvalidRequestError, "occurs twice"),
    ],
)
def test_an_impossible_request_is_refused_with_its_cause(
    fields: dict[str, Any], kind: type[LatentflowError], message: str | None
) -> None:
    if message is None:
        assert plan(**fields).width == 512
        return
    with pytest.raises(kind, match=message.replace("(", r"\(").replace("<", "<")):
        plan(**fields)


def test_the_gateway_refuses_what_an_image_file_holds_besides_pixels() -> None:
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", (64, 64)).save(stream, format="JPEG", exif=exif)
    image = images_pb2.EncodedImage(data=stream.getvalue(), media_type="image/jpeg")
    with pytest.raises(InvalidRequestError, match=r"^The control image of 'edges' is stored rotated or mirrored"):
        plan(control_images=[generation_pb2.ControlImage(model="edges", image=image)])


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("loras", [generation_pb2.Lora(name="neon", weight=0)]),
        ("loras", [generation_pb2.Lora(name="neon", weight=101)]),
        ("loras", [generation_pb2.Lora(name="neon", weight=1)] * 2),
        ("control_images", [control(scale=101)]),
        ("control_images", [control(start=0.5, end=0.5)]),
        ("control_images", [control(image=b"no image")]),
        ("control_images", [control()] * 2),
    ],
)
def test_a_wrong_lora_or_control_image_is_reported_with_its_field(field: str, values: list[Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        plan(**{field: values})
    assert caught.value.details == {fields.FIELD: field}


def test_a_vae_of_other_latents_is_refused() -> None:
    described = descriptions()
    described[identity(SHAPES.of_role(Role.VAE)[0])].vae.latent_channels = 16
    request = generation_pb2.GenerateRequest(prompt="x")
    with pytest.raises(FailedPreconditionError, match="makes latents of 4 channels, the VAE 'pixels' takes 16"):
        planning.plan(workflow=SHAPES, request=request, descriptions=described, limits=LIMITS, seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda net: net.conditioning[0].shape.__setitem__(2, 768),
            r"is \[1, \.\.\., 96\], needed is \[1, \.\.\., 768\]",
        ),
        (lambda net: net.conditioning.add(name="pooled_prompt_embeds"), "'pooled_prompt_embeds' is missing"),
        (lambda net: setattr(net, "latent_channels", 16), "latents of 16 channels"),
    ],
)
def test_a_controlnet_of_another_base_model_is_refused(
    change: Callable[[control_pb2.ControlNetDescription], object], message: str
) -> None:
    described = descriptions()
    change(described[identity(SHAPES.of_role(Role.CONTROL_NET)[0])].control_net)
    request = generation_pb2.GenerateRequest(prompt="x", control_images=[control()])
    with pytest.raises(FailedPreconditionError, match=f"{message}.*made for another base model"):
        planning.plan(workflow=SHAPES, request=request, descriptions=described, limits=LIMITS, seed=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"name": "prompt_embeds", "shape": [1, 32, 768]},
            r"'prompt_embeds' is \[1, 32, 768\], needed is \[1, \.\.\., 96\]",
        ),
        ({"name": "prompt_embeds", "shape": [1, 96]}, r"'prompt_embeds' is \[1, 96\], needed"),
        ({"name": "embeds", "shape": [1, 32, 96]}, "'prompt_embeds' is missing"),
    ],
)
def test_a_text_encoder_of_another_base_model_is_refused(given: dict[str, Any], message: str) -> None:
    described = descriptions()
    encoder = described[identity(SHAPES.of_role(Role.TEXT_ENCODER)[0])].text_encoder
    encoder.ClearField("conditioning")
    encoder.conditioning.add(**given)
    with pytest.raises(FailedPreconditionError, match=message) as caught:
        planning.plan(
            workflow=SHAPES,
            request=generation_pb2.GenerateRequest(prompt="x"),
            descriptions=described,
            limits=LIMITS,
            seed=0,
        )
    assert caught.value.reason == Reason.TEXT_ENCODER_MISMATCH


def test_fields_that_change_no_result_are_accepted_without_effect() -> None:
    assert plan(priority=100, deadline=Duration(seconds=5), media_type="image/png") == plan()


def test_models_of_two_families_are_refused() -> None:
    described = descriptions()
    described[identity(SHAPES.of_role(Role.VAE)[0])].family = "sdxl"
    with pytest.raises(FailedPreconditionError, match="'pixels' belongs to the family sdxl"):
        planning.plan(
            workflow=SHAPES,
            request=generation_pb2.GenerateRequest(prompt="x"),
            descriptions=described,
            limits=LIMITS,
            seed=0,
        )


def test_a_task_that_is_not_served_is_refused() -> None:
    spec = SHAPES.spec.model_copy(update={"task": "Inpainting"})
    with pytest.raises(UnimplementedError, match="only TextToImage"):
        planning.plan(
            workflow=SHAPES.model_copy(update={"spec": spec}),
            request=generation_pb2.GenerateRequest(prompt="x"),
            descriptions=descriptions(),
            limits=LIMITS,
            seed=0,
        )


@pytest.mark.parametrize(
    ("role", "fields", "words"),
    [
        (
            Role.LORA_STORE,
            {"loras": [generation_pb2.Lora(name="neon", weight=1)]},
            "role: LoRAStore and attachTo: base",
        ),
        (Role.CONTROL_NET, {"control_images": [control()]}, "role: ControlNet and attachTo: base"),
    ],
)
def test_a_workflow_without_a_role_is_refused_with_the_model_to_add(
    role: Role, fields: dict[str, Any], words: str
) -> None:
    models = tuple(model for model in SHAPES.spec.models if model.role is not role)
    lacking = SHAPES.model_copy(update={"spec": SHAPES.spec.model_copy(update={"models": models})})
    with pytest.raises(NotFoundError, match=f"Add a model with {words} to it, as docs/"):
        planning.plan(
            workflow=lacking,
            request=generation_pb2.GenerateRequest(prompt="x", **fields),
            descriptions=descriptions(),
            limits=LIMITS,
            seed=0,
        )


@pytest.mark.parametrize("name", ["", "shapes", "default/shapes"])
def test_a_workflow_is_found_by_its_name_or_by_being_the_only_one(name: str) -> None:
    assert planning.find((SHAPES,), name) is SHAPES


def test_an_unknown_workflow_is_refused_with_the_names_of_those_served() -> None:
    with pytest.raises(NotFoundError, match=r"no workflow 'default/nope'; it serves default/shapes\. Name one: --work"):
        planning.find((SHAPES,), "nope")


def test_a_request_without_a_workflow_is_refused_with_how_each_client_names_one() -> None:
    with pytest.raises(NotFoundError, match=r"--workflow on the command line.*workflow=… in Python.*field model"):
        planning.find((SHAPES, SHAPES), "")


requests = st.builds(
    generation_pb2.GenerateRequest,
    prompt=st.text(max_size=120),
    width=st.integers(0, (1 << 32) - 1),
    height=st.integers(0, 300),
    steps=st.integers(0, 100),
    guidance_scale=st.floats(),
    sampler=st.sampled_from(["", "ddim", "x"]),
    seed=st.integers(0, (1 << 64) - 1),
    images=st.integers(0, 6),
    control_images=st.lists(
        st.builds(
            generation_pb2.ControlImage,
            model=st.sampled_from(["edges", "base", ""]),
            image=st.builds(
                images_pb2.EncodedImage,
                data=st.binary(max_size=40) | st.just(picture()),
                media_type=st.sampled_from(["image/png", "image/jpeg", ""]),
            ),
            scale=st.floats(),
            start=st.floats(),
            end=st.floats(),
        ),
        max_size=2,
    ),
    loras=st.lists(
        st.builds(generation_pb2.Lora, name=st.sampled_from(["neon", "x", ""]), weight=st.floats()), max_size=2
    ),
)


@given(requests)
def test_any_request_is_planned_or_refused_with_a_latentflow_error(request: generation_pb2.GenerateRequest) -> None:
    with contextlib.suppress(LatentflowError):
        made = planning.plan(workflow=SHAPES, request=request, descriptions=descriptions(), limits=LIMITS, seed=0)
        assert made.width * made.height <= LIMITS.max_pixels
        assert 1 <= made.steps <= LIMITS.max_steps
        assert made.seed + made.images <= 1 << 64


@pytest.mark.parametrize(
    ("workflows", "requests", "steps", "deterministic", "expected"),
    [
        (0, None, 20, False, 0),
        (4, None, 20, False, 4),
        (4, 0, 20, False, 0),
        (0, 6, 20, False, 6),
        (0, 10, 20, False, 10),
        (0, 11, 20, False, 0),
        (4, 6, 20, True, 0),
    ],
)
def test_the_steps_without_loras_are_those_of_the_request_or_of_the_workflow(
    workflows: int, requests: int | None, steps: int, deterministic: bool, expected: int
) -> None:
    document = SHAPES.model_dump(mode="json", by_alias=True, exclude_none=True)
    store = next(model for model in document["spec"]["models"] if model["role"] == "LoRAStore")
    store["engine"] = {"asyncSteps": workflows}
    workflow = DiffusionWorkflow.model_validate(document)
    request = generation_pb2.GenerateRequest(
        prompt="x",
        steps=steps,
        deterministic=deterministic,
        loras=[generation_pb2.Lora(name="neon", weight=1, async_steps=requests)],
    )
    made = planning.plan(workflow=workflow, request=request, descriptions=descriptions(workflow), limits=LIMITS, seed=1)
    assert [adapter.async_steps for adapter in made.adapters] == [expected]
