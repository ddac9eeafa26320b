"""A sampler's state in another process, which may compute on another device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from latentflow_nodes.engine.samplers import SAMPLERS, Sampler, placed
from latentflow_nodes.weights import files
from support.packs import SHAPES

CONFIG = files.config(SHAPES / "scheduler", "scheduler_config.json")
# Samplers that a model may have as its own, whose history is made of other attributes than those of `SAMPLERS`.
OWN = ["PNDMScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "DEISMultistepScheduler"]
# Those of them that can be made on the meta device.
HISTORY = ["dpmpp_2m", "uni_pc", "PNDMScheduler", "DEISMultistepScheduler"]
SHAPE = (1, 4, 8, 8)


def sampler(name: str, device: str) -> Sampler:
    own = name not in SAMPLERS
    config = CONFIG | {"_class_name": name} if own else CONFIG
    return Sampler(name="" if own else name, config=config, steps=6, device=torch.device(device))


def snapshot(name: str, steps: int) -> dict[str, Any]:
    """The state after steps on the CPU."""
    stepping, latents = sampler(name, "cpu"), torch.ones(SHAPE)
    generator = torch.Generator().manual_seed(1)
    for timestep in stepping.timesteps[:steps]:
        latents = stepping.step(0.5 * latents, timestep, latents, generator=generator, eta=0.0)
    return stepping.snapshot()


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [found for item in value for found in tensors(item)] if isinstance(value, list | tuple) else []


@pytest.mark.parametrize("name", [*sorted(SAMPLERS), *OWN])
def test_a_restored_history_is_where_the_latents_are(name: str) -> None:
    # The meta device holds no values: what is not moved there stands out without a GPU.
    for value in snapshot(name, 3).values():
        for tensor in tensors(placed(value, None, device=torch.device("meta"))):
            assert tensor.device.type == ("meta" if tensor.dim() else "cpu")


@pytest.mark.parametrize("name", HISTORY)
def test_a_sampler_with_a_history_restores_it_onto_its_device(name: str) -> None:
    restored = sampler(name, "meta")
    restored.restore(snapshot(name, 3))
    found = tensors({key: value for key, value in vars(restored._scheduler).items() if key != "config"})
    history = [tensor for tensor in found if tensor.shape == SHAPE]
    assert history
    assert {tensor.device.type for tensor in history} == {"meta"}


def test_what_a_fresh_sampler_has_too_stays_where_that_has_it() -> None:
    table, moved = torch.zeros(4), torch.zeros(4, device="meta")
    assert placed(torch.ones(4), table, device=torch.device("meta")).device.type == "cpu"
    assert placed(torch.ones(4), moved, device=torch.device("cpu")).device.type == "meta"
