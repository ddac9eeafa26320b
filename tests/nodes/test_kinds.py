"""Networks of other kinds than text-to-image are told apart by their configurations."""

from __future__ import annotations

from typing import Any

import pytest
from latentflow_nodes.families import kinds

UNET = {"_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4}
NET = {"_class_name": "ControlNetModel", "in_channels": 4}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"in_channels": 9}, "an inpainting network"),
        ({"in_channels": 8}, "InstructPix2Pix"),
        ({"in_channels": 7, "num_class_embeds": 1000}, "an upscaler"),
        ({"in_channels": 5}, "depth-to-image"),
        ({"in_channels": 12}, "more than latents (12 input channels, 4 output channels)"),
        ({"class_embed_type": "projection"}, "class embeddings"),
        ({"num_class_embeds": 10}, "class embeddings"),
        ({"encoder_hid_dim_type": "image_proj"}, "takes image_proj"),
        ({"addition_embed_type": "text_image"}, "additional embeddings of the type text_image"),
        (
            {
                "addition_embed_type": "text_time",
                "cross_attention_dim": 1280,
                "projection_class_embeddings_input_dim": 2560,
            },
            "the refiner of SDXL",
        ),
        ({"_class_name": "UNetMotionModel"}, "of the class UNetMotionModel instead of UNet2DConditionModel"),
    ],
)
def test_a_denoiser_of_another_kind_is_named(changes: dict[str, Any], words: str) -> None:
    assert words in str(kinds.of_denoiser(UNET | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"conditioning_channels": 6}, "images of 6 channels"),
        ({"controlnet_conditioning_channel_order": "grb"}, "unknown channel order 'grb'"),
        ({"global_pool_conditions": True}, "such as shuffle"),
        ({"class_embed_type": "timestep"}, "class embeddings"),
        ({"encoder_hid_dim_type": "text_proj"}, "takes text_proj"),
        ({"addition_embed_type": "text"}, "additional embeddings of the type text"),
        ({"_class_name": "ControlNetUnionModel"}, "of the class ControlNetUnionModel instead of ControlNetModel"),
        ({"_class_name": "ControlNetXSAdapter"}, "of the class ControlNetXSAdapter instead of ControlNetModel"),
    ],
)
def test_a_controlnet_of_another_kind_is_named(changes: dict[str, Any], words: str) -> None:
    assert words in str(kinds.of_control_net(NET | changes))


def test_an_autoencoder_of_another_kind_is_named() -> None:
    assert "AutoencoderTiny" in str(kinds.of_vae({"_class_name": "AutoencoderTiny"}))
    for scale in (None, 0, "1", True, float("inf"), float("nan")):
        assert "no number above 0" in str(kinds.of_vae({"_class_name": "AutoencoderKL", "scaling_factor": scale}))
    assert "6 channels" in str(kinds.of_vae({"_class_name": "AutoencoderKL", "out_channels": 6}))


def test_text_to_image_networks_are_accepted() -> None:
    xl = {"addition_embed_type": "text_time", "cross_attention_dim": 2048}
    for config in (UNET, UNET | xl, UNET | {"time_cond_proj_dim": 256}):
        assert kinds.of_denoiser(config) is None
    for config in (NET, NET | xl, NET | {"controlnet_conditioning_channel_order": "bgr"}):
        assert kinds.of_control_net(config) is None


def test_an_autoencoder_alone_belongs_to_the_family_whose_latents_it_makes() -> None:
    plain: dict[str, Any] = {"_class_name": "AutoencoderKL"}
    assert [kinds.is_xl_vae(plain | scale) for scale in ({}, {"scaling_factor": 0.13025})] == [False, True]
    assert not kinds.is_text_to_image_vae(plain | {"latent_channels": 16, "shift_factor": 0.1159})
