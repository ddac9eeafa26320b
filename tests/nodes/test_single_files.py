"""Single files, with all weights of a model, are served as diffusers loads them, or refused with what is missing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from latentflow.errors import LatentflowError
from latentflow.reasons import Reason
from latentflow_nodes.families.single_file_configs import CONFIGS
from latentflow_nodes.server import serve
from latentflow_nodes.settings import NodeSettings
from PIL import Image
from safetensors.torch import load_file, save_file
from support import single_files
from support.packs import SHAPES, tiny_sdxl
from support.reference import reference
from support.stack import Request, started
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The shapes pack as a single file."""
    return single_files.written(SHAPES, tmp_path / "one")


async def refused(file: Path, role: str, **source: Any) -> LatentflowError:
    uri = f"{file.parent.name}/{file.name}"
    settings = NodeSettings(role=role, model_root=file.parent.parent, identity="x", **{"uri": uri, **source})  # type: ignore[arg-type]
    with pytest.raises(LatentflowError) as caught:
        async with serve(settings):
            pass
    return caught.value


def equal(image: Image.Image, expected: Image.Image) -> bool:
    return bool(np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1)


@pytest.mark.parametrize("written", ["one", "one/{}", "file://{root}/one/{}"])
async def test_a_single_file_of_stable_diffusion_equals_diffusers(file: Path, written: str) -> None:
    uri = written.format(file.name, root=file.parent.parent)
    async with started(file.parent.parent, uri) as stack:
        assert (await stack.describe("base")).family == "sd"
        _, image = await stack.generate(Request())
    assert equal(image, reference(SHAPES, Request())[1])


async def test_what_published_files_have_beside_the_weights_changes_nothing(file: Path) -> None:
    tensors = load_file(file)
    averages = {
        f"model_ema.{key.removeprefix('model.').replace('.', '')}": 2 * tensor for key, tensor in tensors.items()
    }
    others = {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(32, dtype=torch.float16)[None],
        "alphas_cumprod": torch.ones(1000),
        "global_step": torch.tensor(5),
    }
    save_file(tensors | averages | others, file)
    async with started(file.parent.parent, "one") as stack:
        _, image = await stack.generate(Request())
    assert equal(image, reference(SHAPES, Request())[1])


async def test_a_single_file_with_the_text_encoder_of_version_2_equals_diffusers(tmp_path: Path) -> None:
    file = single_files.written(SHAPES, tmp_path / "one", second_version=True)
    assert any(key.startswith("cond_stage_model.model.transformer.resblocks.") for key in load_file(file))
    async with started(tmp_path, "one") as stack:
        _, image = await stack.generate(Request())
    assert equal(image, reference(SHAPES, Request())[1])


def large_sdxl(folder: Path) -> Path:
    """A tiny SDXL pipeline whose second text encoder has as many layers as diffusers knows SDXL by."""
    tiny_sdxl(folder)
    config = CLIPTextConfig.from_pretrained(folder / "text_encoder_2")
    config.update({"num_hidden_layers": 10, "hidden_size": 48, "projection_dim": 48, "eos_token_id": 2})
    torch.manual_seed(5)
    CLIPTextModelWithProjection(config).save_pretrained(folder / "text_encoder_2")
    unet = UNet2DConditionModel.load_config(folder / "unet")
    wider = {"cross_attention_dim": 80, "projection_class_embeddings_input_dim": 96}
    UNet2DConditionModel.from_config(unet | wider).save_pretrained(folder / "unet")
    return folder


async def test_a_single_file_of_sdxl_equals_diffusers(tmp_path: Path) -> None:
    root = large_sdxl(tmp_path / "m")
    file = single_files.written(root, tmp_path / "one", xl=True)
    request = Request(side=32, negative_prompt="a blue star")
    async with started(tmp_path, "one") as stack:
        assert (await stack.describe("text")).family == "sdxl"
        _, image = await stack.generate(request)
    assert equal(image, reference(root, request, xl=True)[1])
    shutil.copy(root / "model_index.json", file.parent)
    single = StableDiffusionXLPipeline.from_single_file(str(file), config=str(file.parent), local_files_only=True)
    own = single.text_encoder_2.state_dict()
    whole = CLIPTextModelWithProjection.from_pretrained(root / "text_encoder_2").state_dict()
    assert all(torch.equal(own[key], whole[key]) for key in whole)


async def test_a_single_file_without_a_tokenizer_beside_it_is_refused(file: Path) -> None:
    shutil.rmtree(file.parent / "tokenizer")
    error = await refused(file, "TextEncoder")
    assert "one/tokenizer holds no tokenizer" in error.message
    assert "Copy the tokenizer of the base model there" in error.message


@pytest.mark.parametrize(
    ("role", "lost", "words"),
    [
        ("Denoiser", "model.diffusion_model.middle_block.1", "weights of unet"),
        ("VAE", "first_stage_model.decoder.conv_out", "weights of vae"),
        ("TextEncoder", "cond_stage_model.transformer.text_model.final_layer_norm", "weights of text_encoder"),
    ],
)
async def test_a_single_file_without_some_weights_is_refused_by_key(
    file: Path, role: str, lost: str, words: str
) -> None:
    save_file({key: tensor for key, tensor in load_file(file).items() if not key.startswith(lost)}, file)
    error = await refused(file, role)
    assert error.reason == Reason.WEIGHTS_MISMATCH
    assert words in error.message
    assert "missing " in error.message


@pytest.mark.parametrize(("role", "part"), [("Denoiser", "unet"), ("VAE", "vae"), ("TextEncoder", "text_encoder")])
async def test_a_file_of_other_sizes_than_the_built_in_ones_is_refused_with_the_remedy(
    file: Path, role: str, part: str
) -> None:
    (file.parent / part / "config.json").unlink()
    error = await refused(file, role)
    assert error.reason == Reason.WEIGHTS_MISMATCH
    assert (
        f"{part}/config.json beside it, so the built-in configuration of Stable Diffusion 1.5 was assumed"
        in error.message
    )
    assert f"put its config.json into {file.parent / part}." in error.message


async def test_a_single_file_without_a_text_encoder_is_refused_by_its_prefix(file: Path) -> None:
    save_file({key: value for key, value in load_file(file).items() if not key.startswith("cond_stage_model.")}, file)
    error = await refused(file, "TextEncoder")
    assert error.reason == Reason.WEIGHTS_MISMATCH
    assert "contains no weights of text_encoder: no key begins with cond_stage_model.transformer." in error.message


async def test_a_text_encoder_of_another_shape_is_refused_by_key(file: Path) -> None:
    key = "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"
    save_file(load_file(file) | {key: torch.ones(99, 32)}, file)
    error = await refused(file, "TextEncoder")
    assert error.reason == Reason.WEIGHTS_MISMATCH
    assert "of another shape embeddings.position_embedding.weight ([99, 32], not " in error.message


async def test_a_single_file_may_have_the_name_of_a_components_weights(file: Path) -> None:
    file.rename(file.parent / "model.safetensors")
    async with started(file.parent.parent, "one") as stack:
        assert (await stack.describe("base")).family == "sd"
        _, image = await stack.generate(Request())
    assert equal(image, reference(SHAPES, Request())[1])


async def test_a_single_file_of_another_kind_is_refused_as_what_it_is(file: Path) -> None:
    shutil.rmtree(file.parent / "unet")
    tensors = load_file(file)
    wide = torch.zeros(64, 9, 3, 3)
    save_file(tensors | {"model.diffusion_model.input_blocks.0.0.weight": wide}, file)
    assert (
        "is a single file of the kind inpainting; this version serves v1, v2, xl_base"
        in (await refused(file, "Denoiser")).message
    )


@pytest.mark.parametrize("role", ["Denoiser", "VAE", "TextEncoder"])
@pytest.mark.parametrize("configurations", ["beside it", "absent"])
async def test_a_lora_in_place_of_a_model_is_refused_as_one(file: Path, role: str, configurations: str) -> None:
    if configurations == "absent":
        for part in ("unet", "vae", "text_encoder", "scheduler"):
            shutil.rmtree(file.parent / part)
    pair = {f"lora_unet_mid_block.lora_{name}.weight": torch.ones(2, 2) for name in ("down", "up")}
    save_file(pair, file)
    assert f"{file} is a LoRA (key {next(iter(pair))}). Put it into the folder" in (await refused(file, role)).message


@pytest.mark.parametrize("role", ["Denoiser", "VAE", "TextEncoder"])
async def test_a_single_file_with_quantised_weights_is_refused(file: Path, role: str) -> None:
    key = "model.diffusion_model.input_blocks.1.1.proj_in.scale_weight"
    save_file(load_file(file) | {key: torch.ones(1)}, file)
    error = await refused(file, role)
    assert error.reason == Reason.UNSUPPORTED_FAMILY
    assert f"{file} has quantised weights ({key}, of the type F32)" in error.message


async def test_a_single_file_that_predicts_something_else_needs_its_scheduler(file: Path) -> None:
    (file.parent / "scheduler/scheduler_config.json").unlink()
    save_file(load_file(file) | {"v_pred": torch.zeros(0)}, file)
    error = await refused(file, "Denoiser")
    assert "does not determine what its network predicts. Put scheduler/scheduler_config.json" in error.message


async def test_a_vae_file_alone_needs_its_configuration(tmp_path: Path) -> None:
    file = tmp_path / "one/better-vae.safetensors"
    file.parent.mkdir()
    vae = AutoencoderKL.from_pretrained(SHAPES / "vae")
    save_file(single_files.vae(vae, vae.state_dict(), prefix=""), file)
    error = await refused(file, "VAE")
    assert "is not a file of a whole model, and there is no vae/config.json beside it" in error.message
    shutil.copy(SHAPES / "vae/config.json", file.parent)
    shutil.copytree(SHAPES, tmp_path / "m")
    async with started(tmp_path, "m", own={"pixels": {"uri": "one"}}) as stack:
        _, image = await stack.generate(Request())
    assert equal(image, reference(SHAPES, Request())[1])


@pytest.mark.parametrize(
    ("role", "source", "words"),
    [
        ("VAE", {"variant": "fp16"}, "it is a file and has no variant; remove that field"),
        ("VAE", {"subfolder": "vae"}, "it is a file and has no subfolder; remove that field"),
        ("LoRAStore", {}, "a LoRA store reads a folder; name the folder of the file"),
        ("VAE", {"uri": "one/absent.safetensors"}, "There is no file"),
        ("ControlNet", {}, "a single file of the kind v1, which has no controlnet"),
    ],
)
async def test_a_source_that_a_single_file_cannot_be_is_refused(
    file: Path, role: str, source: dict[str, Any], words: str
) -> None:
    assert words in (await refused(file, role, **source)).message


# The published sizes of the networks.
PARAMETERS = {
    ("v1", "unet"): 859_520_964,
    ("v1", "vae"): 83_653_863,
    ("v1", "text_encoder"): 123_060_480,
    ("v2", "unet"): 865_910_724,
    ("v2", "text_encoder"): 340_387_840,
    ("xl_base", "unet"): 2_567_463_684,
    ("xl_base", "text_encoder_2"): 694_659_840,
}


@pytest.mark.parametrize(("kind", "part"), PARAMETERS)
async def test_the_built_in_configurations_give_networks_of_the_published_sizes(kind: str, part: str) -> None:
    assert sum(parameter.numel() for parameter in empty(kind, part).parameters()) == PARAMETERS[kind, part]


@pytest.mark.parametrize("kind", sorted(CONFIGS))
async def test_a_single_file_of_full_size_has_every_key_of_the_built_in_configuration(kind: str) -> None:
    unet, vae = empty(kind, "unet"), empty(kind, "vae")
    made = single_files.unet(unet, unet.state_dict()) | single_files.vae(vae, vae.state_dict())
    assert convert_ldm_unet_checkpoint(made, CONFIGS[kind]["unet"]).keys() == unet.state_dict().keys()
    assert convert_ldm_vae_checkpoint(made, CONFIGS[kind]["vae"]).keys() == vae.state_dict().keys()


def empty(kind: str, part: str) -> Any:
    """A network without values."""
    config = CONFIGS[kind][part]
    with init_empty_weights():
        if part == "unet":
            return UNet2DConditionModel.from_config(config)
        if part == "vae":
            return AutoencoderKL.from_config(config)
        return getattr(transformers, config["architectures"][0])(CLIPTextConfig(**config))


async def test_a_damaged_single_file_is_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])
    assert "is damaged or incomplete" in (await refused(file, "VAE")).message


async def test_of_several_single_files_one_has_to_be_named(file: Path) -> None:
    shutil.copy(file, file.parent / "another.safetensors")
    for part in ("unet", "vae"):
        shutil.rmtree(file.parent / part)
    error = await refused(file, "VAE", uri="one")
    assert "holds all-in_one.v1.safetensors, another.safetensors, which is not the name" in error.message
    assert "name it in the uri" in error.message


@pytest.mark.parametrize("uri", ["one", "one/model.ckpt"])
async def test_a_single_pickle_is_refused_as_one(tmp_path: Path, uri: str) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one/model.ckpt").write_bytes(b"pickle")
    error = await refused(tmp_path / "one/model.ckpt", "Denoiser", uri=uri)
    assert error.reason == Reason.PICKLE_REFUSED
    assert "'Convert a pickle' in docs/weights.md" in error.message
