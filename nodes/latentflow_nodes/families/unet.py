"""What the families with a UNet share: loading, the call of the network, ControlNets, adapters."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, ControlNetModel, StableDiffusionPipeline, UNet2DConditionModel
from latentflow.errors import FailedPreconditionError
from latentflow.internal import weight_files
from latentflow.internal.guidance import Guidance
from latentflow.internal.source_folder import SourceFolder, is_present
from latentflow.reasons import Reason

from latentflow_nodes.families import kinds, layer_names, shards, single_files, splits
from latentflow_nodes.families.base import (
    AdapterPart,
    Conditioning,
    LazyResiduals,
    Residuals,
    Shape,
    TextModel,
    VaeGeometry,
    halves,
)
from latentflow_nodes.families.splits import Plan, Shard
from latentflow_nodes.weights import files

_WARM_UP_SIDE = 16
_TEXT_CLASSES = {"CLIPTextModel", "CLIPTextModelWithProjection"}
# diffusers' prefix comes first, then kohya's and OneTrainer's.
_UNET_PART = AdapterPart(
    component="unet",
    prefixes=("unet.", "lora_unet_"),
    model_class="UNet2DConditionModel",
    roots=("conv_in", "conv_out", "time_embedding", "add_embedding", "down_blocks", "mid_block", "up_blocks"),
)
_TEXT_PARTS = {
    "text_encoder": AdapterPart(
        component="text_encoder",
        prefixes=("text_encoder.", "lora_te_", "lora_te1_", "clip_l."),
        model_class="CLIPTextModel",
        roots=("text_model", "encoder"),
    ),
    "text_encoder_2": AdapterPart(
        component="text_encoder_2",
        prefixes=("text_encoder_2.", "lora_te2_", "clip_g."),
        model_class="CLIPTextModelWithProjection",
        roots=("text_projection",),
    ),
}


class UNetFamily(ABC):
    """A family whose denoiser is diffusers' UNet2DConditionModel; `sd` and `sdxl` derive from it.

    Attributes:
        encoders, tokenizers: Parts of the pipeline, in its order.
    """

    encoders: tuple[str, ...]
    tokenizers: tuple[str, ...]

    @property
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        return {
            "TextEncoder": (*self.encoders, *self.tokenizers),
            "Denoiser": ("unet", "scheduler"),
            "ControlNet": ("controlnet",),
            "VAE": ("vae",),
        }

    @property
    def adapter_parts(self) -> tuple[AdapterPart, ...]:
        return (_UNET_PART, *(_TEXT_PARTS[name] for name in self.encoders))

    def load_text(self, source: SourceFolder, *, index: Mapping[str, Any], dtype: torch.dtype) -> TextModel:
        encoders = {
            name: _text_encoder(source, name, index[name][1], dtype)
            for name in self.encoders
            if is_present(index, name)
        }
        tokenizers = {name: _tokenizer(source.beside(name)) for name in self.tokenizers if is_present(index, name)}
        if len(encoders) != len(tokenizers) or not encoders:
            raise FailedPreconditionError(
                f"{source.pipeline} has the text encoders {sorted(encoders)} and the tokenizers {sorted(tokenizers)}; "
                "each encoder needs its own tokenizer.",
                reason=Reason.WEIGHTS_UNAVAILABLE,
            )
        for (name, encoder), tokenizer in zip(encoders.items(), tokenizers.values(), strict=True):
            _check_tokenizer(source.beside(name), encoder, tokenizer)
        return TextModel(
            encoders=encoders,
            tokenizers=list(tokenizers.values()),
            pipeline=self.text_pipeline(encoders | tokenizers, index=index),
        )

    @abstractmethod
    def text_pipeline(self, parts: Mapping[str, Any], *, index: Mapping[str, Any]) -> Any:
        """diffusers' pipeline of the family with only its text parts."""

    def load_denoiser(
        self, folder: Path, *, dtype: torch.dtype, variant: str | None, shard: Shard | None = None
    ) -> torch.nn.Module:
        if shard is not None:
            return shards.network(UNet2DConditionModel, folder, "unet", dtype=dtype, variant=variant, shard=shard)
        return _network(UNet2DConditionModel, folder, "unet", kinds.of_denoiser, dtype, variant)

    def plan_split(self, folder: Path) -> Plan:
        _check_kind(folder, "unet", kinds.of_denoiser)
        if folder.is_dir():
            _refuse_quantised(folder)
        return splits.of_unet(shards.empty(UNet2DConditionModel, folder, "unet"))

    def load_control_net(self, folder: Path, *, dtype: torch.dtype, variant: str | None) -> torch.nn.Module:
        network: Any = _network(ControlNetModel, folder, "controlnet", kinds.of_control_net, dtype, variant)
        flips = network.config.controlnet_conditioning_channel_order == "bgr"
        network.controlnet_cond_embedding = _ControlImages(network.controlnet_cond_embedding, flips=flips)
        return network  # type: ignore[no-any-return]

    def load_vae(self, folder: Path, *, dtype: torch.dtype, variant: str | None) -> torch.nn.Module:
        return _network(AutoencoderKL, folder, "vae", kinds.of_vae, dtype, variant)

    def embeds_guidance(self, network: torch.nn.Module) -> bool:
        return _config(network).time_cond_proj_dim is not None

    def conditioning_shapes(self, network: torch.nn.Module) -> dict[str, Shape]:
        return {"prompt_embeds": (1, None, _config(network).cross_attention_dim)}

    def latent_shape(self, network: torch.nn.Module, *, height: int, width: int) -> tuple[int, ...]:
        return (1, _config(network).in_channels, height, width)

    def warm_up_side(self, network: torch.nn.Module) -> int:
        # Some configurations have a width and a height, and none is needed to load the network.
        side = getattr(_config(network), "sample_size", None)
        return min(side, _WARM_UP_SIDE) if isinstance(side, int) and side > 0 else _WARM_UP_SIDE

    def text_inputs(self, conditioning: Conditioning, *, rows: int, width: int, height: int) -> dict[str, Any]:
        """The keyword arguments that UNet and ControlNet share."""
        return {"encoder_hidden_states": halves(conditioning, "prompt_embeds", rows=rows)}

    def denoiser_inputs(
        self, network: torch.nn.Module, conditioning: Conditioning, *, guidance: Guidance, width: int, height: int
    ) -> dict[str, Any]:
        inputs = self.text_inputs(conditioning, rows=guidance.rows, width=width, height=height)
        if guidance.is_embedded:
            embeds = inputs["encoder_hidden_states"]
            inputs["timestep_cond"] = _guidance_embedding(guidance.scale, _config(network).time_cond_proj_dim).to(
                embeds
            )
        return inputs

    def predict(
        self,
        network: torch.nn.Module,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        *,
        inputs: Mapping[str, Any],
        residuals: LazyResiduals | None,
    ) -> torch.Tensor:
        added: dict[str, Any] = {}
        if residuals is not None:
            skips = _Skips()
            added = {
                "down_block_additional_residuals": skips,
                "mid_block_additional_residual": _Middle(residuals, skips),
            }
        noise: torch.Tensor = network(latents, timestep, **inputs, **added, return_dict=False)[0]
        return noise

    def control_net_inputs(
        self, network: torch.nn.Module, conditioning: Conditioning, *, rows: int, width: int, height: int
    ) -> dict[str, Any]:
        return self.text_inputs(conditioning, rows=rows, width=width, height=height)

    def image_scale(self, network: torch.nn.Module) -> int:
        return int(2 ** (len(_config(network).conditioning_embedding_out_channels) - 1))

    def embed_control_image(self, network: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
        images: Any = network.controlnet_cond_embedding
        embedded: torch.Tensor = images.embed(image)
        return embedded

    def residuals(
        self,
        network: torch.nn.Module,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        *,
        image: torch.Tensor,
        inputs: Mapping[str, Any],
    ) -> Residuals:
        down, mid = network(latents, timestep, controlnet_cond=image, return_dict=False, **inputs)
        return Residuals(down=tuple(down), mid=mid)

    def guess_factors(self, count: int) -> torch.Tensor:
        return torch.logspace(-1, 0, count)

    def vae_geometry(self, vae: torch.nn.Module) -> VaeGeometry:
        config = _config(vae)
        return VaeGeometry(
            scale_factor=2 ** (len(config.block_out_channels) - 1), latent_channels=config.latent_channels
        )

    def decoding_modules(self, vae: torch.nn.Module) -> list[torch.nn.Module]:
        autoencoder: Any = vae
        return [module for module in (autoencoder.post_quant_conv, autoencoder.decoder) if module is not None]

    def layer_names(self, component: str, module: torch.nn.Module) -> Mapping[str, str]:
        return layer_names.of_clip(module) if component in self.encoders else layer_names.of_unet(module)


class _Skips:
    """Stands for the residuals of the skip connections, which the UNet adds after its down blocks.

    Only the up blocks read the sums. So this one notes the tensors, and `_Middle` adds the residuals to them: the ControlNet
    can compute until the middle block has ended.
    """

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []

    def __iter__(self) -> Iterator[_Skips]:
        # One for each tensor of the UNet.
        return itertools.repeat(self)

    def __radd__(self, tensor: torch.Tensor) -> torch.Tensor:
        self._tensors.append(tensor)
        return tensor

    def add(self, residuals: tuple[torch.Tensor, ...]) -> None:
        if len(residuals) != len(self._tensors):
            raise FailedPreconditionError(
                f"A ControlNet sent residuals for {len(residuals)} skip connections, this denoiser has {len(self._tensors)}; "
                "it was trained for another base model.",
                reason=Reason.CONTROLNET_MISMATCH,
            )
        for tensor, residual in zip(self._tensors, residuals, strict=True):
            tensor.add_(residual)


class _Middle:
    """Stands for the residual of the middle block, which the UNet adds after that block."""

    def __init__(self, residuals: LazyResiduals, skips: _Skips) -> None:
        self._residuals = residuals
        self._skips = skips

    def __radd__(self, sample: torch.Tensor) -> torch.Tensor:
        residuals = self._residuals.wait()
        summed = sample + residuals.mid
        # After the sum: in a UNet without a middle block the sample is a skip connection too.
        self._skips.add(residuals.down)
        return summed


class _ControlImages(torch.nn.Module):
    """In place of the embedding of control images, so that the network takes embedded ones.

    Args:
        embedding: The module that diffusers runs at each step.
        flips: The network reverses the channels of what it is given, because it was trained with BGR images.
    """

    def __init__(self, embedding: torch.nn.Module, *, flips: bool) -> None:
        super().__init__()
        self._embedding = embedding
        self._flips = flips

    def embed(self, image: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self._embedding(image.flip(1) if self._flips else image)
        return embedded

    def forward(self, embedded: torch.Tensor) -> torch.Tensor:
        return embedded.flip(1) if self._flips else embedded


def _network(
    cls: Any,
    path: Path,
    part: str,
    kind: Callable[[kinds.Config], str | None],
    dtype: torch.dtype,
    variant: str | None,
) -> torch.nn.Module:
    """The network of a component folder, or of a part of a single file."""
    # Before anything is loaded, which may take minutes.
    _check_kind(path, part, kind)
    return single_files.network(cls, path, part, dtype) if path.is_file() else _load(cls, path, dtype, variant)


def _check_kind(path: Path, part: str, kind: Callable[[kinds.Config], str | None]) -> None:
    """FailedPreconditionError for a network that these families do not run, by its configuration."""
    if other := kind(single_files.config(path, part) if path.is_file() else weight_files.config(path)):
        raise FailedPreconditionError(
            f"{path} is {other}; this version does not serve it. Set the source to a {part} for text-to-image.",
            reason=Reason.UNSUPPORTED_FAMILY,
        )


def _load(cls: Any, folder: Path, dtype: torch.dtype, variant: str | None) -> torch.nn.Module:
    _refuse_quantised(folder)
    # With `ignore_mismatched_sizes` the report names them all; without it the loader's error names the first.
    module, report = cls.from_pretrained(
        folder,
        dtype=dtype,
        variant=variant,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    files.check_complete(folder, report)
    loaded: torch.nn.Module = module
    return loaded


def _refuse_quantised(folder: Path) -> None:
    if (quantisation := weight_files.config(folder).get("quantization_config")) is not None:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        raise FailedPreconditionError(
            f"The weights in {folder} are quantised ({method or 'by an unknown method'}), which this version does not serve. Use "
            "the weights in float16, bfloat16 or float32.",
            reason=Reason.UNSUPPORTED_FAMILY,
        )


def _text_encoder(source: SourceFolder, part: str, name: str, dtype: torch.dtype) -> torch.nn.Module:
    folder = source.beside(part)
    if name not in _TEXT_CLASSES:
        raise FailedPreconditionError(
            f"{folder} is a {name}; this server runs {' and '.join(sorted(_TEXT_CLASSES))}.",
            reason=Reason.UNSUPPORTED_FAMILY,
        )
    cls = getattr(transformers, name)
    if source.single_file is not None:
        return single_files.text_encoder(cls, source.single_file, part, dtype)
    return _load(cls, folder, dtype, source.variant)


def _tokenizer(folder: Path) -> Any:
    weight_files.check_tokenizer(folder)
    return transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _check_tokenizer(folder: Path, encoder: torch.nn.Module, tokenizer: Any) -> None:
    config = _config(encoder)
    longest, words = config.max_position_embeddings, config.vocab_size
    length = tokenizer.model_max_length
    # A prompt has a start, an end, and at least one token between them.
    is_possible = isinstance(length, int) and 2 < length <= longest
    if not is_possible or len(tokenizer) > words:
        raise FailedPreconditionError(
            f"The tokenizer for {folder} has {len(tokenizer)} tokens and a model_max_length of "
            f"{tokenizer.model_max_length}; the encoder has {words} and {longest}. Correct tokenizer_config.json, or copy the "
            "tokenizer of the base model.",
            reason=Reason.WEIGHTS_UNAVAILABLE,
        )


def _config(network: torch.nn.Module) -> Any:
    return network.config


def _guidance_embedding(scale: float, width: int) -> torch.Tensor:
    """[1, width]: how guidance-distilled UNets take the guidance scale (Meng et al. 2022, arXiv:2210.03142)."""
    embedded: torch.Tensor = StableDiffusionPipeline.get_guidance_scale_embedding(
        None, torch.tensor([scale - 1]), embedding_dim=width
    )
    return embedded
