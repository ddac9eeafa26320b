"""Every name of a layer in published LoRA files means the layer that the file's trainer meant."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from diffusers import UNet2DConditionModel
from latentflow.errors import FailedPreconditionError
from latentflow.reasons import Reason
from latentflow_nodes import families
from latentflow_nodes.adapters import keys
from latentflow_nodes.adapters.layers import Layer
from latentflow_nodes.adapters.merger import Merger
from latentflow_nodes.families import layer_names
from support.adapters import OriginalUNet, layers_of, names_in_diffusers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

# The UNets' configurations as published.
SD15 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "sample_size": 64,
}
SD21 = SD15 | {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}
ORIGINAL = {
    "SD 1.5": OriginalUNet(channels=(320, 640, 1280, 1280), depths=(1, 1, 1, 0), middle_depth=1, blocks=2),
    "SDXL": OriginalUNet(channels=(320, 640, 1280), depths=(0, 2, 10), middle_depth=10, blocks=2, has_label=True),
}


@cache
def unet(name: str) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**{"SD 1.5": SD15, "SD 2.1": SD21, "SDXL": SDXL}[name])


@pytest.mark.parametrize("name", ["SD 1.5", "SD 2.1", "SDXL"])
def test_every_layer_of_a_unet_has_its_own_name_with_underscores(name: str) -> None:
    names = layer_names.of_unet(unet(name))
    layers = layers_of(unet(name))
    assert {layer: names.get(layer.replace(".", "_")) for layer in layers} == {layer: layer for layer in layers}


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL"])
def test_every_original_name_of_a_layer_means_what_it_means_in_a_checkpoint(name: str) -> None:
    names = layer_names.of_unet(unet(name))
    original = list(ORIGINAL[name].layers())
    found = {layer: names.get(layer.replace(".", "_")) for layer in original}
    assert found == names_in_diffusers(original, unet(name).config)
    assert set(found.values()) == set(layers_of(unet(name)))


def test_no_two_layers_of_a_unet_share_a_name() -> None:
    for name in ("SD 1.5", "SD 2.1", "SDXL"):
        layers = layers_of(unet(name))
        assert len({layer.replace(".", "_") for layer in layers}) == len(layers)


@pytest.mark.parametrize("cls", [CLIPTextModel, CLIPTextModelWithProjection])
def test_the_layers_of_text_encoders_have_their_names_of_all_releases(cls: type[torch.nn.Module]) -> None:
    config = CLIPTextConfig(num_hidden_layers=12, hidden_size=768, projection_dim=768)
    with torch.device("meta"):
        encoder = cls(config)
    names = layer_names.of_clip(encoder)
    reached = set()
    old = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
    for layer in range(12):
        block = f"encoder.layers.{layer}"
        for part in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.out_proj",
            "mlp.fc1",
            "mlp.fc2",
        ):
            parent, last = part.split(".")
            spelled = [f"{block}.{part}", f"text_model.{block}.{part}"]
            spelled += [f"text_model.{block}.{parent}.{old[last]}"] if last in old else []
            (target,) = {names[one.replace(".", "_")] for one in spelled}
            assert target.endswith(f"{block}.{part}")
            reached.add(target)
    if cls is CLIPTextModelWithProjection:
        reached.add(names["text_projection"])
    assert reached == set(layers_of(encoder))


@pytest.mark.parametrize(
    ("model", "key", "layer"),
    [
        # As in files of OneTrainer, kohya's scripts, LCM-LoRA, SDXL's offset LoRA and older diffusers.
        (
            "SDXL",
            "unet.output_blocks.5.1.transformer_blocks.1.ff.net.0.proj.lora_up.weight",
            "up_blocks.1.attentions.2",
        ),
        (
            "SDXL",
            "lora_unet_output_blocks_2_1_transformer_blocks_6_attn2_to_v.lora_down.weight",
            "up_blocks.0.attentions.2",
        ),
        ("SDXL", "lora_unet_down_blocks_1_resnets_0_time_emb_proj.lora_down.weight", "down_blocks.1.resnets.0"),
        ("SDXL", "lora_unet_input_blocks_3_0_op.alpha", "down_blocks.0.downsamplers.0.conv"),
        ("SDXL", "lora_unet_input_blocks_0_0.lora_down.weight", "conv_in"),
        ("SDXL", "unet.out.2.lora_down.weight", "conv_out"),
        ("SDXL", "lora_unet_label_emb_0_2.lora_down.weight", "add_embedding.linear_2"),
        (
            "SD 1.5",
            "lora_unet_up_blocks_3_resnets_0_conv_shortcut.lora_down.weight",
            "up_blocks.3.resnets.0.conv_shortcut",
        ),
        (
            "SD 1.5",
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight",
            "mid_block",
        ),
        ("SD 1.5", "lora_unet_output_blocks_2_1_conv.lora_down.weight", "up_blocks.0.upsamplers.0.conv"),
    ],
)
def test_a_key_of_a_published_file_means_its_layer(model: str, key: str, layer: str) -> None:
    (parsed,) = keys.parse([key], file="a", parts=families.adapter_parts()).values()
    assert parsed.component == "unet"
    assert layer_names.of_unet(unet(model))[parsed.layer.replace(".", "_")].startswith(layer)


@pytest.mark.parametrize(
    ("key", "component", "layer"),
    [
        # As OneTrainer writes them in its own format and in kohya's, and kohya's scripts.
        ("clip_l.text_model.encoder.layers.1.mlp.fc1.lora_down.weight", "text_encoder", "encoder.layers.1.mlp.fc1"),
        ("clip_g.text_model.encoder.layers.1.mlp.fc1.alpha", "text_encoder_2", "encoder.layers.1.mlp.fc1"),
        ("clip_g.text_projection.lora_up.weight", "text_encoder_2", "text_projection"),
        ("lora_te2_text_projection.lora_up.weight", "text_encoder_2", "text_projection"),
        (
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.alpha",
            "text_encoder",
            "encoder.layers.0.self_attn.q_proj",
        ),
    ],
)
def test_a_key_of_a_text_encoder_means_its_layer(key: str, component: str, layer: str) -> None:
    cls = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}[component]
    with torch.device("meta"):
        encoder = cls(CLIPTextConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=2))
    (parsed,) = keys.parse([key], file="a", parts=families.adapter_parts()).values()
    assert parsed.component == component
    assert layer_names.of_clip(encoder)[parsed.layer.replace(".", "_")].endswith(layer)


@pytest.mark.parametrize(
    ("model", "key"),
    [
        # Of Flux, of SD3, and of SDXL and SD 1.5 for each other.
        ("SDXL", "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"),
        ("SDXL", "lora_unet_single_transformer_blocks_0_attn_to_q_.lora_down.weight"),
        ("SDXL", "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"),
        ("SDXL", "lora_unet_up_blocks_3_attentions_0_proj_in.lora_down.weight"),
        ("SD 1.5", "lora_unet_output_blocks_2_1_transformer_blocks_6_attn2_to_v.lora_down.weight"),
        ("SD 1.5", "lora_unet_label_emb_0_0.lora_down.weight"),
    ],
)
def test_a_layer_of_another_base_model_is_refused(model: str, key: str) -> None:
    (parsed,) = keys.parse([key], file="a", parts=families.adapter_parts()).values()
    merger = Merger(unet(model), names=layer_names.of_unet(unet(model)), what="denoiser")
    with pytest.raises(FailedPreconditionError, match="trained for another base model") as caught:
        merger.check("a", {parsed.layer: Layer(a=torch.ones(2, 8), b=torch.ones(8, 2), alpha=2)})
    assert caught.value.reason == Reason.ADAPTER_MISMATCH


def test_the_cross_attention_of_another_base_model_is_refused_by_its_shape() -> None:
    name = "mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    layer = Layer(a=torch.ones(2, 768), b=torch.ones(1280, 2), alpha=2)
    Merger(unet("SD 1.5"), names=layer_names.of_unet(unet("SD 1.5")), what="denoiser").check("a", {name: layer})
    merger = Merger(unet("SDXL"), names=layer_names.of_unet(unet("SDXL")), what="denoiser")
    with pytest.raises(FailedPreconditionError, match=r"the layer of this denoiser is \[1280, 2048\]"):
        merger.check("a", {name: layer})
