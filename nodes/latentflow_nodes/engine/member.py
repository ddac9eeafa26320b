"""What takes part in step batches: whole samples, and guidance halves of samples that another replica denoises.

Engine and runner know members alone. `Sample` and `Guest` differ in where a step's input comes from and where its
prediction goes.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from latentflow.errors import LatentflowError

from latentflow_nodes.adapters.layers import Layers
from latentflow_nodes.engine.forward_time import ForwardTime
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
        positive_only: It acts on the positive half, so its residuals are those of the last row.
    """

    source: ResidualSource
    scale: float
    start: float = 0.0
    end: float = 1.0
    positive_only: bool = False

    def rows(self, rows: int) -> int:
        """How many of a step's rows it acts on, the last ones."""
        return 1 if self.positive_only else rows

    def is_active(self, *, step: int, total: int) -> bool:
        """As diffusers' `control_guidance_start` and `_end`."""
        return not (step / total < self.start or (step + 1) / total > self.end)


@dataclass(eq=False, kw_only=True)
class Member(ABC):
    """One request's part in the step loop.

    Attributes:
        inputs: The network's inputs besides latents and timestep, with one row for each guidance half, negative first.
        is_guest: It leaves the places in the queue to the samples of this server.
        adapters: Layers to apply, with their weights, and `adapter_key`, equal for equal sets; (): none.
        latents: [1, channels, height, width].
        is_deterministic: It shares no forward pass, so that its result is bit-identical whatever else the server runs.
        index: Steps done.
        is_late: A pass did not get the residuals of the present step in time.
        own_half: The prediction of the row computed here, while that of the guidance peer is awaited.
        requested_at: When the present step was requested from the peers, by `time.monotonic`.
    """

    is_guest: ClassVar[bool] = False

    key: int
    request_id: str
    inputs: dict[str, Any]
    latents: torch.Tensor
    adapters: tuple[tuple[Layers, float], ...] = ()
    adapter_key: Hashable = ()
    controls: tuple[Control, ...] = ()
    is_deterministic: bool = False
    index: int = 0
    is_late: bool = False
    own_half: torch.Tensor | None = None
    forward_time: ForwardTime = field(default_factory=ForwardTime)
    residuals_wait_ns: int = 0
    first_step_ns: int = 0
    requested_at: float = 0.0
    _residuals: tuple[Future[Residuals], ...] | None = None

    @property
    @abstractmethod
    def total(self) -> int:
        """Steps of the request."""

    @property
    @abstractmethod
    def timestep(self) -> torch.Tensor:
        """The sampler's timestep of the present step."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """Rows of the present step that are computed here: 2 for both guidance halves, else 1."""

    @abstractmethod
    def model_input(self) -> torch.Tensor:
        """[rows, channels, height, width]: the latents, scaled by the sampler."""

    @abstractmethod
    def advance(self, noise: torch.Tensor) -> bool:
        """Does the step with the network's prediction for `model_input`. False where it is not done yet."""

    @abstractmethod
    def stepped(self) -> None:
        """A step is done, and not the last one. As `finished` and `failed` called from the engine's thread."""

    @abstractmethod
    def finished(self) -> None:
        """The last step is done."""

    @abstractmethod
    def failed(self, error: LatentflowError) -> None:
        """The member takes part in no further step."""

    def network_inputs(self) -> dict[str, Any]:
        """`inputs` of the rows that are computed here."""
        return self.inputs

    def step_controls(self) -> tuple[Control, ...]:
        """The ControlNets of the rows that are computed here."""
        return self.controls

    def active_controls(self) -> tuple[Control, ...]:
        """Those of `step_controls` that are active in the present step."""
        return tuple(c for c in self.step_controls() if c.is_active(step=self.index, total=self.total))

    @property
    def lacks_adapters(self) -> bool:
        """The present step needs adapters that are not loaded yet."""
        return False

    def awaited(self) -> tuple[Future[Any], ...]:
        """What has to be there before the member can take part in a pass or finish its step."""
        return self.residuals() if self.is_late else ()

    def lost(self, error: LatentflowError) -> bool:
        """Gives up what is awaited. False where the member cannot do without it."""
        return False

    def residuals(self) -> tuple[Future[Residuals], ...]:
        """What `active_controls` send for the present step, in their order; the first call of a step requests it."""
        if self._residuals is None:
            active = self.active_controls()
            latents = self.model_input() if active else self.latents
            self.requested_at = time.monotonic()
            self._residuals = tuple(
                control.source.request(
                    step=self.index,
                    timestep=float(self.timestep),
                    sample=latents[-control.rows(len(latents)) :],
                    scale=control.scale,
                )
                for control in active
            )
        return self._residuals

    @property
    def sits_out(self) -> bool:
        """Takes part in no pass until what it awaits is there."""
        return not all(future.done() for future in self.awaited())

    @property
    def must_merge(self) -> bool:
        """Its adapters are merged in every pass, because its result depends on how they are applied in the last bits."""
        return self.is_deterministic

    @property
    def group(self) -> Hashable:
        """Equal for members that can share a forward pass if their adapters allow it: shapes alone decide."""
        shapes = tuple((name, _shape(value)) for name, value in sorted(self.inputs.items()))
        return (tuple(self.latents.shape), shapes, self.key if self.is_deterministic else None)


def _shape(value: Any) -> Hashable:
    if isinstance(value, Mapping):
        return tuple((key, _shape(item)) for key, item in sorted(value.items()))
    return tuple(value.shape[1:])
