from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
import structlog
import torch
from PIL import Image, ImageDraw
from support.packs import MODELS
from support.stack import Stack, started


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def plain_tracebacks() -> None:
    """As the servers' logs have them. structlog's default prints every local variable, which takes seconds for tensors."""
    processors = structlog.get_config()["processors"]
    renderer = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[*processors[:-1], renderer])


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shapes() -> AsyncIterator[Stack]:
    """The shapes workflow with both ControlNets and the LoRA store."""
    controls = {"edges": "controlnet-edges", "layout": "controlnet-layout"}
    async with started(MODELS, "shapes", controls=controls, loras="loras") as stack:
        yield stack


@pytest.fixture(scope="session")
def edge_image() -> Image.Image:
    image = Image.new("RGB", (64, 64))
    ImageDraw.Draw(image).ellipse((12, 12, 44, 44), outline="white")
    return image


@pytest.fixture(scope="session")
def layout_image() -> Image.Image:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).rectangle((0, 16, 31, 47), fill=(220, 30, 30))
    return image
