"""The configurations of Stable Diffusion's networks, for single files, which hold weights alone.

The figures are those of the published models; a test compares the sizes of the networks that result. A scheduler stands here
only where the files of a kind agree on it.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]


def _clip(width: int, layers: int, heads: int, activation: str, projection: int, cls: str) -> Config:
    return {
        "architectures": [cls],
        "model_type": "clip_text_model",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": activation,
        "projection_dim": projection,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "bos_token_id": 0,
        # As published: with 2, the pooled output is taken at the highest token, which is the end marker.
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _unet(**differences: Any) -> Config:
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 2,
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
        "block_out_channels": [320, 640, 1280, 1280],
    } | differences


def _vae(side: int, scale: float) -> Config:
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": side,
        "scaling_factor": scale,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }


_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
_CLIP_L = _clip(768, 12, 12, "quick_gelu", 768, "CLIPTextModel")

# The models by diffusers' name of the kind, for messages.
TITLES = {"v1": "Stable Diffusion 1.5", "v2": "Stable Diffusion 2.1", "xl_base": "Stable Diffusion XL"}
# By diffusers' name of the kind, and by the part of a pipeline.
CONFIGS: dict[str, dict[str, Config]] = {
    "v1": {
        "unet": _unet(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        "vae": _vae(512, 0.18215),
        "text_encoder": _CLIP_L,
        "scheduler": _BETAS
        | {
            "_class_name": "PNDMScheduler",
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
            "clip_sample": False,
        },
    },
    "v2": {
        "unet": _unet(
            sample_size=96,
            cross_attention_dim=1024,
            attention_head_dim=[5, 10, 20, 20],
            use_linear_projection=True,
            upcast_attention=True,
        ),
        "vae": _vae(768, 0.18215),
        "text_encoder": _clip(1024, 23, 16, "gelu", 512, "CLIPTextModel"),
    },
    "xl_base": {
        "unet": _unet(
            sample_size=128,
            cross_attention_dim=2048,
            attention_head_dim=[5, 10, 20],
            use_linear_projection=True,
            block_out_channels=[320, 640, 1280],
            down_block_types=["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
            up_block_types=[*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
            transformer_layers_per_block=[1, 2, 10],
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        "vae": _vae(1024, 0.13025) | {"force_upcast": True},
        "text_encoder": _CLIP_L,
        "text_encoder_2": _clip(1280, 32, 20, "gelu", 1280, "CLIPTextModelWithProjection"),
        "scheduler": _BETAS
        | {
            "_class_name": "EulerDiscreteScheduler",
            "prediction_type": "epsilon",
            "timestep_spacing": "leading",
            "steps_offset": 1,
        },
    },
}
