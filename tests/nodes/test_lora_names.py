"""Every name of a layer in published LoRA files means the layer that the file's trainer meant."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from diffusers import UNet2DConditionModel
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
