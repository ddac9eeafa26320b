"""What a model family has to provide: everything in which pipelines of different architectures differ.

The roles and the engine reach a family through this Protocol alone. A new family is one file beside this one and its
line in the table of the package. Each family follows diffusers' pipeline, whose results it has to equal.

Tensors have a leading batch dimension. A request's conditioning is a mapping of named tensors, [1, ...] each; the
conditioning of the negative guidance half has the same names with `NEGATIVE` before them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from diffusers.image_processor import VaeImageProcessor
from latentflow.errors import FailedPreconditionError, LatentflowError
from latentflow.internal.guidance import Guidance
from latentflow.internal.source_folder import SourceFolder
from latentflow.reasons import Reason
from PIL import Image

from latentflow_nodes.families.splits import Plan, Shard

NEGATIVE = "negative_"
# Size of the dimensions that the warm-up request may choose.
_WARM_UP_TOKENS = 8
Conditioning = Mapping[str, torch.Tensor]
Value = TypeVar("Value")
# The shape of a named tensor; None: any size.
Shape = tuple[int | None, ...]


@dataclass(frozen=True, kw_only=True)
class TextModel:
    """The loaded text side of a pipeline.

    Attributes:
        encoders: The encoders by part, in the pipeline's order; adapters are merged into them.
        tokenizers: The tokenizers, in the same order, as transformers has them.
        pipeline: What `Family.encode` needs besides.
    """

    encoders: Mapping[str, torch.nn.Module]
    tokenizers: Sequence[Any]
    pipeline: Any


@dataclass(frozen=True, kw_only=True)
class VaeGeometry:
    """How an autoencoder's latents relate to pixels.

    Attributes:
        scale_factor: Pixels of an image along the side of one latent pixel.
        latent_channels: Channels of the latents.
    """

    scale_factor: int
    latent_channels: int


@dataclass(frozen=True, kw_only=True)
class Residuals:
    """What a ControlNet adds to a denoiser: a tensor for each skip connection, in order, and the middle block's."""

    down: tuple[torch.Tensor, ...]
    mid: torch.Tensor


class LazyResiduals(Protocol):
    """The residuals of a forward pass, perhaps still under way."""

    def wait(self) -> Residuals:
        """The residuals, summed over ControlNets and stacked over the batch. Waits for those that are under way."""
        ...


@dataclass(frozen=True, kw_only=True)
class AdapterPart:
    """How adapter files mark what belongs to one component.

    Attributes:
        component: The component's folder in a pipeline.
        prefixes: What its keys begin with.
        model_class: Its class, as PEFT's configuration names it.
        roots: First segments of the names of its layers.
    """

    component: str
    prefixes: tuple[str, ...]
    model_class: str = ""
    roots: tuple[str, ...] = ()


class Family(Protocol):
    """One model family.

    Attributes:
        name: Its name on the wire and in `latentflow describe`.
        title: Its name in messages.
        parts: By role, the folders of a pipeline that the role reads. The first of the denoiser is its network.
        encoders: The text encoders among these parts, in the pipeline's order.
        adapter_parts: The components that an adapter may change.
    """

    name: str
    title: str
    encoders: tuple[str, ...]

    @property
    def parts(self) -> Mapping[str, tuple[str, ...]]: ...

    @property
    def adapter_parts(self) -> tuple[AdapterPart, ...]: ...

    # Detection

    def owns_pipeline(self, class_name: str) -> bool:
        """Whether a pipeline with this `_class_name` in its model_index.json belongs to the family."""
        ...

    def owns_component(self, role: str, config: Mapping[str, Any]) -> bool:
        """Whether a component folder with this configuration, which a role is to serve, belongs to the family."""
        ...

    # Loading: each reads a component folder whose files have been checked, of the variant that the source names.
    # FailedPreconditionError for a network of a kind that the family does not run, and for weights of another one.

    def load_text(self, source: SourceFolder, *, index: Mapping[str, Any], dtype: torch.dtype) -> TextModel:
        """Every text encoder and tokenizer that an index names. FailedPreconditionError where they do not match."""
        ...

    def load_denoiser(
        self, folder: Path, *, dtype: torch.dtype, variant: str | None, shard: Shard | None = None
    ) -> torch.nn.Module:
        """A denoiser, or with a shard a rank's part of one, which needs sums over the ranks to compute."""
        ...

    def plan_split(self, folder: Path) -> Plan:
        """How a denoiser can be divided among ranks. Reads no weights."""
        ...

    def load_control_net(self, folder: Path, *, dtype: torch.dtype, variant: str | None) -> torch.nn.Module: ...

    def load_vae(self, folder: Path, *, dtype: torch.dtype, variant: str | None) -> torch.nn.Module: ...

    # Text encoding

    def encode(
        self,
        text: TextModel,
        *,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | None,
        guidance: bool,
        device: torch.device,
    ) -> dict[str, torch.Tensor]:
        """The conditioning of prompts, a row for each; with `guidance` that of the negative halves too.

        Args:
            negative_prompts: As many as prompts; None: none of the requests has one.
        """
        ...

    # Denoising

    def embeds_guidance(self, network: torch.nn.Module) -> bool:
        """Whether the network takes the guidance scale as an input, so that one forward pass is a step."""
        ...

    def conditioning_shapes(self, network: torch.nn.Module) -> dict[str, Shape]:
        """The conditioning that a denoiser or ControlNet takes, of one guidance half."""
        ...

    def latent_shape(self, network: torch.nn.Module, *, height: int, width: int) -> tuple[int, ...]:
        """The shape of one image's latents; sizes in latent pixels."""
        ...

    def warm_up_side(self, network: torch.nn.Module) -> int:
        """Side of the latents of the first, discarded request, in latent pixels."""
        ...

    def denoiser_inputs(
        self, network: torch.nn.Module, conditioning: Conditioning, *, guidance: Guidance, width: int, height: int
    ) -> dict[str, Any]:
        """What `predict` takes besides latents and timestep, with one row for each guidance half, negative first.

        Args:
            width, height: Size of the image in pixels.
        """
        ...

    def predict(
        self,
        network: torch.nn.Module,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        *,
        inputs: Mapping[str, Any],
        residuals: LazyResiduals | None,
    ) -> torch.Tensor:
        """One forward pass: the network's prediction, of the latents' shape.

        Args:
            latents: [rows, channels, height, width], scaled by the sampler.
            timestep: A scalar, or [rows].
            residuals: What ControlNets add; waited for where the network adds it.
        """
        ...

    # ControlNets

    def control_net_inputs(
        self, network: torch.nn.Module, conditioning: Conditioning, *, rows: int, width: int, height: int
    ) -> dict[str, Any]:
        """What `residuals` takes besides latents, timestep and image; 2 rows: both guidance halves, negative first."""
        ...

    def image_scale(self, network: torch.nn.Module) -> int:
        """Pixels of a control image along the side of one latent pixel."""
        ...

    def embed_control_image(self, network: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
        """The part of a ControlNet's forward pass that depends on the control image alone, and so is the same at each step.

        Args:
            network: From `load_control_net`.
            image: [1, 3, height, width], from 0 to 1.

        Returns:
            [1, channels, height and width of the latents].
        """
        ...

    def residuals(
        self,
        network: torch.nn.Module,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        *,
        image: torch.Tensor,
        inputs: Mapping[str, Any],
    ) -> Residuals:
        """One forward pass of a ControlNet, with a conditioning scale of 1.

        Args:
            timestep: [rows].
            image: [rows, ...], each row from `embed_control_image`.
        """
        ...

    def guess_factors(self, count: int) -> torch.Tensor:
        """By what residuals are multiplied in guess mode: [count], for the skip connections in order, then the middle block."""
        ...

    # Decoding

    def vae_geometry(self, vae: torch.nn.Module) -> VaeGeometry: ...

    def decoding_modules(self, vae: torch.nn.Module) -> list[torch.nn.Module]:
        """The modules whose forward passes make up a decoding; none contains another."""
        ...

    def decode(self, vae: torch.nn.Module, latents: torch.Tensor) -> list[Image.Image | LatentflowError]:
        """The images of latents [batch, channels, height, width], or the error of one that is not finite."""
        ...

    # Adapters

    def layer_names(self, component: str, module: torch.nn.Module) -> Mapping[str, str]:
        """The names of a component's layers in adapter files, with `_` for every `.`, and its module's name for each."""
        ...


def stack(inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The inputs of several requests as one batch, in their order."""
    first = inputs[0]
    if len(inputs) == 1:
        return dict(first)
    return {
        key: torch.cat([one[key] for one in inputs])
        if isinstance(value, torch.Tensor)
        else stack([one[key] for one in inputs])
        for key, value in first.items()
    }


def last_row(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of one request's positive half, of those of both."""
    return {key: value[-1:] if isinstance(value, torch.Tensor) else last_row(value) for key, value in inputs.items()}


def of_half(conditioning: Mapping[str, Value], *, negative: bool) -> dict[str, Value]:
    """What belongs to one guidance half of a request, by the names of the positive one."""
    if negative:
        return {name.removeprefix(NEGATIVE): one for name, one in conditioning.items() if name.startswith(NEGATIVE)}
    return {name: one for name, one in conditioning.items() if not name.startswith(NEGATIVE)}


def warm_up_conditioning(shapes: dict[str, Shape], device: torch.device) -> dict[str, torch.Tensor]:
    """Zeros in the shapes that a network takes, for both guidance halves."""
    zeros = {
        name: torch.zeros([_WARM_UP_TOKENS if size is None else size for size in shape], device=device)
        for name, shape in shapes.items()
    }
    return zeros | {NEGATIVE + name: tensor for name, tensor in zeros.items()}


def halves(conditioning: Conditioning, name: str, *, rows: int) -> torch.Tensor:
    """A named tensor for 1 row, or for both guidance halves, negative first."""
    positive = conditioning[name]
    return torch.cat([conditioning[NEGATIVE + name], positive]) if rows == 2 else positive


def to_images(decoded: torch.Tensor) -> list[Image.Image | LatentflowError]:
    """The images of an autoencoder's output, [batch, 3, height, width] from -1 to 1, as diffusers makes them.

    An error in place of an image with NaN or infinity, which diffusers would turn into black and white pixels.
    """
    return [_to_image(one) for one in decoded.split(1)]


def _to_image(decoded: torch.Tensor) -> Image.Image | LatentflowError:
    if not torch.isfinite(decoded).all():
        dtype = str(decoded.dtype).removeprefix("torch.")
        return FailedPreconditionError(
            f"The image of the VAE is not finite in {dtype}: the latents are outside the range in which it works. Give the "
            "VAE a dtype of larger range, bfloat16 or float32, or lower the weights and scales of the request.",
            reason=Reason.NOT_FINITE,
        )
    image: Image.Image = VaeImageProcessor().postprocess(decoded, output_type="pil")[0]
    return image
