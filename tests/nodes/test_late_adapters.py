"""A request may begin before its adapters are loaded, and uses them from a step boundary on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import grpc
import pytest
import torch
from latentflow.errors import UnavailableError
from latentflow.v1 import stage_pb2
from latentflow_nodes.engine.member import Member
from latentflow_nodes.engine.runner import Prediction
from latentflow_nodes.engine.sample import LateAdapters, Sample
from latentflow_nodes.tensors.peers import Peers
from support.stack import Request, Stack
from support.step_loop import Listener, Recording, engine_of, finish, sample

STEPS = 4
NEON = Request(loras=[("neon", 0.8)], steps=8)


class Keys(Recording):
    """Records the adapter sets of the passes."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[object] = []

    def run(self, batch: Sequence[Member], *, patience: float) -> Prediction:
        self.keys += [one.adapter_key for one in batch]
        return super().run(batch, patience=patience)


def late_sample(*, bound: int) -> tuple[Sample, Listener, Future[Any]]:
    one, listener = sample(1, steps=STEPS)
    loaded: Future[Any] = Future()
    one.late_adapters = LateAdapters(loaded=loaded, key="neon", steps=bound)
    return one, listener, loaded


@pytest.mark.parametrize("done", [0, 1, 2])
def test_adapters_take_effect_at_the_first_step_boundary_at_which_they_are_loaded(done: int) -> None:
    one, listener, loaded = late_sample(bound=3)
    runner = Keys()
    engine = engine_of(runner)
    engine.submit(one)
    for _ in range(done):
        assert engine.step()
    loaded.set_result(())
    finish(engine)
    assert listener.done.is_set()
    assert runner.keys == [()] * done + ["neon"] * (STEPS - done)
    assert one.steps_without_adapters == done


def test_at_its_bound_a_request_waits_while_others_run() -> None:
    one, listener, loaded = late_sample(bound=2)
    other, of_other = sample(2, steps=STEPS)
    runner = Keys()
    engine = engine_of(runner)
    engine.submit(one)
    engine.submit(other)
    finish(engine)
    assert of_other.done.is_set()
    assert one.index == 2
    assert not listener.done.is_set()
    loaded.set_result(())
    finish(engine)
    assert listener.done.is_set()
    assert one.steps_without_adapters == 2


def test_adapters_that_cannot_be_loaded_fail_their_request_alone() -> None:
    one, listener, loaded = late_sample(bound=2)
    other, of_other = sample(2, steps=STEPS)
    engine = engine_of(Keys())
    engine.submit(one)
    engine.submit(other)
    engine.step()
    loaded.set_exception(UnavailableError("The LoRA store is gone."))
    finish(engine)
    assert of_other.done.is_set()
    assert listener.error is not None
    assert "store is gone" in listener.error.message


def test_a_checkpoint_keeps_the_number_of_steps_without_adapters() -> None:
    for loaded_after, expected in ((1, 1), (None, 2)):
        one, _, loaded = late_sample(bound=3)
        engine = engine_of(Keys())
        engine.submit(one)
        for index in range(2):
            if index == loaded_after:
                loaded.set_result(())
            engine.step()
        again, _ = sample(1, steps=STEPS)
        again.restore(one.checkpoint())
        assert (again.index, again.steps_without_adapters) == (2, expected)


async def denoised(stack: Stack, request: Request) -> tuple[torch.Tensor, int]:
    result = await stack.denoise(request)
    return await stack.peers.fetch(result.latents, name="latents"), result.steps_without_adapters


@pytest.mark.asyncio(loop_scope="session")
async def test_a_denoiser_begins_without_a_lora_that_its_store_has_not_sent(
    shapes: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, none = await denoised(shapes, NEON)
    without, _ = await denoised(shapes, Request(steps=NEON.steps))
    assert none == 0
    sent = asyncio.Event()
    loop = asyncio.get_running_loop()
    adapters, stepped = Peers.adapters, Sample.stepped

    async def held(self: Peers, refs: Sequence[stage_pb2.AdapterRef], component: str) -> Any:
        loaded = await adapters(self, refs, component)
        if component == "unet":
            await sent.wait()
        return loaded

    def noted(self: Sample) -> None:
        stepped(self)
        if self.index == 2:
            loop.call_soon_threadsafe(sent.set)

    monkeypatch.setattr(Peers, "adapters", held)
    monkeypatch.setattr(Sample, "stepped", noted)
    latents, late = await denoised(shapes, Request(loras=NEON.loras, steps=NEON.steps, lora_async_steps=3))
    assert late in (2, 3)
    assert 0 < (latents - exact).abs().max() < (without - exact).abs().max()


@pytest.mark.asyncio(loop_scope="session")
async def test_a_deterministic_request_cannot_begin_without_its_lora(shapes: Stack) -> None:
    opening = await shapes.denoise_open(Request(loras=NEON.loras, lora_async_steps=1))
    opening.scheduling.deterministic = True
    with pytest.raises(grpc.aio.AioRpcError, match="how long it takes") as refused:
        await anext(aiter(shapes.denoising(opening)))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
