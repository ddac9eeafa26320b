"""A PNG file contains the recipe of its image."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from latentflow import Client, ControlImage, MockTransport, pngmeta, requests
from latentflow.errors import InvalidRequestError
from PIL import Image


def test_a_recipe_is_read_as_it_was_written_and_the_pixels_are_unchanged(tmp_path: Path) -> None:
    request = requests.build("a", negative_prompt="b", seed=4, loras={"neon": 0.5}, sampler="ddim")
    with Client(transport=MockTransport()) as client:
        result = client.generate("a", seed=4)
    ready = result.ready[0]
    recipe = pngmeta.recipe(request, result, ready)
    path = tmp_path / "a.png"
    path.write_bytes(pngmeta.written(ready.png, recipe))
    assert pngmeta.read(path) == recipe
    with Image.open(path) as image:
        assert image.tobytes() == ready.pil.tobytes()
        assert "Seed: 4" in image.info["parameters"]
    assert recipe.arguments()["loras"] == {"neon": 0.5}


def test_a_recipe_has_the_settings_of_the_controlnets() -> None:
    picture = Image.new("RGB", (64, 64))
    request = requests.build(
        "a",
        control_images={
            "edges": ControlImage(image=picture, scale=0.5, end=0.75, guess_mode=True),
            "layout": ControlImage(image=picture),
        },
    )
    with Client(transport=MockTransport()) as client:
        result = client.generate("a", seed=4)
    recipe = pngmeta.recipe(request, result, result.ready[0])
    assert recipe.control_settings == {"edges": (0.5, 0.0, 0.75), "layout": (1.0, 0.0, 1.0)}
    assert recipe.guess_mode == ["edges"]


def test_a_png_tells_how_many_steps_ran_without_its_loras() -> None:
    request = requests.build("a", loras={"neon": 0.5}, lora_async_steps=4)
    with Client(transport=MockTransport()) as client:
        result = client.generate("a", seed=4)
    ready = replace(result.ready[0], steps_without_loras=3)
    written = pngmeta.written(ready.png, pngmeta.recipe(request, result, ready))
    with Image.open(io.BytesIO(written)) as image:
        assert "Steps without LoRAs: 3" in image.info["parameters"]


def test_a_png_without_a_recipe_is_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    (tmp_path / "a.png").write_bytes(stream.getvalue())
    with pytest.raises(
        InvalidRequestError, match=r"contains no recipe; only PNG files that `latentflow generate` or the HTTP API"
    ):
        pngmeta.read(tmp_path / "a.png")


def test_a_file_that_is_no_png_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(InvalidRequestError, match="cannot be read as PNG"):
        pngmeta.read(tmp_path / "a.png")
