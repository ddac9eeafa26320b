"""Weight files as they are published: what is missing in them is refused by name, and what is there makes diffusers' image."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from latentflow.errors import LatentflowError
from latentflow.internal import weight_names
from latentflow.reasons import Reason
from latentflow_nodes.server import serve
from latentflow_nodes.settings import NodeSettings
from PIL import Image
from safetensors.torch import load_file, save_file
from support.packs import SHAPES, tiny_sdxl
from support.reference import reference
from support.stack import Request, started

pytestmark = pytest.mark.asyncio(loop_scope="session")
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """A copy of the shapes pack."""
    shutil.copytree(SHAPES, tmp_path / "m")
    return tmp_path / "m"


async def refused(root: Path, role: str, **source: Any) -> LatentflowError:
    """The error with which the server of a source under `root` does not start."""
    settings = NodeSettings(role=role, model_root=root, identity="x", **{"uri": "m", **source})  # type: ignore[arg-type]
    with pytest.raises(LatentflowError) as caught:
        async with serve(settings):
            pass
    return caught.value


def change(file: Path, how: Callable[[Tensors], Tensors]) -> None:
    save_file(how(load_file(file)), file, metadata={"format": "pt"})


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if part not in key}


def cut(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: t[:-1].contiguous() if part in k else t for k, t in tensors.items()}


def wrapped(tensors: Tensors) -> Tensors:
    return {f"module.{key}": tensor for key, tensor in tensors.items()}


def extended(tensors: Tensors) -> Tensors:
    return tensors | {"model_ema.decay": torch.ones(1)}


NETWORK = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("role", "file", "how", "words"),
    [
        ("TextEncoder", "text_encoder/model.safetensors", wrapped, "unexpected module."),
        ("TextEncoder", "text_encoder/model.safetensors", without("layers.1."), "missing encoder.layers.1."),
        ("TextEncoder", "text_encoder/model.safetensors", cut("final_layer_norm.bias"), "not [96]"),
        ("Denoiser", f"unet/{NETWORK}", wrapped, "missing "),
        ("Denoiser", f"unet/{NETWORK}", extended, "unexpected model_ema.decay"),
        ("Denoiser", f"unet/{NETWORK}", cut("conv_in.bias"), "of another shape conv_in.bias ([63], not [64])"),
        (
            "VAE",
            f"vae/{NETWORK}",
            without("decoder.conv_out"),
            "missing decoder.conv_out.bias, decoder.conv_out.weight",
        ),
        ("ControlNet", f"controlnet-edges/{NETWORK}", without("controlnet_mid_block"), "missing controlnet_mid_block"),
    ],
)
async def test_weights_that_do_not_fit_their_configuration_are_refused_by_key(
    pack: Path, role: str, file: str, how: Callable[[Tensors], Tensors], words: str
) -> None:
    change(pack / file, how)
    subfolder = "controlnet-edges" if role == "ControlNet" else None
    error = await refused(pack.parent, role, subfolder=subfolder)
    assert error.reason == Reason.WEIGHTS_MISMATCH
    assert str((pack / file).parent) in error.message
    assert words in error.message


async def test_a_text_encoder_of_sdxl_without_its_projection_is_refused(tmp_path: Path) -> None:
    tiny_sdxl(tmp_path / "m")
    change(tmp_path / "m/text_encoder_2/model.safetensors", without("text_projection"))
    error = await refused(tmp_path, "TextEncoder")
    assert (
        "text_encoder_2 are not those that its configuration describes: missing text_projection.weight" in error.message
    )


async def test_old_names_of_attention_layers_load_as_in_diffusers(pack: Path) -> None:
    def old(tensors: Tensors) -> Tensors:
        words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        renamed = {}
        for key, tensor in tensors.items():
            for new, former in words.items():
                key = key.replace(f"mid_block.attentions.0.{new}.", f"mid_block.attentions.0.{former}.")
            renamed[key] = tensor
        return renamed

    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(pack / "vae") | {"mid_block_add_attention": True})
    vae.save_pretrained(pack / "vae")
    change(pack / f"vae/{NETWORK}", old)
    assert any("proj_attn" in key for key in load_file(pack / f"vae/{NETWORK}"))
    await equals_diffusers(pack)


async def test_a_buffer_that_earlier_versions_saved_is_no_unexpected_key(pack: Path) -> None:
    ids = {"embeddings.position_ids": torch.arange(32)[None]}
    change(pack / "text_encoder/model.safetensors", lambda tensors: tensors | ids)
    await equals_diffusers(pack)


@pytest.mark.parametrize("lost", [["vocab.json", "tokenizer.json"], ["merges.txt", "tokenizer.json"]])
async def test_a_tokenizer_without_its_vocabulary_is_refused(pack: Path, lost: list[str]) -> None:
    for name in lost:
        (pack / "tokenizer" / name).unlink()
    error = await refused(pack.parent, "TextEncoder")
    assert "tokenizer holds no tokenizer: neither tokenizer.json nor vocab.json and merges.txt" in error.message


async def test_a_tokenizer_without_its_configuration_is_refused(pack: Path) -> None:
    (pack / "tokenizer/tokenizer_config.json").unlink()
    error = await refused(pack.parent, "TextEncoder")
    assert "tokenizer lacks tokenizer_config.json, which states the longest prompt" in error.message


async def test_a_tokenizer_of_another_encoder_is_refused(pack: Path) -> None:
    file = pack / "tokenizer/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 77}))
    error = await refused(pack.parent, "TextEncoder")
    assert "a model_max_length of 77; the encoder has 601 and 32" in error.message


async def equals_diffusers(pack: Path, *, variant: str | None = None, **servers: Any) -> None:
    """Asserts that the servers of a pack make the image of diffusers."""
    async with started(pack.parent, pack.name, variant=variant, own=servers) as stack:
        _, image = await stack.generate(Request())
    pipeline = StableDiffusionPipeline.from_pretrained(pack, variant=variant, dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    request = Request()
    expected: Image.Image = pipeline(
        request.prompt,
        width=request.side,
        height=request.side,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
    ).images[0]
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


# Variants


def half(folder: Path, *, shard: str = "10GB") -> Path:
    """The shapes pack with half-precision files only."""
    pipeline = StableDiffusionPipeline.from_pretrained(SHAPES, safety_checker=None)
    pipeline.to(dtype=torch.float16).save_pretrained(folder, variant="fp16", max_shard_size=shard)
    return folder


@pytest.mark.parametrize("role", ["TextEncoder", "Denoiser", "VAE"])
async def test_a_folder_with_a_variant_only_is_refused_with_the_field_to_set(tmp_path: Path, role: str) -> None:
    half(tmp_path / "m")
    error = await refused(tmp_path, role)
    assert "holds its weights only as the variant fp16. Set source.variant: fp16" in error.message


@pytest.mark.parametrize("shard", ["10GB", "200KB"])
async def test_a_variant_equals_diffusers(tmp_path: Path, shard: str) -> None:
    folder = half(tmp_path / "m", shard=shard)
    assert any("-of-" in path.name for path in folder.rglob("*.safetensors")) == (shard == "200KB")
    await equals_diffusers(folder, variant="fp16")


async def test_a_variant_that_is_not_there_is_refused_with_those_that_are(pack: Path) -> None:
    error = await refused(pack.parent, "VAE", variant="bf16")
    assert "no weights of the variant 'bf16'; it holds files without a variant. Correct source.variant" in error.message


async def test_an_index_without_the_metadata_that_loaders_read_is_refused(pack: Path) -> None:
    file, shard = pack / f"vae/{NETWORK}", "diffusion_pytorch_model-00001-of-00001.safetensors"
    weight_map = dict.fromkeys(load_file(file), shard)
    file.rename(file.with_name(shard))
    file.with_name(f"{NETWORK}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "index.json has no metadata" in (await refused(pack.parent, "VAE")).message


async def test_a_part_that_an_index_names_and_the_folder_lacks_is_named(tmp_path: Path) -> None:
    folder = half(tmp_path / "m", shard="200KB")
    lost = sorted((folder / "unet").glob("*-of-*"))[1]
    lost.unlink()
    error = await refused(tmp_path, "Denoiser", variant="fp16")
    assert f"names {lost.name}, which" in error.message


async def test_the_error_for_a_truncated_weights_file_names_it(pack: Path) -> None:
    broken = next((pack / "vae").glob("*.safetensors"))
    broken.write_bytes(broken.read_bytes()[:-100])
    assert f"{broken.name} is damaged or incomplete" in (await refused(pack.parent, "VAE")).message


async def test_weights_in_a_pickle_file_are_refused(pack: Path) -> None:
    weights = next((pack / "unet").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    assert "Weights load from safetensors only" in (await refused(pack.parent, "Denoiser")).message


async def test_a_damaged_file_of_another_variant_does_not_matter(pack: Path) -> None:
    (pack / "vae/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"half")
    async with serve(NodeSettings(role="VAE", uri="m", model_root=pack.parent, identity="x")) as node:
        assert node.address


@pytest.mark.parametrize(
    ("found", "variant", "words"),
    [
        (["model.non_ema.safetensors"], None, "only as the variant non_ema"),
        (["model.fp16-00001-of-00002.safetensors"], None, "only as the variant fp16"),
        (["model-00001-of-00002.fp16.safetensors"], None, "only as the variant fp16"),
        (["model-00001-of-00002.safetensors"], None, "without their index"),
        (["model.safetensors"], None, "holds model.safetensors and no config.json that describes it"),
        (["model.fp16.safetensors"], "fp16", "holds model.fp16.safetensors and no config.json that describes it"),
        (["model.safetensors", "config.json"], None, "and this role reads diffusion_pytorch_model*.safetensors"),
        (["model.bin", "model.fp16.bin"], "fp16", "holds a pickle (model.bin) and no safetensors"),
        (["weights.safetensors"], None, "holds weights.safetensors, which is not the name"),
        (["config.json"], None, "holds no *.safetensors file"),
    ],
)
async def test_the_refusal_of_weights_says_what_is_there(found: list[str], variant: str | None, words: str) -> None:
    assert words in weight_names.refusal("vae", found, variant=variant).message


# Components of their own


async def test_a_vae_of_its_own_equals_diffusers(pack: Path) -> None:
    (pack.parent / "better").mkdir()
    (pack / "vae").rename(pack.parent / "better/vae")
    shutil.copytree(pack.parent / "better/vae", pack / "vae")
    await equals_diffusers(pack, pixels={"uri": "better/vae"})
    await equals_diffusers(pack, pixels={"uri": "better", "subfolder": "vae"})


async def test_an_sdxl_vae_of_its_own_serves_sdxl(tmp_path: Path) -> None:
    tiny_sdxl(tmp_path / "m")
    config = tmp_path / "m/vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.13025}))
    shutil.copytree(tmp_path / "m/vae", tmp_path / "better")
    async with started(tmp_path, "m", own={"pixels": {"uri": "better"}}) as stack:
        assert (await stack.describe("pixels")).family == "sdxl"
        _, image = await stack.generate(Request(side=32))
    _, expected = reference(tmp_path / "m", Request(side=32), xl=True)
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


async def test_a_denoiser_of_its_own_needs_its_scheduler(pack: Path) -> None:
    shutil.copytree(pack / "unet", pack.parent / "tuned")
    error = await refused(pack.parent, "Denoiser", uri="tuned")
    assert "without the scheduler that it was trained for. Copy scheduler/scheduler_config.json" in error.message
    shutil.copy(pack / "scheduler/scheduler_config.json", pack.parent / "tuned")
    await equals_diffusers(pack, base={"uri": "tuned"})
    (pack.parent / "tuned/scheduler").mkdir()
    (pack.parent / "tuned/scheduler_config.json").rename(pack.parent / "tuned/scheduler/scheduler_config.json")
    await equals_diffusers(pack, base={"uri": "tuned"})


async def test_a_text_encoder_of_its_own_needs_its_tokenizer(pack: Path) -> None:
    shutil.copytree(pack / "text_encoder", pack.parent / "words")
    error = await refused(pack.parent, "TextEncoder", uri="words")
    assert "words holds no tokenizer" in error.message
    shutil.copytree(pack / "tokenizer", pack.parent / "words/tokenizer")
    await equals_diffusers(pack, text={"uri": "words"})
    for file in (pack / "tokenizer").iterdir():
        shutil.copy(file, pack.parent / "words")
    shutil.rmtree(pack.parent / "words/tokenizer")
    await equals_diffusers(pack, text={"uri": "words"})


@pytest.mark.parametrize(
    ("role", "component", "words"),
    [
        ("VAE", "unet", "the component UNet2DConditionModel, which is no VAE of Stable Diffusion 1.x"),
        ("Denoiser", "vae", "the component AutoencoderKL, which is no Denoiser of"),
        ("TextEncoder", "unet", "the component UNet2DConditionModel, which is no TextEncoder of"),
        ("ControlNet", "unet", "the component UNet2DConditionModel, which is no ControlNet of"),
        ("VAE", "tokenizer", "holds no VAE: its config.json is missing"),
    ],
)
async def test_a_component_of_another_role_is_refused_as_what_it_is(
    tmp_path: Path, role: str, component: str, words: str
) -> None:
    shutil.copytree(SHAPES / component, tmp_path / "m")
    assert words in (await refused(tmp_path, role)).message


async def test_a_component_of_another_role_in_a_pipeline_is_refused_as_what_it_is(pack: Path) -> None:
    error = await refused(pack.parent, "Denoiser", subfolder="vae")
    assert error.reason == Reason.UNSUPPORTED_FAMILY
    assert "m/vae is of the class AutoencoderKL instead of UNet2DConditionModel" in error.message


@pytest.mark.parametrize(
    ("subfolder", "words"),
    [
        ("unet", "m/unet is no text encoder of Stable Diffusion 1.x and 2.x: its text encoders are in text_encoder."),
        ("text_encoder_9", "There is no weights folder"),
    ],
)
async def test_a_text_encoder_does_not_serve_another_folder_than_its_subfolder(
    pack: Path, subfolder: str, words: str
) -> None:
    assert words in (await refused(pack.parent, "TextEncoder", subfolder=subfolder)).message


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"uri": "absent"}, "check the uri, the subfolder and the model root (--model-root)."),
        ({"uri": "one/two/all.safetensors"}, "check the uri and the model root (--model-root)."),
        ({"uri": "org/repo"}, "the model root (--model-root); for the repository of a hub, write hf://org/repo."),
        ({"uri": "file:///absent"}, "check the uri and the subfolder."),
        ({"uri": "file:///absent/all.safetensors"}, "check the uri."),
    ],
)
async def test_a_missing_source_is_refused_with_what_to_check(
    tmp_path: Path, source: dict[str, str], words: str
) -> None:
    assert (await refused(tmp_path, "VAE", **source)).message.endswith(words)


async def test_a_configuration_with_a_value_of_another_type_is_refused_in_one_line(pack: Path) -> None:
    config = pack / "vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"latent_channels": True}))
    error = await refused(pack.parent, "VAE")
    assert "VAE m does not load: TypeError: " in error.message
    assert "\n" not in error.message


async def test_an_inpainting_denoiser_is_refused_before_it_is_loaded(pack: Path) -> None:
    config = UNet2DConditionModel.load_config(pack / "unet")
    UNet2DConditionModel.from_config(config | {"in_channels": 9}).save_pretrained(pack / "unet")
    error = await refused(pack.parent, "Denoiser")
    assert error.reason == Reason.UNSUPPORTED_FAMILY
    assert "unet is an inpainting network, which takes a mask and a masked image (9 input channels" in error.message


@pytest.mark.parametrize(("role", "part"), [("Denoiser", "unet"), ("VAE", "vae"), ("TextEncoder", "text_encoder")])
async def test_quantised_weights_are_refused_by_their_method(pack: Path, role: str, part: str) -> None:
    config = pack / part / "config.json"
    method = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    config.write_text(json.dumps(json.loads(config.read_text()) | method))
    error = await refused(pack.parent, role)
    assert error.reason == Reason.UNSUPPORTED_FAMILY
    assert f"The weights in {pack / part} are quantised (bitsandbytes)" in error.message


async def test_a_text_encoder_whose_weights_are_not_finite_does_not_start(pack: Path) -> None:
    def overflow(tensors: Tensors) -> Tensors:
        return {k: torch.full_like(t, torch.nan) if "final_layer_norm.w" in k else t for k, t in tensors.items()}

    change(pack / "text_encoder/model.safetensors", overflow)
    error = await refused(pack.parent, "TextEncoder")
    assert error.reason == Reason.NOT_FINITE
    assert "The embeddings of the text encoder are not finite in float32." in error.message


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
async def test_weights_in_integers_are_refused_as_quantised(pack: Path, dtype: torch.dtype) -> None:
    change(pack / f"vae/{NETWORK}", lambda tensors: {key: tensor.to(dtype) for key, tensor in tensors.items()})
    error = await refused(pack.parent, "VAE")
    assert error.reason == Reason.UNSUPPORTED_FAMILY
    assert f"vae/{NETWORK} has quantised weights (" in error.message


@pytest.mark.parametrize("sides", [[8, 16], [8, 8], -8, 0, None])
async def test_a_denoiser_starts_whatever_size_its_configuration_names(pack: Path, sides: Any) -> None:
    config = pack / "unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": sides}))
    async with serve(NodeSettings(role="Denoiser", model_root=pack.parent, identity="x", uri="m")) as node:
        assert node.address


@pytest.mark.parametrize("length", [0, 1, 2, "77", None])
async def test_a_tokenizer_whose_longest_prompt_is_impossible_is_refused(pack: Path, length: Any) -> None:
    config = pack / "tokenizer/tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": length}))
    error = await refused(pack.parent, "TextEncoder")
    assert "601 tokens and a model_max_length of " in error.message


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
async def test_a_pointer_of_git_lfs_in_place_of_a_tokenizer_is_named(pack: Path, file: str) -> None:
    (pack / "tokenizer" / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    error = await refused(pack.parent, "TextEncoder")
    assert f"tokenizer/{file} is a pointer of Git LFS instead of the file" in error.message


async def test_weights_without_a_format_in_their_header_load_as_in_diffusers(pack: Path) -> None:
    for file in pack.glob("*/*.safetensors"):
        save_file(load_file(file), file)
    async with started(pack.parent, "m") as stack:
        _, image = await stack.generate(Request())
    assert image.tobytes() == reference(SHAPES, Request())[1].tobytes()


# file: URIs


@pytest.mark.parametrize("written", ["file://{}/my%20models/what%3F/m", "file://localhost{}/my models/what%3F/m"])
async def test_a_file_uri_is_decoded(tmp_path: Path, written: str) -> None:
    shutil.copytree(SHAPES / "vae", tmp_path / "my models/what?/m")
    async with serve(NodeSettings(role="VAE", uri=written.format(tmp_path), identity="x")) as node:
        assert node.address


@pytest.mark.parametrize("uri", ["file://server/models/m", "file:///models/m?x=1", "file:///models/m#a", "file:models"])
async def test_a_uri_that_names_no_file_of_this_machine_is_refused(tmp_path: Path, uri: str) -> None:
    assert f"Source '{uri}' cannot be read" in (await refused(tmp_path, "VAE", uri=uri)).message
