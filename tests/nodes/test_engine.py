"""The step loop: joining and leaving at step boundaries, and one request's failure that hurts no other."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from latentflow.errors import LatentflowError, OverloadedError, UnavailableError
from latentflow.internal.metrics import NODE, Instruments
from latentflow_nodes.adapters.merger import Merger
from latentflow_nodes.engine.compute_lock import Turn
from latentflow_nodes.engine.engine import Engine
from latentflow_nodes.engine.sample import Control, Residuals, Sample, Settings, initial_noise
from latentflow_nodes.engine.samplers import Sampler
from latentflow_nodes.weights import files
from support.packs import SHAPES

NETWORK = UNet2DConditionModel.from_pretrained(SHAPES / "unet").eval()
SCHEDULER = files.config(SHAPES / "scheduler", "scheduler_config.json")


class Listener:
    """Remembers what it hears."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.latents: torch.Tensor | None = None
        self.error: LatentflowError | None = None

    def stepped(self, sample: Sample) -> None:
        self.steps.append(sample.index)

    def finished(self, sample: Sample) -> None:
        self.latents = sample.latents

    def failed(self, sample: Sample, error: LatentflowError) -> None:
        self.error = error


class Broken:
    """A ControlNet that is gone."""

    def request(self, **_: Any) -> Future[Residuals]:
        future: Future[Residuals] = Future()
        future.set_exception(UnavailableError("gone", reason="PEER_UNAVAILABLE"))
        return future


def sample(key: int, *, steps: int = 3, controls: tuple[Control, ...] = ()) -> tuple[Sample, Listener]:
    listener = Listener()
    settings = Settings(
        seed=key, steps=steps, channels=4, height=8, width=8, guidance_scale=3.0, guidance=True, sampler="ddim"
    )
    generator = torch.Generator().manual_seed(key)
    width = NETWORK.config.cross_attention_dim
    made = Sample(
        key=key,
        request_id=str(key),
        settings=settings,
        inputs={"encoder_hidden_states": torch.randn(2, 8, width, generator=torch.Generator().manual_seed(1))},
        sampler=Sampler(name="ddim", config=SCHEDULER, steps=steps, device=torch.device("cpu")),
        generator=generator,
        latents=initial_noise(settings, generator=generator, dtype=torch.float32, device=torch.device("cpu")),
        listener=listener,
        controls=controls,
    )
    return made, listener


@pytest.fixture
def engine() -> Engine:
    """An engine that steps when the test says so."""
    torch.set_num_threads(1)
    return Engine(
        network=NETWORK,
        merger=Merger(NETWORK, what="denoiser"),
        max_running=2,
        max_waiting=1,
        threads=1,
        turn=Turn(None),
        metrics=Instruments(NODE, model="m", role="Denoiser"),
    )


def test_a_request_that_comes_later_joins_at_the_next_step(engine: Engine) -> None:
    (first, heard_first), (second, heard_second) = sample(1), sample(2)
    engine.submit(first)
    assert engine.step()
    engine.submit(second)
    assert engine.step()
    assert (heard_first.steps, heard_second.steps) == ([1, 2], [1])


def test_requests_that_share_forward_passes_get_what_they_get_alone(engine: Engine) -> None:
    alone, heard_alone = sample(1)
    engine.submit(alone)
    while engine.step():
        pass
    (first, heard), (second, _) = sample(1), sample(2)
    engine.submit(first)
    engine.step()
    engine.submit(second)
    while engine.step():
        pass
    assert heard.latents is not None
    assert heard_alone.latents is not None
    assert (heard.latents - heard_alone.latents).abs().max() < 1e-4


def test_a_cancelled_request_takes_part_in_no_further_step(engine: Engine) -> None:
    (first, heard_first), (second, heard_second) = sample(1), sample(2)
    engine.submit(first)
    engine.submit(second)
    engine.step()
    engine.cancel(first.key)
    engine.step()
    assert heard_first.steps == [1]
    assert heard_second.steps == [1, 2]


def test_a_request_whose_controlnet_is_gone_fails_alone(engine: Engine) -> None:
    broken, heard_broken = sample(1, controls=(Control(source=Broken(), scale=1.0),))
    whole, heard_whole = sample(2)
    engine.submit(broken)
    engine.submit(whole)
    while engine.step():
        pass
    assert heard_broken.error is not None
    assert heard_broken.error.reason == "PEER_UNAVAILABLE"
    assert heard_whole.latents is not None


def test_of_a_batch_only_the_request_that_cannot_run_fails(engine: Engine) -> None:
    (bad, heard_bad), (good, heard_good) = sample(1), sample(2)
    bad.latents = bad.latents.to(torch.float64)
    engine.submit(bad)
    engine.submit(good)
    while engine.step():
        pass
    assert heard_bad.error is not None
    assert heard_good.latents is not None


def test_a_full_queue_refuses_and_says_when_to_come_back(engine: Engine) -> None:
    for key in range(1, 4):
        engine.submit(sample(key)[0])
    with pytest.raises(OverloadedError, match="queue is full") as caught:
        engine.submit(sample(4)[0])
    assert caught.value.retry_after is not None


def test_a_stopping_engine_leaves_nobody_waiting(engine: Engine) -> None:
    one, heard = sample(1, steps=1000)
    engine.start()
    engine.submit(one)
    engine.stop()
    assert heard.error is not None
    assert heard.error.reason == "DRAINING"


def test_an_idle_engine_has_nothing_to_step(engine: Engine) -> None:
    assert not engine.step()
