"""The models that the benches measure, by name. Weights are random, from a fixed seed: time does not depend on values.

`shapes` is the committed pack, so small that overhead dominates. `mid` is arithmetic for the most part: on one thread
two rows take at least 1.6 times as long as one. `wide` has few layers, as wide as those of large models. `gib` has a denoiser
of one GiB in float32. `sd15` has the sizes of Stable Diffusion 1.5.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "models/shapes"
SEED = 0
_SHAPES_CONTEXT = 96
# Width of the embeddings that the denoiser of `gib` takes.
GIB_CONTEXT = 768


@dataclass(frozen=True, kw_only=True)
class BenchModel:
    """One model and the request that it is measured with.

    Attributes:
        side: Width and height of the image, in pixels.
        steps: Denoising steps.
        parts: Builds the parts that differ from the shapes pack, by their folder's name.
    """

    name: str
    side: int
    steps: int
    parts: Callable[[], dict[str, torch.nn.Module]]


def mid_unet() -> UNet2DConditionModel:
    """26 million parameters, for the text encoder and the VAE of the shapes pack."""
    return UNet2DConditionModel(
        sample_size=24,
        in_channels=4,
        out_channels=4,
        block_out_channels=(160, 320),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=_SHAPES_CONTEXT,
        attention_head_dim=8,
    )


def wide_unet() -> UNet2DConditionModel:
    """138 million parameters in few layers, as wide as those of large models, for the text encoder and the VAE of the shapes pack."""
    return UNet2DConditionModel(
        sample_size=12,
        in_channels=4,
        out_channels=4,
        block_out_channels=(768,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=_SHAPES_CONTEXT,
        attention_head_dim=12,
    )


def gib_unet() -> UNet2DConditionModel:
    """267 million parameters: Stable Diffusion 1.x with narrower blocks."""
    return UNet2DConditionModel(
        sample_size=64, cross_attention_dim=GIB_CONTEXT, block_out_channels=(192, 352, 704, 704)
    )


def sd15_unet() -> UNet2DConditionModel:
    """860 million parameters: diffusers' defaults are those of Stable Diffusion 1.x, but for the context's width."""
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


def sd15_text_encoder() -> CLIPTextModel:
    """CLIP ViT-L/14's text model, with the vocabulary of the shapes pack's tokenizer."""
    shapes = CLIPTextConfig.from_pretrained(SHAPES / "text_encoder")
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=shapes.vocab_size,
            bos_token_id=shapes.bos_token_id,
            eos_token_id=shapes.eos_token_id,
            pad_token_id=shapes.pad_token_id,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=77,
        )
    )


def sd15_vae() -> AutoencoderKL:
    """The autoencoder of Stable Diffusion 1.x."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
        scaling_factor=0.18215,
    )


MODELS = {
    model.name: model
    for model in (
        BenchModel(name="shapes", side=64, steps=20, parts=dict),
        BenchModel(name="mid", side=192, steps=20, parts=lambda: {"unet": mid_unet()}),
        BenchModel(name="wide", side=96, steps=6, parts=lambda: {"unet": wide_unet()}),
        BenchModel(name="gib", side=128, steps=1, parts=lambda: {"unet": gib_unet()}),
        BenchModel(
            name="sd15",
            side=512,
            steps=20,
            parts=lambda: {"unet": sd15_unet(), "text_encoder": sd15_text_encoder(), "vae": sd15_vae()},
        ),
    )
}


def write(model: BenchModel, root: Path) -> Path:
    """Writes a model as a diffusers pipeline folder named after it; returns the folder.

    Args:
        root: An existing folder, the model root of the servers.
    """
    folder = root / model.name
    torch.manual_seed(SEED)
    parts = model.parts()
    left_out = shutil.ignore_patterns("controlnet-*", "loras", "*.md", *parts)
    shutil.copytree(SHAPES, folder, ignore=left_out)
    for name, part in parts.items():
        part.save_pretrained(folder / name)  # type: ignore[operator]
    return folder


def rows_ratio(unet: UNet2DConditionModel, *, side: int, passes: int = 20) -> float:
    """t(1 row) / t(2 rows) of a forward pass on one thread: 0.5 is arithmetic alone, 1 is overhead alone.

    Each time is CPU time, which other processes disturb less than wall time, and the least of `passes`.

    Args:
        side: Width and height of the latents.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one, two = (_seconds(unet, rows=rows, side=side, passes=passes) for rows in (1, 2))
    finally:
        torch.set_num_threads(threads)
    return one / two


@torch.no_grad()
def _seconds(unet: UNet2DConditionModel, *, rows: int, side: int, passes: int) -> float:
    latents = torch.randn(rows, 4, side, side)
    context = torch.randn(rows, 32, unet.config.cross_attention_dim)
    times = []
    for _ in range(passes + 1):
        started = time.process_time()
        unet(latents, torch.tensor(1), context, return_dict=False)
        times.append(time.process_time() - started)
    return min(times[1:])
