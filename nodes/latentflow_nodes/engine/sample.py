"""One image on its way through a denoiser: all that changes from step to step, as data.

The denoiser's role makes a `Sample` from a request and the engine advances it. `checkpoint` turns it into bytes, from
which another replica resumes with a bit-identical result.
"""

from __future__ import annotations

from collections.abc import Hashable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from diffusers.utils.torch_utils import randn_tensor
from latentflow.errors import DataLossError, LatentflowError, UnavailableError
from latentflow.internal.guidance import Guidance
from latentflow.reasons import Reason

from latentflow_nodes.adapters.layers import Layers
from latentflow_nodes.engine import checkpoint
from latentflow_nodes.engine.member import Control, Member
from latentflow_nodes.engine.samplers import Sampler
from latentflow_nodes.families.base import Residuals, last_row


class NoiseSource(Protocol):
    """A request's exchange with its guidance peer."""

    def request(self, *, step: int, timestep: float, sample: torch.Tensor, with_adapters: bool) -> Future[torch.Tensor]:
        """Requests the negative half of a step. Called from the engine's thread; never blocks.

        Args:
            sample: Model input of one half, [1, channels, height, width].
            with_adapters: Whether the adapters of the request are in effect at this step.

        Returns:
            The prediction, of the sample's shape. A LatentflowError where the peer is lost.
        """
        ...

    def give_up(self, error: LatentflowError) -> None:
        """The sample does not use this source any more. Called from the engine's thread."""
        ...


@dataclass(frozen=True, kw_only=True)
class GuidancePeer:
    """Another replica that computes the negative half of a sample.

    Attributes:
        controls: The ControlNets of the positive half, which stays here.
    """

    source: NoiseSource
    controls: tuple[Control, ...] = ()


@dataclass(kw_only=True)
class Assignment:
    """The guidance peer that a sample uses from its next step on; None: it computes both halves itself.

    Whoever makes the sample sets it, at any time and from any thread.
    """

    peer: GuidancePeer | None = None


@dataclass(frozen=True, kw_only=True)
class LateAdapters:
    """Adapters of a sample that begins without them.

    Attributes:
        loaded: Their layers, with their weights.
        key: As `Member.adapter_key`.
        steps: The most steps that the sample does without them.
    """

    loaded: Future[tuple[tuple[Layers, float], ...]]
    key: Hashable
    steps: int


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
class Sample(Member):
    """The state of one image.

    A step with a guidance peer has two parts: the peer computes the negative half while the positive one is computed here.
    Where the peer fails or is too late, the step starts again with both halves here, so that nothing is lost.

    Attributes:
        guidance: Who computes the negative half.
        late_adapters: Adapters that take effect at the first step boundary at which they are loaded.
        steps_without_adapters: Steps that were done before that.
    """

    settings: Settings
    sampler: Sampler
    generator: torch.Generator
    listener: Listener
    guidance: Assignment = field(default_factory=Assignment)
    late_adapters: LateAdapters | None = None
    steps_without_adapters: int = 0
    # The guidance peer of the present step, and what it computes.
    _peer: GuidancePeer | None = None
    _negative: Future[torch.Tensor] | None = None

    @property
    def total(self) -> int:
        return len(self.sampler.timesteps)

    @property
    def timestep(self) -> torch.Tensor:
        return self.sampler.timesteps[self.index]

    @property
    def rows(self) -> int:
        return 1 if self._peer else self.settings.guidance.rows

    def network_inputs(self) -> dict[str, Any]:
        return last_row(self.inputs) if self._peer else self.inputs

    def step_controls(self) -> tuple[Control, ...]:
        return self._peer.controls if self._peer else self.controls

    def residuals(self) -> tuple[Future[Residuals], ...]:
        if self._residuals is None:
            self._use_loaded_adapters()
            if self.lacks_adapters:
                return ()
        if self._residuals is None and (peer := self.guidance.peer) is not None:
            self._peer = peer
            # Before the residuals, which this step needs later.
            self._negative = peer.source.request(
                step=self.index,
                timestep=float(self.timestep),
                sample=self.model_input(),
                with_adapters=self.late_adapters is None,
            )
        return super().residuals()

    @property
    def lacks_adapters(self) -> bool:
        return self.late_adapters is not None and self.index >= self.late_adapters.steps

    def _use_loaded_adapters(self) -> None:
        """At a step boundary, before anything of the step is requested. Raises the error with which loading failed."""
        late = self.late_adapters
        if late is not None and late.loaded.done():
            self.adapters, self.adapter_key = late.loaded.result(), late.key
            self.late_adapters = None
            self.steps_without_adapters = self.index

    def awaited(self) -> tuple[Future[Any], ...]:
        if self.late_adapters is not None and self.lacks_adapters:
            return (self.late_adapters.loaded,)
        return (self._negative,) if self.own_half is not None and self._negative else super().awaited()

    def model_input(self) -> torch.Tensor:
        latents = torch.cat([self.latents] * self.rows) if self.rows > 1 else self.latents
        return self.sampler.scale(latents, self.timestep)

    def advance(self, noise: torch.Tensor) -> bool:
        # The pass had its residuals, however late they were.
        self.is_late = False
        if self._negative is not None:
            if not self._negative.done():
                self.own_half = noise
                return False
            try:
                noise = torch.cat([_checked(self._negative.result(), like=noise, step=self.index + 1), noise])
            except LatentflowError as error:
                self.lost(error)
                return False
        self.latents = self.sampler.step(
            self.settings.guidance.combine(noise),
            self.timestep,
            self.latents,
            generator=self.generator,
            eta=self.settings.eta,
        )
        self.index += 1
        self._begin_step()
        return True

    def lost(self, error: LatentflowError) -> bool:
        peer = self._peer
        if peer is None or self.is_late:
            return False
        if self.guidance.peer is peer:
            self.guidance.peer = None
        peer.source.give_up(error)
        self._begin_step()
        return True

    def _begin_step(self) -> None:
        self.is_late = False
        self.own_half = None
        self._peer = self._negative = self._residuals = None

    def stepped(self) -> None:
        self.listener.stepped(self)

    def finished(self) -> None:
        self.listener.finished(self)

    def failed(self, error: LatentflowError) -> None:
        self.listener.failed(self, error)

    def checkpoint(self) -> bytes:
        """The state from which `restore` resumes."""
        return checkpoint.freeze(
            {
                "settings": asdict(self.settings),
                "index": self.index,
                "without_adapters": self.steps_without_adapters if self.late_adapters is None else self.index,
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
            without_adapters = state["without_adapters"]
        except (KeyError, TypeError):
            raise DataLossError("A checkpoint lacks part of its state; start the request again.") from None
        if not same or latents.shape != self.latents.shape or not 0 <= index < self.total:
            raise DataLossError("A checkpoint belongs to another request; start this one again.")
        self.sampler.restore(sampler)
        self.generator.set_state(generator)
        self.latents = latents.to(self.latents)
        self.index = index
        self.steps_without_adapters = without_adapters


def initial_noise(
    shape: tuple[int, ...], *, generator: torch.Generator, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Standard normal latents, drawn as diffusers' pipelines draw them."""
    noise: torch.Tensor = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
    return noise


def _checked(noise: torch.Tensor, *, like: torch.Tensor, step: int) -> torch.Tensor:
    """A peer's prediction on the device of this replica's. UnavailableError where it cannot be used."""
    if noise.shape != like.shape:
        raise UnavailableError(
            f"The guidance peer's prediction of step {step} is of shape {list(noise.shape)} in place of {list(like.shape)}.",
            reason=Reason.PEER_UNAVAILABLE,
        )
    if not torch.isfinite(noise).all():
        raise UnavailableError(
            f"The guidance peer's prediction of step {step} is not finite.", reason=Reason.NOT_FINITE
        )
    return noise.to(like)
