"""Samplers by name, one object for each request, and their state as plain data.

A sampler is a diffusers scheduler made from the model's scheduler config. `snapshot` and `restore` move its state to
another process. They are generic: every attribute that a scheduler changes while it steps is part of its state, so no
sampler needs code of its own.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
from typing import Any

import diffusers
import torch
from latentflow.errors import DataLossError, FailedPreconditionError, InvalidRequestError
from latentflow.reasons import Reason

# ComfyUI's names; diffusers documents each sampler with these settings.
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "uni_pc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}
# Schedulers of higher order need several steps to begin.
_FEW = (1, 2, 4, 8, 16, 32)
# Attributes for the configuration, which stepping does not change.
_NOT_STATE = {"_internal_dict", "config"}


def available(config: dict[str, Any]) -> list[str]:
    """Names that a request may use, the model's own first."""
    own = str(config.get("_class_name", ""))
    names = [name for name, (cls, _) in SAMPLERS.items() if cls == own] or [own]
    return names + [name for name in SAMPLERS if name not in names]


def build(name: str, config: dict[str, Any]) -> Any:
    """A fresh scheduler. InvalidRequestError for a name that `available` does not list."""
    own = available(config)[0]
    name = name or own
    if name == own:
        return getattr(diffusers, str(config["_class_name"])).from_config(config)
    if name not in SAMPLERS:
        raise InvalidRequestError(
            f"Sampler {name!r} is not known; use one of {', '.join(available(config))}.", reason=Reason.UNKNOWN_SAMPLER
        )
    cls, settings = SAMPLERS[name]
    return getattr(diffusers, cls).from_config(config, **settings)


@functools.lru_cache(maxsize=64)
def _built(name: str, config: str) -> tuple[Any, frozenset[str]]:
    """A scheduler to copy, and the names of the parameters of its `step`."""
    scheduler = build(name, json.loads(config))
    return scheduler, frozenset(inspect.signature(scheduler.step).parameters)


def check(*, name: str, config: dict[str, Any], steps: int) -> None:
    """InvalidRequestError where a sampler cannot run this number of steps. The arguments are those of `Sampler`."""
    if problem := _problem(name, json.dumps(config, sort_keys=True), steps):
        raise InvalidRequestError(
            f"The sampler {name or available(config)[0]!r} cannot run {steps} steps with the configuration of this model: "
            f"{problem}. Use another number of steps, or one of the samplers {', '.join(available(config))}."
        )


def fewest(config: dict[str, Any]) -> int:
    """The fewest steps, of powers of two, that the model's own sampler can run. FailedPreconditionError if it runs none."""
    text = json.dumps(config, sort_keys=True)
    for steps in _FEW:
        if not (problem := _problem("", text, steps)):
            return steps
    raise FailedPreconditionError(
        f"The scheduler {config.get('_class_name')} of this model cannot run: {problem}. Correct scheduler_config.json.",
        reason=Reason.UNSUPPORTED_FAMILY,
    )


@functools.lru_cache(maxsize=1024)
def _problem(name: str, config: str, steps: int) -> str:
    """Why a sampler cannot run this number of steps; empty if it can.

    It is found by running them on a few numbers, because schedulers accept many numbers of steps and fail at their last
    step, or end with infinity.
    """
    generator = torch.Generator().manual_seed(0)
    latents = torch.ones(1, 1, 2, 2)
    try:
        sampler = Sampler(name=name, config=json.loads(config), steps=steps, device=torch.device("cpu"))
        latents = latents * sampler.initial_sigma
        for timestep in sampler.timesteps:
            noise = sampler.scale(latents, timestep) / 2
            latents = sampler.step(noise, timestep, latents, generator=generator, eta=0.0)
    except InvalidRequestError:
        # The name is unknown.
        raise
    except Exception as error:
        # Schedulers raise exceptions of many classes.
        return f"{type(error).__name__} {' '.join(str(error).split())[:200]}".rstrip(" .")
    return "" if torch.isfinite(latents).all() else "its values become infinite"


class Sampler:
    """One request's sampler.

    Args:
        name: As in `available`; empty for the model's own.
        config: The model's scheduler config, with `_class_name`.
        steps: Denoising steps, of which `check` knows whether the sampler can run them.
        device: Where the latents and the timesteps live.
    """

    def __init__(self, *, name: str, config: dict[str, Any], steps: int, device: torch.device) -> None:
        self._device = device
        # Building DDIM from its configuration takes 1.5 ms, copying it 0.3 ms.
        scheduler, accepted = _built(name, json.dumps(config, sort_keys=True))
        self._scheduler = copy.deepcopy(scheduler)
        self._scheduler.set_timesteps(steps, device=device)
        self._accepts_generator = "generator" in accepted
        self._accepts_eta = "eta" in accepted
        self._fresh = copy.deepcopy(_state(self._scheduler))

    @property
    def timesteps(self) -> torch.Tensor:
        """One for each forward pass, in order; solvers of second order have more of them than steps."""
        timesteps: torch.Tensor = self._scheduler.timesteps
        return timesteps

    @property
    def initial_sigma(self) -> float | torch.Tensor:
        sigma: float | torch.Tensor = self._scheduler.init_noise_sigma
        return sigma

    def scale(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The model's input for latents of any batch size."""
        scaled: torch.Tensor = self._scheduler.scale_model_input(latents, timestep)
        return scaled

    def step(
        self,
        noise: torch.Tensor,
        timestep: torch.Tensor,
        latents: torch.Tensor,
        *,
        generator: torch.Generator,
        eta: float,
    ) -> torch.Tensor:
        """The next latents; all are [1, channels, height, width]."""
        extra: dict[str, Any] = {}
        if self._accepts_generator:
            extra["generator"] = generator
        if self._accepts_eta:
            extra["eta"] = eta
        stepped: torch.Tensor = self._scheduler.step(noise, timestep, latents, **extra, return_dict=False)[0]
        return stepped

    def snapshot(self) -> dict[str, Any]:
        """The attributes that stepping has changed since the timesteps were set; for `restore` on an equal sampler."""
        return {key: value for key, value in _state(self._scheduler).items() if not _equal(value, self._fresh.get(key))}

    def restore(self, state: dict[str, Any]) -> None:
        """Sets the attributes of a snapshot. DataLossError for a snapshot that would replace a sampler's code."""
        # Some schedulers create attributes only when they step, so a fresh one may lack them.
        code = [key for key in state if hasattr(type(self._scheduler), key)]
        if code:
            raise DataLossError(f"A checkpoint belongs to another sampler: its {sorted(code)} are not state.")
        for key, value in state.items():
            setattr(self._scheduler, key, placed(value, self._fresh.get(key), device=self._device))


def placed(value: Any, fresh: Any, *, device: torch.device) -> Any:
    """A value of a thawed snapshot, which is on the CPU, on the device where a step reads it.

    What a fresh sampler has too, stays where that has it: schedulers keep tables on the CPU. What only stepping makes is
    made of latents, and on their device. A single number stays on the CPU, where the tables are that it comes from: as
    such it takes part in an operation without being rounded to a half-precision tensor's type first.
    """
    if isinstance(value, torch.Tensor):
        if isinstance(fresh, torch.Tensor):
            return value.to(fresh.device)
        return value.to(device) if value.dim() else value
    if isinstance(value, list | tuple):
        return type(value)(placed(item, None, device=device) for item in value)
    return value


def _state(scheduler: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(scheduler).items() if key not in _NOT_STATE}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return (
            isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape and bool((a == b).all())
        )
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    try:
        return bool(a == b)
    except ValueError:
        return bool((a == b).all())
