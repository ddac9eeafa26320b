"""OpenAI's own client, unchanged, uses the HTTP API: its results, 20 at a time, its timeouts and cancellations."""

from __future__ import annotations

import asyncio
import base64
import io
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
from latentflow import AsyncClient, ControlImage, pngmeta
from latentflow_local.runtime import Runtime
from PIL import Image, ImageChops
from support.paths import EXAMPLES
from support.scraping import value

pytestmark = pytest.mark.asyncio(loop_scope="session")
PROMPT = "a large red circle on the left, white background"
STAR = (EXAMPLES / "star.png").read_bytes()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def client(runtime: Runtime) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"http://{runtime.http}/v1", api_key="none", timeout=120) as own:
        yield own


def file(image: Any) -> bytes:
    return base64.b64decode(image.b64_json)


def picture(image: Any) -> Image.Image:
    return Image.open(io.BytesIO(file(image)))


def metrics(runtime: Runtime, role: str) -> str:
    return next(one for one in runtime.supervised.values() if one.spec.role == role).spec.metrics


async def test_the_synchronous_client_makes_the_image_that_grpc_makes(runtime: Runtime, tmp_path: Path) -> None:
    def generate() -> Any:
        with openai.OpenAI(base_url=f"http://{runtime.http}/v1", api_key="none", timeout=120) as own:
            assert [model.id for model in own.models.list()] == ["default/shapes"]
            return own.images.generate(
                model="shapes",
                prompt=PROMPT,
                size="64x64",
                response_format="b64_json",
                extra_body={"seed": 7, "steps": 4},
            )

    made = await asyncio.to_thread(generate)
    async with AsyncClient(runtime.target) as own:
        expected = await own.generate(PROMPT, seed=7, steps=4)
    assert picture(made.data[0]).tobytes() == expected.image.tobytes()
    assert (made.size, made.output_format, made.data[0].seed) == ("64x64", "png", 7)
    # The PNG contains the recipe, so `latentflow generate --like` makes it again.
    (tmp_path / "a.png").write_bytes(file(made.data[0]))
    recipe = pngmeta.read(tmp_path / "a.png")
    assert (recipe.prompt, recipe.seed, recipe.steps, recipe.workflow) == (PROMPT, 7, 4, "default/shapes")


async def test_control_images_and_loras_act_as_over_grpc(runtime: Runtime, client: openai.AsyncOpenAI) -> None:
    made = await client.images.generate(
        prompt="a yellow star, black background",
        size="auto",
        extra_body={
            "seed": 4,
            "steps": 4,
            "guidance_scale": 4,
            "negative_prompt": "blue",
            "sampler": "euler",
            "loras": {"neon": 0.7},
            "control_images": {
                "edges": {"image": base64.b64encode(STAR).decode(), "scale": 0.9, "end": 0.8, "guess_mode": True}
            },
        },
    )
    async with AsyncClient(runtime.target) as own:
        expected = await own.generate(
            "a yellow star, black background",
            seed=4,
            steps=4,
            guidance_scale=4,
            negative_prompt="blue",
            sampler="euler",
            loras={"neon": 0.7},
            control_images={"edges": ControlImage(image=STAR, scale=0.9, end=0.8, guess_mode=True)},
        )
    assert made.data is not None
    assert picture(made.data[0]).tobytes() == expected.image.tobytes()


async def test_every_output_format_has_the_same_picture(client: openai.AsyncOpenAI) -> None:
    async def made(form: Any, **options: Any) -> bytes:
        response = await client.images.generate(
            prompt=PROMPT, output_format=form, extra_body={"seed": 3, "steps": 4}, **options
        )
        assert response.data is not None
        assert response.output_format == form
        return file(response.data[0])

    png = Image.open(io.BytesIO(await made("png"))).convert("RGB")
    for form in ("jpeg", "webp"):
        best, small = await made(form), await made(form, output_compression=10)
        assert len(small) < len(best)
        with Image.open(io.BytesIO(best)) as found:
            assert (found.format, found.size) == (form.upper(), (64, 64))
            # Two encodings of a small picture with hard edges, of which both are lossy.
            difference = ImageChops.difference(png, found.convert("RGB")).resize((1, 1), Image.Resampling.BOX)
        assert max(difference.tobytes()) < 8


async def test_n_images_have_consecutive_seeds(client: openai.AsyncOpenAI) -> None:
    made = await client.images.generate(prompt=PROMPT, n=2, extra_body={"seed": 11, "steps": 2})
    assert made.data is not None
    assert [image.seed for image in made.data] == [11, 12]  # type: ignore[attr-defined]
    assert file(made.data[0]) != file(made.data[1])
    again = await client.images.generate(prompt=PROMPT, extra_body={"seed": 12, "steps": 2})
    assert again.data is not None
    assert picture(again.data[0]).tobytes() == picture(made.data[1]).tobytes()


async def test_a_prompt_that_was_cut_is_reported_and_refused_on_request(client: openai.AsyncOpenAI) -> None:
    long = "a red circle and " * 60
    made = await client.images.generate(prompt=long, extra_body={"steps": 1})
    assert made.truncated in long  # type: ignore[attr-defined]
    with pytest.raises(openai.BadRequestError) as caught:
        await client.images.generate(prompt=long, extra_body={"steps": 1, "strict_prompt": True})
    assert caught.value.code == "PROMPT_TOO_LONG"


async def test_errors_of_planning_have_their_reasons_and_name_the_field(client: openai.AsyncOpenAI) -> None:
    control = {"image": base64.b64encode(STAR).decode()}
    cases: list[tuple[dict[str, Any], type[openai.APIStatusError], str]] = [
        ({"model": "absent"}, openai.NotFoundError, "UNKNOWN_WORKFLOW"),
        ({"loras": {"absent": 1}}, openai.NotFoundError, "UNKNOWN_ADAPTER"),
        ({"control_images": {"absent": control}}, openai.NotFoundError, "UNKNOWN_MODEL"),
        ({"sampler": "absent"}, openai.BadRequestError, "UNKNOWN_SAMPLER"),
        ({"size": "60x64"}, openai.BadRequestError, "INVALID_REQUEST"),
        ({"size": "8192x8192"}, openai.BadRequestError, "INVALID_REQUEST"),
        ({"steps": 100_000}, openai.BadRequestError, "INVALID_REQUEST"),
        ({"n": 9}, openai.BadRequestError, "INVALID_REQUEST"),
        ({"guidance_scale": -1}, openai.BadRequestError, "INVALID_REQUEST"),
        ({"prompt": "a" * 10_001}, openai.BadRequestError, "INVALID_REQUEST"),
    ]
    for extra, kind, reason in cases:
        with pytest.raises(kind) as caught:
            await client.images.generate(prompt=PROMPT, extra_body=extra)
        assert (caught.value.code, caught.value.param) == (reason, next(iter(extra)))
        # gRPC has other names for some fields.
        assert not re.search(r"(?<!The )(?<!of )\b(images|width|height) must", caught.value.message)


async def test_a_request_with_the_same_idempotency_key_runs_once(runtime: Runtime, client: openai.AsyncOpenAI) -> None:
    made = "latentflow_gateway_images_total"
    before = await asyncio.to_thread(value, metrics(runtime, "Gateway"), made)
    header = {"Idempotency-Key": "of-one-request"}
    both = [
        await client.images.generate(prompt=PROMPT, extra_body={"steps": 2}, extra_headers=header) for _ in range(2)
    ]
    first, second = (image.data[0] for image in both if image.data is not None)
    assert first == second
    assert await asyncio.to_thread(value, metrics(runtime, "Gateway"), made) - before == 1
    with pytest.raises(openai.ConflictError) as caught:
        await client.images.generate(prompt=PROMPT, extra_body={"steps": 3}, extra_headers=header)
    assert caught.value.code == "IDEMPOTENCY_CONFLICT"


async def test_twenty_requests_at_a_time_all_get_their_own_image(client: openai.AsyncOpenAI) -> None:
    made = await asyncio.gather(
        *(client.images.generate(prompt=PROMPT, extra_body={"seed": seed, "steps": 2}) for seed in range(20))
    )
    images = [response.data[0] for response in made if response.data]
    assert [image.seed for image in images] == list(range(20))  # type: ignore[attr-defined]
    assert len({image.b64_json for image in images}) == 20


async def until_idle(denoiser: str) -> None:
    async with asyncio.timeout(30):
        while await asyncio.to_thread(value, denoiser, "latentflow_in_flight"):
            pass


async def test_the_denoiser_is_free_within_two_steps_after_a_client_has_disconnected(
    runtime: Runtime, client: openai.AsyncOpenAI
) -> None:
    denoiser = metrics(runtime, "Denoiser")

    async def steps() -> float:
        return await asyncio.to_thread(value, denoiser, "latentflow_step_seconds_count")

    await until_idle(denoiser)
    before = await steps()
    # Large enough that a step takes much longer than a message.
    call = asyncio.create_task(client.images.generate(prompt=PROMPT, size="512x512", extra_body={"steps": 50}))
    async with asyncio.timeout(60):
        while await steps() < before + 3:
            pass
    at = await steps()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until_idle(denoiser)
    assert await steps() - at <= 2
    gone = {"route": "/v1/images/generations", "status": "499"}
    gateway = metrics(runtime, "Gateway")
    assert await asyncio.to_thread(value, gateway, "latentflow_gateway_http_responses_total", **gone) == 1
    assert await asyncio.to_thread(value, gateway, "latentflow_gateway_requests_total", code="CANCELLED") >= 1


async def test_a_client_whose_time_is_over_raises_its_timeout_and_frees_the_denoiser(
    runtime: Runtime, client: openai.AsyncOpenAI
) -> None:
    hasty = client.with_options(timeout=1, max_retries=0)
    with pytest.raises(openai.APITimeoutError):
        await hasty.images.generate(prompt=PROMPT, size="512x512", extra_body={"steps": 200})
    await until_idle(metrics(runtime, "Denoiser"))
