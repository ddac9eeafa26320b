"""Which networks the UNet families run, by their configurations: text-to-image ones, and what every other one is. Pure.

Networks of other kinds load into the same classes, take other inputs, and would fail at the first step or give wrong
images.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

_NETWORKS = {"Denoiser": "UNet2DConditionModel", "ControlNet": "ControlNetModel"}
_INPUT_CHANNELS = {
    5: "a depth-to-image network, which takes a depth map",
    7: "an upscaler, which takes a low-resolution image",
    8: "an instruction network such as InstructPix2Pix, or an upscaler, which take an image",
    9: "an inpainting network, which takes a mask and a masked image",
}
_RGB = 3
_LATENT_CHANNELS = 4
# The text embeddings and the inputs of the time embedding of SDXL's refiner, which reads only the second encoder.
_REFINER = (1280, 2560)
_ORDERS = ("rgb", "bgr")

Config = Mapping[str, Any]


def of_denoiser(config: Config) -> str | None:
    """What a denoiser is that these families do not run, as the end of a sentence; None for one that they run."""
    if other := _other_class(config, _NETWORKS["Denoiser"]):
        return other
    taken, given = config.get("in_channels", _LATENT_CHANNELS), config.get("out_channels", _LATENT_CHANNELS)
    if taken != given:
        kind = _INPUT_CHANNELS.get(taken, "of a kind that takes more than latents")
        return f"{kind} ({taken} input channels, {given} output channels)"
    if (config.get("cross_attention_dim"), config.get("projection_class_embeddings_input_dim")) == _REFINER:
        return "the refiner of SDXL, which takes an unfinished image"
    return _more_inputs(config)


def of_control_net(config: Config) -> str | None:
    """As `of_denoiser`, for a ControlNet."""
    if other := _other_class(config, _NETWORKS["ControlNet"]):
        return other
    channels = config.get("conditioning_channels", _RGB)
    if channels != _RGB:
        return f"a ControlNet for images of {channels} channels; control images have {_RGB}"
    order = config.get("controlnet_conditioning_channel_order", "rgb")
    if order not in _ORDERS:
        return f"a ControlNet with the unknown channel order {order!r}"
    if config.get("global_pool_conditions"):
        return "a ControlNet that averages over the image (global_pool_conditions), such as shuffle"
    return _more_inputs(config)


def of_vae(config: Config) -> str | None:
    """As `of_denoiser`, for an autoencoder."""
    if other := _other_class(config, "AutoencoderKL"):
        return other
    channels = config.get("out_channels", _RGB)
    if channels != _RGB:
        return f"an autoencoder whose images have {channels} channels"
    scale = config.get("scaling_factor", 1)
    if not _is_number(scale) or scale <= 0:
        return f"an autoencoder with the scaling_factor {json.dumps(scale)}, which is no number above 0"
    return None


def is_network(role: str, config: Config) -> bool:
    """Whether a component has the class of the families' denoisers or of their ControlNets."""
    return config.get("_class_name") == _NETWORKS[role]


def is_xl(config: Config) -> bool:
    """Whether a denoiser or a ControlNet takes SDXL's pooled embeddings and time ids."""
    return config.get("addition_embed_type") == "text_time"


def is_text_to_image_vae(config: Config) -> bool:
    """Whether an autoencoder makes the latents of one of these families."""
    has_shift = config.get("shift_factor") is not None
    return (
        of_vae(config) is None and config.get("latent_channels", _LATENT_CHANNELS) == _LATENT_CHANNELS and not has_shift
    )


def is_xl_vae(config: Config) -> bool:
    """Whether such an autoencoder is SDXL's, by how it scales its latents."""
    scale = config.get("scaling_factor", 0.18215)
    return config.get("latents_mean") is not None or (_is_number(scale) and abs(scale - 0.13025) < 1e-4)


def _is_number(value: Any) -> bool:
    # JSON's true is a number to Python.
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _other_class(config: Config, expected: str) -> str | None:
    name = config.get("_class_name", expected)
    return None if name == expected else f"of the class {name} instead of {expected}"


def _more_inputs(config: Config) -> str | None:
    """What a network is that takes more than text and SDXL's additional embeddings."""
    if config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None:
        return "a network that takes a class, a noise level or an image beside the text (class embeddings)"
    if config.get("encoder_hid_dim_type") is not None:
        return f"a network that takes {config['encoder_hid_dim_type']} (encoder_hid_dim_type) instead of text"
    addition = config.get("addition_embed_type")
    if addition not in (None, "text_time"):
        return f"a network that takes additional embeddings of the type {addition}"
    return None
