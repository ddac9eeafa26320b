"""One image on its way through a denoiser: all that changes from step to step, as data.

The denoiser's role makes a `Sample` from a request, the engine advances it, and `checkpoint` turns it into bytes from
which another replica goes on with a bit-identical result.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from latentflow.errors import DataLossError, LatentflowError

from latentflow_nodes.adapters.layers import Layer
from latentflow_nodes.engine import checkpoint
from latentflow_nodes.engine.samplers import Sampler


@dataclass(frozen=True, kw_only=True)
class Residuals:
    """What a ControlNet adds: one tensor for each skip connection, in the UNet's order, and the middle block's."""

    down: tuple[torch.Tensor, ...]
    mid: torch.Tensor


class ResidualSource(Protocol):
    """A request's conversation with one ControlNet."""

    def request(self, *, step: int, timestep: float, sample: torch.Tensor, scale: float) -> Future[Residuals]:
        """Asks for a step's residuals, already scaled. Called from the engine's thread; never blocks."""
        ...


@dataclass(frozen=True, kw_only=True)
class Control:
    """A ControlNet of a request: where its residuals come from, how strong, and in which part of the steps."""

    source: ResidualSource
    scale: float
    start: float = 0.0
    end: float = 1.0

    def active(self, *, step: int, total: int) -> bool:
        """As diffusers' `control_guidance_start` and `_end`."""
        return not (step / total < self.start or (step + 1) / total > self.end)


class Listener(Protocol):
    """Who hears what becomes of a sample. Called from the engine's thread; must not block."""

    def stepped(self, sample: Sample) -> None: ...

    def finished(self, sample: Sample) -> None: ...

    def failed(self, sample: Sample, error: LatentflowError) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a request asks of the denoiser. Sizes in latent pixels."""

    seed: int
    steps: int
    channels: int
    height: int
    width: int
    guidance_scale: float
    guidance: bool
    sampler: str
    eta: float = 0.0


@dataclass(eq=False, kw_only=True)
class Sample:
    """The state of one image.

    Attributes:
        inputs: The network's keyword inputs besides latents and timestep; with guidance [2, ...], negative first.
        adapters: Layers to merge with their weights, and `adapter_key`, equal for equal sets.
        latents: [1, channels, height, width].
        index: Steps done.
    """

    key: int
    request_id: str
    settings: Settings
    inputs: dict[str, Any]
    sampler: Sampler
    generator: torch.Generator
    latents: torch.Tensor
    listener: Listener
    adapters: tuple[tuple[Mapping[str, Layer], float], ...] = ()
    adapter_key: Hashable = ()
    controls: tuple[Control, ...] = ()
    index: int = 0
    forward_ns: int = 0
    residuals_wait_ns: int = 0
    first_step_ns: int = field(default=0)

    @property
    def total(self) -> int:
        return len(self.sampler.timesteps)

    @property
    def timestep(self) -> torch.Tensor:
        return self.sampler.timesteps[self.index]

    def active_controls(self) -> tuple[Control, ...]:
        return tuple(c for c in self.controls if c.active(step=self.index, total=self.total))

    @property
    def group(self) -> Hashable:
        """Equal for samples that can share a forward pass at their present steps."""
        shapes = tuple((name, _shape(value)) for name, value in sorted(self.inputs.items()))
        return (
            tuple(self.latents.shape),
            self.settings.guidance,
            self.adapter_key,
            bool(self.active_controls()),
            shapes,
        )

    def model_input(self) -> torch.Tensor:
        """[1 or 2, channels, height, width]: the scaled latents, once for each guidance half."""
        latents = torch.cat([self.latents] * 2) if self.settings.guidance else self.latents
        return self.sampler.scale(latents, self.timestep)

    def advance(self, noise: torch.Tensor) -> None:
        """Takes the network's prediction for `model_input` and does the step."""
        if self.settings.guidance:
            negative, positive = noise.chunk(2)
            noise = negative + self.settings.guidance_scale * (positive - negative)
        self.latents = self.sampler.step(
            noise, self.timestep, self.latents, generator=self.generator, eta=self.settings.eta
        )
        self.index += 1

    def checkpoint(self) -> bytes:
        """What `restore` needs to go on from here."""
        return checkpoint.freeze(
            {
                "settings": vars(self.settings),
                "index": self.index,
                "latents": self.latents,
                "sampler": self.sampler.snapshot(),
                "generator": self.generator.get_state(),
            }
        )

    def restore(self, blob: bytes) -> None:
        """Goes on where `checkpoint` was. DataLossError for damaged bytes or another request's."""
        state = checkpoint.thaw(blob)
        try:
            same = state["settings"] == vars(self.settings)
            index, latents, sampler, generator = (state[k] for k in ("index", "latents", "sampler", "generator"))
        except (KeyError, TypeError):
            raise DataLossError("A checkpoint lacks part of its state; start the request anew.") from None
        if not same or latents.shape != self.latents.shape or not 0 <= index < self.total:
            raise DataLossError("A checkpoint belongs to another request; start this one anew.")
        self.sampler.restore(sampler)
        self.generator.set_state(generator)
        self.latents = latents.to(self.latents)
        self.index = index


def initial_noise(
    settings: Settings, *, generator: torch.Generator, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Standard normal latents, drawn as diffusers' pipelines draw them."""
    shape = (1, settings.channels, settings.height, settings.width)
    noise: torch.Tensor = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
    return noise


def guidance_embedding(scale: float, width: int) -> torch.Tensor:
    """[1, width]: how guidance-distilled networks take the guidance scale as an input."""
    embedded: torch.Tensor = StableDiffusionPipeline.get_guidance_scale_embedding(
        None, torch.tensor([scale - 1]), embedding_dim=width
    )
    return embedded


def _shape(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape[1:])
    return tuple((key, _shape(item)) for key, item in sorted(value.items()))
