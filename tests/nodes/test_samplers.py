"""A sampler's state in another process, which may compute on another device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from latentflow.errors import FailedPreconditionError, InvalidRequestError
from latentflow.internal import weight_files
from latentflow_nodes.engine import samplers
from latentflow_nodes.engine.samplers import SAMPLERS, Sampler, placed
from support.packs import SHAPES

CONFIG = weight_files.config(SHAPES / "scheduler", "scheduler_config.json")
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


# Configurations in which diffusers' schedulers differ in the numbers of steps that they can run.
CONFIGS: dict[str, dict[str, Any]] = {
    "shapes": {},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "karras": {"use_karras_sigmas": True, "skip_prk_steps": True},
}


@pytest.mark.parametrize("changes", sorted(CONFIGS))
@pytest.mark.parametrize("name", [*sorted(SAMPLERS), *OWN])
def test_a_sampler_runs_the_steps_that_it_accepts_to_the_end(name: str, changes: str) -> None:
    own = name not in SAMPLERS
    config = CONFIG | CONFIGS[changes] | ({"_class_name": name} if own else {})
    accepted = 0
    for steps in (1, 2, 3, 999, 1000):
        try:
            samplers.check(name="" if own else name, config=config, steps=steps)
        except InvalidRequestError:
            continue
        accepted += 1
        made = Sampler(name="" if own else name, config=config, steps=steps, device=torch.device("cpu"))
        generator, latents = torch.Generator().manual_seed(1), torch.full((1, 4, 2, 2), 0.5) * made.initial_sigma
        for timestep in made.timesteps:
            noise = 0.9 * made.scale(latents, timestep)
            latents = made.step(noise, timestep, latents, generator=generator, eta=0.0)
        assert torch.isfinite(latents).all()
    assert accepted


@pytest.mark.parametrize(
    ("name", "changes", "steps", "words"),
    [
        ("PNDMScheduler", {}, 2, "ValueError operands could not be broadcast"),
        ("ddim", {"timestep_spacing": "leading", "steps_offset": 1}, 1000, "IndexError index 1000 is out of bounds"),
        ("dpmpp_2m", {"use_karras_sigmas": True}, 1000, "IndexError"),
        ("uni_pc", {"use_karras_sigmas": True}, 1000, "AssertionError"),
        ("uni_pc", {"timestep_spacing": "linspace"}, 1000, "its values become infinite"),
        ("lcm", {}, 999, "original_steps"),
    ],
)
def test_steps_at_which_a_scheduler_fails_are_refused_before_the_first(
    name: str, changes: dict[str, Any], steps: int, words: str
) -> None:
    own = name not in SAMPLERS
    with pytest.raises(InvalidRequestError) as caught:
        samplers.check(
            name="" if own else name, config=CONFIG | changes | ({"_class_name": name} if own else {}), steps=steps
        )
    assert words in caught.value.message
    assert "one of the samplers ddim" in caught.value.message or own


def test_the_fewest_steps_of_a_model_are_those_that_its_scheduler_can_run() -> None:
    assert samplers.fewest(CONFIG) == 1
    assert samplers.fewest(CONFIG | {"_class_name": "PNDMScheduler"}) == 4
    with pytest.raises(FailedPreconditionError, match="NoSuchScheduler of this model cannot run"):
        samplers.fewest(CONFIG | {"_class_name": "NoSuchScheduler"})
