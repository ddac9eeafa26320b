"""One image on its way through a denoiser: all that changes from step to step, as data.

The denoiser's role makes a `Sample` from a request and the engine advances it. `checkpoint` turns it into bytes, from
which another replica resumes with a bit-identical result.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from diffusers.utils.torch_utils import randn_tensor
from latentflow.errors import DataLossError, LatentflowError
from latentflow.internal.guidance import Guidance

from latentflow_nodes.adapters.layers import Layers
from latentflow_nodes.engine import checkpoint
from latentflow_nodes.engine.forward_time import ForwardTime
from latentflow_nodes.engine.samplers import Sampler
from latentflow_nodes.families.base import Residuals


class ResidualSource(Protocol):
    """A request's exchange with one ControlNet."""

    def request(self, *, step: int, timestep: float, sample: torch.Tensor, scale: float) -> Future[Residuals]:
        """Requests a step's residuals, already scaled. Called from the engine's thread; never blocks."""
        ...


@dataclass(frozen=True, kw_only=True)
class Control:
    """A ControlNet of a request: the source of its residuals, their scale, and the part of the steps it is active in.

    Attributes:
        start, end: Fractions of all steps, 0 to 1.
    """

    source: ResidualSource
    scale: float
    start: float = 0.0
    end: float = 1.0

    def is_active(self, *, step: int, total: int) -> bool:
        """As diffusers' `control_guidance_start` and `_end`."""
        return not (step / total < self.start or (step + 1) / total > self.end)


class Listener(Protocol):
    """Receives the progress of a sample. Called from the engine's thread; must not block."""

    def stepped(self, sample: Sample) -> None: ...

    def finished(self, sample: Sample) -> None: ...

    def failed(self, sample: Sample, error: LatentflowError) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a request.

    Attributes:
        shape: Shape of its latents.
        sampler: Name of its sampler.
        eta: Noise of stochastic samplers, as in diffusers.
    """

    seed: int
    steps: int
    shape: tuple[int, ...]
    guidance: Guidance
    sampler: str
    eta: float = 0.0


@dataclass(eq=False, kw_only=True)
class Sample:
    """The state of one image.

    Attributes:
        inputs: The network's inputs besides latents and timestep, with one row for each guidance half, negative first.
        adapters: Layers to merge with their weights, and `adapter_key`, equal for equal sets.
        latents: [1, channels, height, width].
        is_deterministic: It shares no forward pass, so that its result is bit-identical whatever else the server runs.
        index: Steps done.
        is_late: A pass did not get the residuals of the present step in time.
    """

    key: int
    request_id: str
    settings: Settings
    inputs: dict[str, Any]
    sampler: Sampler
    generator: torch.Generator
    latents: torch.Tensor
    listener: Listener
    adapters: tuple[tuple[Layers, float], ...] = ()
    adapter_key: Hashable = ()
    controls: tuple[Control, ...] = ()
    is_deterministic: bool = False
    index: int = 0
    is_late: bool = False
    forward_time: ForwardTime = field(default_factory=ForwardTime)
    residuals_wait_ns: int = 0
    first_step_ns: int = 0
    requested_at: float = 0.0
    _residuals: tuple[Future[Residuals], ...] | None = None

    @property
    def total(self) -> int:
        return len(self.sampler.timesteps)

    @property
    def timestep(self) -> torch.Tensor:
        return self.sampler.timesteps[self.index]

    def residuals(self) -> tuple[Future[Residuals], ...]:
        """What the active ControlNets send for the present step; the first call of a step requests it."""
        if self._residuals is None:
            active = [c for c in self.controls if c.is_active(step=self.index, total=self.total)]
            latents = self.model_input() if active else self.latents
            self.requested_at = time.monotonic()
            self._residuals = tuple(
                control.source.request(
                    step=self.index, timestep=float(self.timestep), sample=latents, scale=control.scale
                )
                for control in active
            )
        return self._residuals

    @property
    def sits_out(self) -> bool:
        """Takes part in no pass until its late residuals are there."""
        return self.is_late and not all(future.done() for future in self.residuals())

    @property
    def group(self) -> Hashable:
        """Equal for samples that can share a forward pass: shapes alone decide, and the adapters that are merged."""
        shapes = tuple((name, _shape(value)) for name, value in sorted(self.inputs.items()))
        return (tuple(self.latents.shape), shapes, self.adapter_key, self.key if self.is_deterministic else None)

    def model_input(self) -> torch.Tensor:
        """[1 or 2, channels, height, width]: the scaled latents, once for each guidance half."""
        rows = self.settings.guidance.rows
        latents = torch.cat([self.latents] * rows) if rows > 1 else self.latents
        return self.sampler.scale(latents, self.timestep)

    def advance(self, noise: torch.Tensor) -> None:
        """Does the step with the network's prediction for `model_input`."""
        self.latents = self.sampler.step(
            self.settings.guidance.combine(noise),
            self.timestep,
            self.latents,
            generator=self.generator,
            eta=self.settings.eta,
        )
        self.index += 1
        self.is_late = False
        self._residuals = None

    def checkpoint(self) -> bytes:
        """The state from which `restore` resumes."""
        return checkpoint.freeze(
            {
                "settings": asdict(self.settings),
                "index": self.index,
                "latents": self.latents,
                "sampler": self.sampler.snapshot(),
                "generator": self.generator.get_state(),
            }
        )

    def restore(self, blob: bytes) -> None:
        """Resumes from a `checkpoint`. DataLossError for damaged bytes or another request's."""
        state = checkpoint.thaw(blob)
        try:
            same = state["settings"] == asdict(self.settings)
            index, latents, sampler, generator = (state[k] for k in ("index", "latents", "sampler", "generator"))
        except (KeyError, TypeError):
            raise DataLossError("A checkpoint lacks part of its state; start the request again.") from None
        if not same or latents.shape != self.latents.shape or not 0 <= index < self.total:
            raise DataLossError("A checkpoint belongs to another request; start this one again.")
        self.sampler.restore(sampler)
        self.generator.set_state(generator)
        self.latents = latents.to(self.latents)
        self.index = index


def initial_noise(
    shape: tuple[int, ...], *, generator: torch.Generator, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Standard normal latents, drawn as diffusers' pipelines draw them."""
    noise: torch.Tensor = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
    return noise


def _shape(value: Any) -> Hashable:
    if isinstance(value, Mapping):
        return tuple((key, _shape(item)) for key, item in sorted(value.items()))
    return tuple(value.shape[1:])
