"""A model family is one file: a fictitious one, which shares nothing with Stable Diffusion, is served over gRPC."""

from __future__ import annotations

import io
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from latentflow.errors import LatentflowError
from latentflow.internal.guidance import Guidance
from latentflow.internal.source_folder import SourceFolder
from latentflow.v1 import stage_pb2
from latentflow_nodes import families
from latentflow_nodes.families.base import (
    AdapterPart,
    Conditioning,
    LazyResiduals,
    Residuals,
    Shape,
    TextModel,
    VaeGeometry,
    halves,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from support.stack import SECONDS, Request, Stack, started

LETTERS = 16


class Scale(torch.nn.Module):
    """Multiplies by one weight."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(load_file(folder / "model.safetensors")["weight"])

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values * self.weight


class Letters:
    """A tokenizer of letters."""

    model_max_length = LETTERS

    def __call__(self, text: str, **_: Any) -> Any:
        return type("Tokens", (), {"input_ids": [ord(letter) for letter in text]})

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(one) for one in ids)


class Alphabet:
    """A fictitious family: letters as conditioning, latents of two channels, images of one pixel for each latent."""

    name = "alphabet"
    title = "Alphabet"
    encoders = ("letters",)
    parts: Mapping[str, tuple[str, ...]] = {
        "TextEncoder": ("letters",),
        "Denoiser": ("transformer", "scheduler"),
        "ControlNet": ("steering",),
        "VAE": ("pixels",),
    }
    adapter_parts = (AdapterPart(component="transformer", prefixes=("transformer.",)),)

    def owns_pipeline(self, class_name: str) -> bool:
        return class_name == "AlphabetPipeline"

    def owns_component(self, role: str, config: Mapping[str, Any]) -> bool:
        return role == "ControlNet" and config.get("alphabet") is True

    def load_text(self, source: SourceFolder, *, index: Mapping[str, Any], dtype: torch.dtype) -> TextModel:
        encoder = Scale(source.beside("letters"))
        return TextModel(encoders={"letters": encoder}, tokenizers=[Letters()], pipeline=None)

    def load_denoiser(self, folder: Path, *, dtype: torch.dtype, variant: str | None) -> torch.nn.Module:
        return Scale(folder)

    def load_control_net(self, folder: Path, *, dtype: torch.dtype, variant: str | None) -> torch.nn.Module:
        return Scale(folder)

    def load_vae(self, folder: Path, *, dtype: torch.dtype, variant: str | None) -> torch.nn.Module:
        return Scale(folder)

    def encode(
        self,
        text: TextModel,
        *,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | None,
        guidance: bool,
        device: torch.device,
    ) -> dict[str, torch.Tensor]:
        def letters(words: Sequence[str]) -> torch.Tensor:
            padded = [one[:LETTERS].ljust(LETTERS) for one in words]
            encoded: torch.Tensor = text.encoders["letters"](torch.tensor([[ord(c) / 128 for c in p] for p in padded]))
            return encoded

        encoded = {"letters": letters(prompts)}
        return encoded | ({"negative_letters": letters(negative_prompts or [""] * len(prompts))} if guidance else {})

    def embeds_guidance(self, network: torch.nn.Module) -> bool:
        return False

    def conditioning_shapes(self, network: torch.nn.Module) -> dict[str, Shape]:
        return {"letters": (1, LETTERS)}

    def latent_shape(self, network: torch.nn.Module, *, height: int, width: int) -> tuple[int, ...]:
        return (1, 2, height, width)

    def warm_up_side(self, network: torch.nn.Module) -> int:
        return 4

    def denoiser_inputs(
        self, network: torch.nn.Module, conditioning: Conditioning, *, guidance: Guidance, width: int, height: int
    ) -> dict[str, Any]:
        return {"letters": halves(conditioning, "letters", rows=guidance.rows)}

    def predict(
        self,
        network: torch.nn.Module,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        *,
        inputs: Mapping[str, Any],
        residuals: LazyResiduals | None,
    ) -> torch.Tensor:
        predicted: torch.Tensor = network(latents) + inputs["letters"].mean(1)[:, None, None, None]
        return predicted if residuals is None else predicted + residuals.wait().mid

    def control_net_inputs(
        self, network: torch.nn.Module, conditioning: Conditioning, *, rows: int, width: int, height: int
    ) -> dict[str, Any]:
        return {}

    def image_scale(self, network: torch.nn.Module) -> int:
        return 1

    def embed_control_image(self, network: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
        return image[:, :2]

    def residuals(
        self,
        network: torch.nn.Module,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        *,
        image: torch.Tensor,
        inputs: Mapping[str, Any],
    ) -> Residuals:
        return Residuals(down=(network(latents),), mid=network(image))

    def guess_factors(self, count: int) -> torch.Tensor:
        return torch.ones(count)

    def vae_geometry(self, vae: torch.nn.Module) -> VaeGeometry:
        return VaeGeometry(scale_factor=1, latent_channels=2)

    def decoding_modules(self, vae: torch.nn.Module) -> list[torch.nn.Module]:
        return [vae]

    def decode(self, vae: torch.nn.Module, latents: torch.Tensor) -> list[Image.Image | LatentflowError]:
        images = ((vae(latents)[:, 0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return [Image.fromarray(one.numpy(), "L").convert("RGB") for one in images]

    def layer_names(self, component: str, module: torch.nn.Module) -> Mapping[str, str]:
        return {}


@pytest.fixture
def alphabet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a fictitious pipeline, whose family is in the table."""
    monkeypatch.setattr(families, "FAMILIES", [*families.FAMILIES, Alphabet()])
    folder = tmp_path / "alphabet"
    weights = {"letters": 1.0, "transformer": 0.5, "pixels": 0.25, "steering": 0.1}
    for part, weight in weights.items():
        (folder / part).mkdir(parents=True)
        save_file({"weight": torch.tensor([weight])}, folder / part / "model.safetensors")
    (folder / "steering" / "config.json").write_text(json.dumps({"alphabet": True}))
    (folder / "scheduler").mkdir()
    scheduler = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {"_class_name": "AlphabetPipeline", "letters": ["alphabet", "Letters"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


async def image_of(stack: Stack, request: Request) -> Image.Image:
    result = await stack.denoise(request)
    decoded = await stack.stage("pixels").Decode(stage_pb2.DecodeRequest(latents=result.latents), timeout=SECONDS)
    return Image.open(io.BytesIO(decoded.image.data))


async def test_a_family_of_one_file_is_served_by_every_role(alphabet: Path) -> None:
    picture = Image.new("RGB", (8, 8), "white")
    async with started(alphabet.parent, "alphabet", controls={"steering": "steering"}) as stack:
        descriptions = [await stack.describe(name) for name in ("text", "base", "pixels", "steering")]
        assert {one.family for one in descriptions} == {"alphabet"}
        request = Request(side=8, steps=3, prompt="a")
        plain = await image_of(stack, request)
        assert plain.size == (8, 8)
        assert (await image_of(stack, request)).tobytes() == plain.tobytes()
        assert (await image_of(stack, Request(side=8, steps=3, prompt="zzzz"))).tobytes() != plain.tobytes()
        steered = Request(side=8, steps=3, prompt="a", controls=[("steering", picture, 1.0)])
        assert (await image_of(stack, steered)).tobytes() != plain.tobytes()


async def test_an_adapter_is_read_by_its_family(alphabet: Path) -> None:
    folder = alphabet / "loras"
    folder.mkdir()
    pair = {"transformer.x.lora_A.weight": torch.ones(1, 4), "transformer.x.lora_B.weight": torch.ones(4, 1)}
    save_file(pair, folder / "bold.safetensors")
    async with started(alphabet.parent, "alphabet", loras="loras") as stack:
        (described,) = (await stack.describe("styles")).lora_store.adapters
    assert (described.name, list(described.components), described.problem) == ("bold", ["transformer"], "")


def test_a_pipeline_of_no_family_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(Exception, match=r"holds a FluxPipeline; this server runs Stable Diffusion 1.x and 2.x, "):
        families.of_pipeline(tmp_path)


# What may name families: they themselves, documents, and what compares with diffusers' pipelines or trains one of them.
NAMING = re.compile(
    r"(nodes/latentflow_nodes/families|tests|docs|examples|bench|tools/gpu|models)/|(README|CHANGELOG)\.md|.*\.lock"
)


def test_no_other_file_of_the_repository_names_a_family() -> None:
    root = Path(families.__file__).parents[3]
    names = re.compile(r"sdxl|stable[-_ ]?diffusion|\bsd(15|xl|[12]?)\b", re.IGNORECASE)
    listed = subprocess.run(
        ["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    searched = [name for name in listed if not NAMING.match(name)]
    assert "gateway/latentflow_gateway/planning.py" in searched
    offenders = [name for name in searched if names.search((root / name).read_text(errors="ignore"))]
    assert offenders == []
