"""What the families with a UNet share: loading, the call of the network, ControlNets, adapters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, ControlNetModel, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from latentflow.errors import FailedPreconditionError
from latentflow.internal.guidance import Guidance
from latentflow.reasons import Reason

from latentflow_nodes.families.base import (
    AdapterState,
    Conditioning,
    LazyResiduals,
    Residuals,
    Shape,
    TextModel,
    VaeGeometry,
    halves,
    is_present,
)

_WARM_UP_SIDE = 16
_TEXT_CLASSES = {"CLIPTextModel", "CLIPTextModelWithProjection"}


class UNetFamily(ABC):
    """A family whose denoiser is diffusers' UNet2DConditionModel; `sd` and `sdxl` derive from it.

    Attributes:
        encoders, tokenizers: Parts of the pipeline, in its order.
        adapter_loader: diffusers' class that reads the family's LoRA files.
    """

    encoders: tuple[str, ...]
    tokenizers: tuple[str, ...]
    adapter_loader: Any

    @property
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        return {
            "TextEncoder": (*self.encoders, *self.tokenizers),
            "Denoiser": ("unet", "scheduler"),
            "ControlNet": ("controlnet",),
            "VAE": ("vae",),
        }

    @property
    def adapter_components(self) -> tuple[str, ...]:
        return ("unet", *self.encoders)

    def load_text(self, root: Path, *, index: Mapping[str, Any], dtype: torch.dtype) -> TextModel:
        encoders = {
            name: _text_encoder(root / name, index[name][1], dtype) for name in self.encoders if is_present(index, name)
        }
        tokenizers = {
            name: transformers.CLIPTokenizer.from_pretrained(root / name, local_files_only=True)
            for name in self.tokenizers
            if is_present(index, name)
        }
        if len(encoders) != len(tokenizers) or not encoders:
            raise FailedPreconditionError(
                f"{root} has the text encoders {sorted(encoders)} and the tokenizers {sorted(tokenizers)}; "
                "each encoder needs its own tokenizer.",
                reason=Reason.WEIGHTS_UNAVAILABLE,
            )
        return TextModel(
            encoders=encoders,
            tokenizers=list(tokenizers.values()),
            pipeline=self.text_pipeline(encoders | tokenizers, index=index),
        )

    @abstractmethod
    def text_pipeline(self, parts: Mapping[str, Any], *, index: Mapping[str, Any]) -> Any:
        """diffusers' pipeline of the family with only its text parts."""

    def load_denoiser(self, folder: Path, *, dtype: torch.dtype) -> torch.nn.Module:
        return _load(UNet2DConditionModel, folder, dtype)

    def load_control_net(self, folder: Path, *, dtype: torch.dtype) -> torch.nn.Module:
        return _load(ControlNetModel, folder, dtype)

    def load_vae(self, folder: Path, *, dtype: torch.dtype) -> torch.nn.Module:
        return _load(AutoencoderKL, folder, dtype)

    def embeds_guidance(self, network: torch.nn.Module) -> bool:
        return _config(network).time_cond_proj_dim is not None

    def conditioning_shapes(self, network: torch.nn.Module) -> dict[str, Shape]:
        return {"prompt_embeds": (1, None, _config(network).cross_attention_dim)}

    def latent_shape(self, network: torch.nn.Module, *, height: int, width: int) -> tuple[int, ...]:
        return (1, _config(network).in_channels, height, width)

    def warm_up_side(self, network: torch.nn.Module) -> int:
        return min(int(getattr(_config(network), "sample_size", None) or _WARM_UP_SIDE), _WARM_UP_SIDE)

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
            added = {
                "down_block_additional_residuals": _Down(residuals),
                "mid_block_additional_residual": _Middle(residuals),
            }
        noise: torch.Tensor = network(latents, timestep, **inputs, **added, return_dict=False)[0]
        return noise

    def control_net_inputs(
        self, network: torch.nn.Module, conditioning: Conditioning, *, rows: int, width: int, height: int
    ) -> dict[str, Any]:
        return self.text_inputs(conditioning, rows=rows, width=width, height=height)

    def image_scale(self, network: torch.nn.Module) -> int:
        return int(2 ** (len(_config(network).conditioning_embedding_out_channels) - 1))

    def residuals(
        self,
        network: torch.nn.Module,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        *,
        image: torch.Tensor,
        scale: float,
        inputs: Mapping[str, Any],
    ) -> Residuals:
        down, mid = network(
            latents, timestep, controlnet_cond=image, conditioning_scale=scale, return_dict=False, **inputs
        )
        return Residuals(down=tuple(down), mid=mid)

    def vae_geometry(self, vae: torch.nn.Module) -> VaeGeometry:
        config = _config(vae)
        return VaeGeometry(
            scale_factor=2 ** (len(config.block_out_channels) - 1), latent_channels=config.latent_channels
        )

    def decoding_modules(self, vae: torch.nn.Module) -> list[torch.nn.Module]:
        autoencoder: Any = vae
        return [module for module in (autoencoder.post_quant_conv, autoencoder.decoder) if module is not None]

    def read_adapter(self, path: Path) -> AdapterState:
        tensors, alphas, metadata = self.adapter_loader.lora_state_dict(
            str(path.parent),
            weight_name=path.name,
            return_lora_metadata=True,
            local_files_only=True,
            use_safetensors=True,
        )
        return AdapterState(tensors=tensors, alphas=alphas or {}, metadata=metadata or {})

    def convert_adapter(self, component: str, state: Mapping[str, Any]) -> dict[str, Any]:
        if component == "unet":
            converted: dict[str, Any] = convert_unet_state_dict_to_peft(dict(state))
        else:
            converted = convert_state_dict_to_peft(convert_state_dict_to_diffusers(dict(state)))
        return converted


class _Down:
    """Stands for the residuals of the skip connections; the UNet iterates over it after its down blocks."""

    def __init__(self, residuals: LazyResiduals) -> None:
        self._residuals = residuals

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self._residuals.wait().down)


class _Middle:
    """Stands for the residual of the middle block, which the UNet adds after that block."""

    def __init__(self, residuals: LazyResiduals) -> None:
        self._residuals = residuals

    def __radd__(self, sample: torch.Tensor) -> torch.Tensor:
        return sample + self._residuals.wait().mid


def _load(cls: Any, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    module: torch.nn.Module = cls.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
    return module


def _text_encoder(folder: Path, cls: str, dtype: torch.dtype) -> torch.nn.Module:
    if cls not in _TEXT_CLASSES:
        raise FailedPreconditionError(
            f"{folder} is a {cls}; this server runs {' and '.join(sorted(_TEXT_CLASSES))}.",
            reason=Reason.UNSUPPORTED_FAMILY,
        )
    encoder: torch.nn.Module = getattr(transformers, cls).from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True
    )
    return encoder


def _config(network: torch.nn.Module) -> Any:
    return network.config


def _guidance_embedding(scale: float, width: int) -> torch.Tensor:
    """[1, width]: how guidance-distilled UNets take the guidance scale (Meng et al. 2022, arXiv:2210.03142)."""
    embedded: torch.Tensor = StableDiffusionPipeline.get_guidance_scale_embedding(
        None, torch.tensor([scale - 1]), embedding_dim=width
    )
    return embedded
