"""LoRA files of every format give diffusers' result: latents within 1e-4. Rank and alpha differ everywhere."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model
from support import adapters
from support.adapters import OriginalUNet, Pair, Tensors
from support.packs import tiny_sdxl, tiny_v_prediction
from support.stack import Request, Stack, started

pytestmark = pytest.mark.asyncio(loop_scope="session")
FAMILIES = ["sd", "sdxl"]
LATENTS = 1e-4
# The tiny SDXL network in the original code.
ORIGINAL = OriginalUNet(channels=(16, 32), depths=(0, 2), middle_depth=2, blocks=1, has_label=True)
ATTENTION = ("to_q", "to_k", "to_v", "to_out", "q_proj", "k_proj", "v_proj", "out_proj")
TEXT = (*ATTENTION, "fc1", "fc2")
COMPONENTS = {"sd": ("unet", "text_encoder"), "sdxl": ("unet", "text_encoder", "text_encoder_2")}
KOHYA = {
    "sd": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "sdxl": {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
}
REQUEST = Request(side=32, steps=3, guidance_scale=3.0)


class Pack:
    """A tiny pipeline of a family, in diffusers, and a store's folder with LoRAs for it."""

    def __init__(self, family: str, root: Path) -> None:
        self.family = family
        self.root = root
        self.loras = root / "pack" / "loras"
        make = {"sd": tiny_v_prediction, "sdxl": tiny_sdxl}[family]
        make(root / "pack")
        if family == "sd":
            # The projections around the transformers are convolutions in 1.x, and linear in 2.x and SDXL.
            config = UNet2DConditionModel.load_config(root / "pack/unet") | {"use_linear_projection": False}
            UNet2DConditionModel.from_config(config).save_pretrained(root / "pack/unet")
        cls: Any = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}[family]
        self.pipe = cls.from_pretrained(root / "pack")
        self.pipe.set_progress_bar_config(disable=True)
        torch.manual_seed(5)
        for write in WRITERS:
            write(self)

    def pairs(self, component: str, *endings: str, ranks: tuple[int, ...] = (4,)) -> dict[str, Pair]:
        """Random A and B of a component's layers, whose ranks take turns, by the layer's name in diffusers."""
        layers = adapters.layers_of(getattr(self.pipe, component), *endings)
        return {
            name: adapters.pair(layer, ranks[number % len(ranks)])
            for number, (name, layer) in enumerate(layers.items())
        }

    def published(self, component: str, *endings: str, ranks: tuple[int, ...] = (4,)) -> dict[str, Pair]:
        """As `pairs`, by the names of releases before transformers 5: with `text_model.` in each text encoder."""
        pairs = self.pairs(component, *endings, ranks=ranks)
        if component == "unet":
            return pairs
        return {f"text_model.{name.removeprefix('text_model.')}": pair for name, pair in pairs.items()}

    def latents(self) -> torch.Tensor:
        made = self.pipe(
            prompt=REQUEST.prompt,
            width=REQUEST.side,
            height=REQUEST.side,
            num_inference_steps=REQUEST.steps,
            guidance_scale=REQUEST.guidance_scale,
            generator=torch.Generator().manual_seed(REQUEST.seed),
            output_type="latent",
        )
        latents: torch.Tensor = made.images
        return latents

    @contextlib.contextmanager
    def with_lora(self, name: str) -> Iterator[None]:
        """The pipeline with a file of the folder, loaded by diffusers; with PEFT's folders, loaded by PEFT."""
        if (self.loras / name).is_dir():
            models = {component: getattr(self.pipe, component) for component in COMPONENTS[self.family]}
            loaded = []
            for component, model in models.items():
                own = self.loras / name / component
                loaded.append(PeftModel.from_pretrained(model, own))
            try:
                yield
            finally:
                for one in loaded:
                    one.unload()
            return
        self.pipe.load_lora_weights(self.loras, weight_name=f"{name}.safetensors", adapter_name="a")
        try:
            yield
        finally:
            self.pipe.unload_lora_weights()


def _kohya_lora(pack: Pack) -> None:
    state: Tensors = {}
    for component, prefix in KOHYA[pack.family].items():
        endings = (*TEXT, "proj_in", "proj_out") if component == "unet" else TEXT
        state |= adapters.kohya(prefix, pack.published(component, *endings, ranks=(4, 2)), 1.0)
    adapters.save(pack.loras / "kohya-lora.safetensors", state)


def _kohya_locon(pack: Pack) -> None:
    """Every layer of the network, in the names that the family's trainer has for them."""
    pairs = pack.pairs("unet", ranks=(3, 5))
    if pack.family == "sdxl":
        names = adapters.names_in_diffusers(list(ORIGINAL.layers()), pack.pipe.unet.config)
        pairs = {original: pairs[name] for original, name in names.items()}
    state = adapters.kohya("lora_unet_", pairs, 2.0)
    for component, prefix in list(KOHYA[pack.family].items())[1:]:
        state |= adapters.kohya(prefix, pack.published(component, *TEXT), 2.0)
    adapters.save(pack.loras / "kohya-locon.safetensors", state)


def _diffusers_2023(pack: Pack) -> None:
    state: Tensors = {}
    for component in COMPONENTS[pack.family]:
        state |= adapters.diffusers_processor(component, pack.published(component, *ATTENTION, ranks=(4, 6)))
    adapters.save(pack.loras / "diffusers-processor.safetensors", state)


def _diffusers_linear_layer(pack: Pack) -> None:
    state: Tensors = {}
    for component in COMPONENTS[pack.family]:
        state |= adapters.diffusers_linear_layer(component, pack.published(component, *TEXT, ranks=(4, 6)))
    adapters.save(pack.loras / "diffusers-linear-layer.safetensors", state)


def _diffusers(pack: Pack) -> None:
    state: Tensors = {}
    for component in COMPONENTS[pack.family]:
        state |= adapters.diffusers(component, pack.published(component, *TEXT, ranks=(4, 6)))
    adapters.save(pack.loras / "diffusers.safetensors", state)


def _config(component: str, **settings: Any) -> LoraConfig:
    """A configuration with ranks and alphas by layer, rank-stabilised for every component but the first encoder."""
    query, key, other = ("to_q", "to_k", "conv1") if component == "unet" else ("q_proj", "k_proj", "fc1")
    return LoraConfig(
        r=4,
        lora_alpha=3,
        rank_pattern={key: 2, f"^.*{other}": 6},
        alpha_pattern={key: 5, f".*[02].*{other}": 9},
        use_rslora=component != "text_encoder",
        target_modules=[query, key, other],
        **settings,
    )


def _diffusers_with_config(pack: Pack) -> None:
    """As diffusers' scripts for training write them now, with the configuration in the header."""
    state: Tensors = {}
    header: dict[str, Any] = {}
    for component in COMPONENTS[pack.family]:
        for endings, rank in ((("to_q", "q_proj"), 4), (("to_k", "k_proj"), 2), (("conv1", "fc1"), 6)):
            state |= adapters.diffusers(component, pack.pairs(component, *endings, ranks=(rank,)))
        config = _config(component).to_dict()
        config["target_modules"] = sorted(config["target_modules"])
        header |= {f"{component}.{key}": value for key, value in config.items() if value is not None}
    adapters.save(pack.loras / "diffusers-config.safetensors", state, config=header)


def _peft(pack: Pack) -> None:
    for component in COMPONENTS[pack.family]:
        adapted = get_peft_model(getattr(pack.pipe, component), _config(component, init_lora_weights=False))
        adapted.save_pretrained(pack.loras / "peft" / component)
        adapted.unload()


def _text_alone(pack: Pack) -> None:
    state: Tensors = {}
    for component, prefix in list(KOHYA[pack.family].items())[1:]:
        state |= adapters.kohya(prefix, pack.published(component, *TEXT), 4.0)
    adapters.save(pack.loras / "text-alone.safetensors", state)


WRITERS: list[Callable[[Pack], None]] = [
    _kohya_lora,
    _kohya_locon,
    _diffusers_2023,
    _diffusers_linear_layer,
    _diffusers,
    _diffusers_with_config,
    _peft,
    _text_alone,
]
NAMES = [
    "kohya-lora",
    "kohya-locon",
    "diffusers-processor",
    "diffusers-linear-layer",
    "diffusers",
    "diffusers-config",
    "peft",
]


@pytest.fixture(scope="session")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pack]:
    return {family: Pack(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def stacks(packs: dict[str, Pack]) -> AsyncIterator[dict[str, Stack]]:
    async with contextlib.AsyncExitStack() as exits:
        yield {
            family: await exits.enter_async_context(started(pack.root, "pack", loras="loras"))
            for family, pack in packs.items()
        }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
async def test_a_lora_of_each_format_equals_diffusers(
    packs: dict[str, Pack], stacks: dict[str, Stack], family: str, name: str
) -> None:
    pack, stack = packs[family], stacks[family]
    described = {one.name: one for one in (await stack.describe("styles")).lora_store.adapters}
    assert (described[name].problem, set(described[name].components)) == ("", set(COMPONENTS[family]))
    plain = pack.latents()
    with pack.with_lora(name):
        expected = pack.latents()
    assert (expected - plain).abs().max().item() > 100 * LATENTS
    request = Request(
        side=REQUEST.side, steps=REQUEST.steps, guidance_scale=REQUEST.guidance_scale, loras=[(name, 1.0)]
    )
    latents, _ = await stack.generate(request)
    assert (latents - expected).abs().max().item() <= LATENTS


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_lora_of_the_text_encoders_alone_equals_diffusers(
    packs: dict[str, Pack], stacks: dict[str, Stack], family: str
) -> None:
    pack, stack = packs[family], stacks[family]
    encoders = set(COMPONENTS[family]) - {"unet"}
    described = {one.name: one for one in (await stack.describe("styles")).lora_store.adapters}
    assert set(described["text-alone"].components) == encoders
    plain = pack.latents()
    with pack.with_lora("text-alone"):
        expected = pack.latents()
    assert (expected - plain).abs().max().item() > 100 * LATENTS
    request = Request(
        side=REQUEST.side, steps=REQUEST.steps, guidance_scale=REQUEST.guidance_scale, loras=[("text-alone", 1.0)]
    )
    latents, _ = await stack.generate(request)
    assert (latents - expected).abs().max().item() <= LATENTS


@pytest.mark.parametrize("family", FAMILIES)
async def test_loras_of_two_formats_together_equal_diffusers(
    packs: dict[str, Pack], stacks: dict[str, Stack], family: str
) -> None:
    weights = {"kohya-lora": 0.7, "diffusers-config": -0.4}
    pack, stack = packs[family], stacks[family]
    for name in weights:
        pack.pipe.load_lora_weights(pack.loras, weight_name=f"{name}.safetensors", adapter_name=name)
    pack.pipe.set_adapters(list(weights), list(weights.values()))
    expected = pack.latents()
    pack.pipe.unload_lora_weights()
    request = Request(
        side=REQUEST.side, steps=REQUEST.steps, guidance_scale=REQUEST.guidance_scale, loras=list(weights.items())
    )
    latents, _ = await stack.generate(request)
    assert (latents - expected).abs().max().item() <= LATENTS
