"""One guidance half of a sample that another replica denoises: a guest in this replica's step loop.

The other replica sends the model input of each step and receives the prediction. Between two steps the guest sits out, so it
occupies no slot and delays nobody. A server whose slots are taken refuses guests.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from latentflow.errors import InvalidRequestError, LatentflowError

from latentflow_nodes.adapters.layers import Layers
from latentflow_nodes.engine.member import Member
from latentflow_nodes.families.base import Residuals


@dataclass(eq=False, kw_only=True)
class Guest(Member):
    """The guest of one request.

    Attributes:
        steps: Steps of the request.
    """

    is_guest = True

    steps: int
    _timestep: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    _noise: torch.Tensor | None = None
    # Of the step under way; None between two steps.
    _answer: Future[torch.Tensor] | None = None
    _error: LatentflowError | None = None

    def begin(
        self,
        *,
        step: int,
        timestep: float,
        sample: torch.Tensor,
        adapters: tuple[tuple[Layers, float], ...],
        adapter_key: tuple[object, ...],
    ) -> Future[torch.Tensor]:
        """Begins a step, after the one before was answered. Called from the event loop; the engine has to be woken.

        Args:
            step: Steps done before this one.
            sample: Model input, [1, channels, height, width].
            adapters: Those in effect at this step, with their weights and their key.

        Returns:
            The prediction, of the sample's shape.
        """
        rows, channels = self.latents.shape[:2]
        if not self.index <= step < self.steps or sample.dim() != 4 or sample.shape[:2] != (rows, channels):
            raise InvalidRequestError(
                f"Step {step} with a sample of shape {list(sample.shape)} does not belong to a request of {self.steps} steps "
                f"with {channels} latent channels."
            )
        answer: Future[torch.Tensor] = Future()
        # A caller that leaves cannot cancel it: the engine's thread sets it in any case.
        answer.set_running_or_notify_cancel()
        if self._error is not None:
            answer.set_exception(self._error)
            return answer
        self.index = step
        self.latents = sample
        self.adapters, self.adapter_key = adapters, adapter_key
        self._timestep = torch.tensor(timestep, dtype=torch.float32, device=sample.device)
        # Last: from now on the engine takes the guest into a pass.
        self._answer = answer
        return answer

    @property
    def total(self) -> int:
        return self.steps

    @property
    def timestep(self) -> torch.Tensor:
        return self._timestep

    @property
    def rows(self) -> int:
        return 1

    def model_input(self) -> torch.Tensor:
        return self.latents

    @property
    def sits_out(self) -> bool:
        return self._answer is None or super().sits_out

    def residuals(self) -> tuple[Future[Residuals], ...]:
        return () if self._answer is None else super().residuals()

    def advance(self, noise: torch.Tensor) -> bool:
        self._noise = noise
        self.index += 1
        self.is_late = False
        self._residuals = None
        return True

    def stepped(self) -> None:
        answer, self._answer = self._answer, None
        if answer is not None and self._noise is not None:
            answer.set_result(self._noise)

    def finished(self) -> None:
        self.stepped()

    def failed(self, error: LatentflowError) -> None:
        self._error = error
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.set_exception(error)
