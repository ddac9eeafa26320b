"""Model packs for tests: the shapes pack, and tiny ones with random weights for the families that it does not cover."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

MODELS = Path(__file__).parents[2] / "models"
SHAPES = MODELS / "shapes"


def _text_config(vocabulary: int, *, projection: int = 32) -> CLIPTextConfig:
    return CLIPTextConfig(
        bos_token_id=0,
        eos_token_id=2,
        hidden_size=32,
        intermediate_size=37,
        layer_norm_eps=1e-05,
        num_attention_heads=4,
        num_hidden_layers=3,
        pad_token_id=1,
        vocab_size=vocabulary,
        projection_dim=projection,
        max_position_embeddings=32,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=[16, 32],
        in_channels=3,
        out_channels=3,
        norm_num_groups=8,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
    )


def tiny_v_prediction(folder: Path) -> Path:
    """A Stable Diffusion 2.x shaped pipeline that predicts v, with random weights."""
    torch.manual_seed(1)
    tokenizer = CLIPTokenizer.from_pretrained(SHAPES / "tokenizer")
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
    )
    pipeline = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config(len(tokenizer))),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="v_prediction",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_distilled(folder: Path) -> Path:
    """A guidance-distilled Stable Diffusion shaped pipeline and a ControlNet for it, with random weights."""
    tiny_v_prediction(folder)
    torch.manual_seed(3)
    # A ControlNet takes no guidance scale, so it is made from the network before the distillation.
    before = UNet2DConditionModel.from_pretrained(folder / "unet")
    _visible_control_net(before).save_pretrained(folder / "controlnet")
    distilled = UNet2DConditionModel.from_config(dict(before.config) | {"time_cond_proj_dim": 32})
    distilled.save_pretrained(folder / "unet")
    return folder


def tiny_sdxl(folder: Path) -> Path:
    """An SDXL shaped pipeline and a ControlNet for it, with random weights."""
    torch.manual_seed(2)
    tokenizer = CLIPTokenizer.from_pretrained(SHAPES / "tokenizer")
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config(len(tokenizer))),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(len(tokenizer))),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    _visible_control_net(unet).save_pretrained(folder / "controlnet")
    return folder


def _visible_control_net(unet: UNet2DConditionModel) -> ControlNetModel:
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32))
    # With the zero convolutions of a fresh ControlNet it would have no effect.
    for block in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.2)
    return control
