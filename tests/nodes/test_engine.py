"""The step loop: requests join and leave at step boundaries, and one request's failure affects no other."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from latentflow.errors import LatentflowError, OverloadedError, UnavailableError
from latentflow.internal.guidance import Guidance
from latentflow.internal.metrics import NODE, Instruments
from latentflow.reasons import Reason
from latentflow_nodes import families
from latentflow_nodes.adapters.merger import Merger
from latentflow_nodes.engine.compute_lock import ComputeLock
from latentflow_nodes.engine.engine import Engine
from latentflow_nodes.engine.load import Load
from latentflow_nodes.engine.runner import EagerRunner
from latentflow_nodes.engine.sample import Control, Sample, Settings, initial_noise
from latentflow_nodes.engine.samplers import Sampler
from latentflow_nodes.families.base import Residuals
from latentflow_nodes.weights import files
from support.packs import SHAPES

FAMILY = families.of_pipeline(SHAPES)
NETWORK = UNet2DConditionModel.from_pretrained(SHAPES / "unet").eval()
SCHEDULER = files.config(SHAPES / "scheduler", "scheduler_config.json")


class Listener:
    """Records the progress of a sample."""

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
    """A ControlNet whose server has died."""

    def request(self, **_: Any) -> Future[Residuals]:
        future: Future[Residuals] = Future()
        future.set_exception(UnavailableError("gone", reason=Reason.PEER_UNAVAILABLE))
        return future


def sample(key: int, *, steps: int = 3, controls: tuple[Control, ...] = ()) -> tuple[Sample, Listener]:
    listener = Listener()
    settings = Settings(
        seed=key,
        steps=steps,
        shape=(1, 4, 8, 8),
        guidance=Guidance(scale=3.0, is_embedded=False),
        sampler="ddim",
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
        latents=initial_noise(settings.shape, generator=generator, dtype=torch.float32, device=torch.device("cpu")),
        listener=listener,
        controls=controls,
    )
    return made, listener


@pytest.fixture
def engine() -> Engine:
    """An engine that steps when the test calls it."""
    torch.set_num_threads(1)
    metrics = Instruments(NODE, model="m", role="Denoiser")
    return Engine(
        runner=EagerRunner(network=NETWORK, family=FAMILY, device=torch.device("cpu"), lock=ComputeLock(None)),
        merger=Merger(NETWORK, names={}, what="denoiser"),
        max_running=2,
        max_waiting=1,
        threads=1,
        load=Load(metrics),
        metrics=metrics,
    )


def test_a_later_request_joins_at_the_next_step(engine: Engine) -> None:
    (first, received_first), (second, received_second) = sample(1), sample(2)
    engine.submit(first)
    assert engine.step()
    engine.submit(second)
    assert engine.step()
    assert (received_first.steps, received_second.steps) == ([1, 2], [1])


def test_requests_that_share_forward_passes_equal_those_alone(engine: Engine) -> None:
    alone, received_alone = sample(1)
    engine.submit(alone)
    while engine.step():
        pass
    (first, received), (second, _) = sample(1), sample(2)
    engine.submit(first)
    engine.step()
    engine.submit(second)
    while engine.step():
        pass
    assert received.latents is not None
    assert received_alone.latents is not None
    assert (received.latents - received_alone.latents).abs().max() < 1e-4


def test_a_cancelled_request_takes_part_in_no_further_step(engine: Engine) -> None:
    (first, received_first), (second, received_second) = sample(1), sample(2)
    engine.submit(first)
    engine.submit(second)
    engine.step()
    engine.cancel(first.key)
    engine.step()
    assert received_first.steps == [1]
    assert received_second.steps == [1, 2]


def test_a_request_whose_controlnet_died_fails_alone(engine: Engine) -> None:
    broken, received_broken = sample(1, controls=(Control(source=Broken(), scale=1.0),))
    whole, received_whole = sample(2)
    engine.submit(broken)
    engine.submit(whole)
    while engine.step():
        pass
    assert received_broken.error is not None
    assert received_broken.error.reason == Reason.PEER_UNAVAILABLE
    assert received_whole.latents is not None


def test_only_the_defective_request_of_a_batch_fails(engine: Engine) -> None:
    (bad, received_bad), (good, received_good) = sample(1), sample(2)
    bad.latents = bad.latents.to(torch.float64)
    engine.submit(bad)
    engine.submit(good)
    while engine.step():
        pass
    assert received_bad.error is not None
    assert received_good.latents is not None


def test_a_full_queue_refuses_with_a_retry_delay(engine: Engine) -> None:
    for key in range(1, 4):
        engine.submit(sample(key)[0])
    with pytest.raises(OverloadedError, match="queue is full") as caught:
        engine.submit(sample(4)[0])
    assert caught.value.retry_after is not None


def test_a_stopping_engine_fails_every_sample(engine: Engine) -> None:
    one, received = sample(1, steps=1000)
    engine.start()
    engine.submit(one)
    engine.stop()
    assert received.error is not None
    assert received.error.reason == Reason.DRAINING


def test_an_idle_engine_steps_nothing(engine: Engine) -> None:
    assert not engine.step()


def test_a_pass_without_residuals_neither_synchronises_nor_branches_on_data() -> None:
    one, _ = sample(1)
    runner = EagerRunner(network=NETWORK, family=FAMILY, device=torch.device("cpu"), lock=ComputeLock(None))

    class Synchronising(torch.overrides.TorchFunctionMode):
        """Refuses to turn a tensor into a Python number, which waits for the device and cannot be captured."""

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert getattr(function, "__name__", "") not in {"item", "__bool__", "__int__", "__float__", "tolist"}
            return function(*args, **(kwargs or {}))

    with torch.inference_mode(), Synchronising():
        prediction = runner.run([one])
    assert prediction.noise[0].shape == (2, 4, 8, 8)
    assert prediction.time.nanoseconds() > 0
