"""Adapters are merged exactly and undone bit for bit, and each is pulled once for all requests that need it."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latentflow.api.types import Engine
from latentflow.errors import UnavailableError
from latentflow_nodes.adapters.cache import AdapterCache
from latentflow_nodes.adapters.layers import Layer, Layers
from latentflow_nodes.adapters.merger import Merger
from support.packs import MODELS
from support.stack import Request, Stack, started

SETTINGS = settings(deadline=None, max_examples=40)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = {name: name for name in ("0", "1", "2")}


def module(dtype: torch.dtype) -> torch.nn.Sequential:
    """A linear layer and two convolutions."""
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Linear(12, 8), torch.nn.Conv2d(6, 10, 3), torch.nn.Conv2d(5, 7, 1, bias=False)
    ).to(dtype)


def layers(seed: int, *names: str) -> dict[str, Layer]:
    """An adapter of some layers of the module, with a rank for each."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in names:
        shape = module(torch.float32).get_parameter(f"{name}.weight").shape
        rank = 1 + (seed + int(name)) % 4
        a = torch.randn(rank, *shape[1:], generator=generator)
        b = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator)
        found[name] = Layer(a=a, b=b, alpha=1.5)
    return found


def expected(network: torch.nn.Module, adapters: list[tuple[Layers, float]]) -> dict[str, torch.Tensor]:
    """The merged weights, computed in float64."""
    found = {name: one.to(torch.float64) for name, one in network.state_dict().items()}
    for its, weight in adapters:
        for name, layer in its.items():
            delta = layer.b.double().flatten(1) @ layer.a.double().flatten(1)
            found[f"{name}.weight"] += (delta * weight * layer.alpha / layer.rank).view_as(found[f"{name}.weight"])
    return found


adapter_sets = st.lists(
    st.tuples(
        st.builds(lambda seed, names: layers(seed, *names), st.integers(0, 9), st.sets(st.sampled_from("012"))),
        st.floats(-2, 2),
    ),
    max_size=3,
)


@pytest.mark.parametrize("dtype", DTYPES)
@given(sets=st.lists(adapter_sets, max_size=4))
@SETTINGS
def test_weights_depend_on_the_last_set_alone_and_undo_is_exact(
    dtype: torch.dtype, sets: list[list[tuple[Layers, float]]]
) -> None:
    network = module(dtype)
    pristine = copy.deepcopy(network)
    merger = Merger(network, names=NAMES, what="denoiser")
    addresses = [one.data_ptr() for one in network.parameters()]
    for adapters in sets:
        merger.apply(adapters)
        for name, one in expected(pristine, adapters).items():
            torch.testing.assert_close(network.state_dict()[name], one.to(dtype))
    merger.apply([])
    assert [one.data_ptr() for one in network.parameters()] == addresses
    for name, one in pristine.state_dict().items():
        assert torch.equal(network.state_dict()[name], one)


def test_a_merge_that_fails_midway_leaves_nothing_in_the_weights() -> None:
    network = module(torch.float32)
    pristine = copy.deepcopy(network.state_dict())
    merger = Merger(network, names=NAMES, what="denoiser")
    odd = Layer(a=torch.ones(2, 5), b=torch.ones(10, 2), alpha=2)
    with pytest.raises(RuntimeError):
        merger.apply([(layers(1, "0") | {"1": odd}, 1.0)])
    merger.apply([])
    assert all(torch.equal(network.state_dict()[name], one) for name, one in pristine.items())


def test_a_device_without_memory_for_copies_of_weights_merges_and_undoes_exactly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = module(torch.float32)
    pristine = copy.deepcopy(network)
    merger = Merger(network, names=NAMES, what="denoiser")

    def full(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    adapters: list[tuple[Layers, float]] = [(layers(1, "0", "1"), 0.5)]
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "clone", full)
        merger.apply(adapters)
    for name, one in expected(pristine, adapters).items():
        torch.testing.assert_close(network.state_dict()[name], one.to(torch.float32))
    merger.apply([])
    assert all(torch.equal(network.state_dict()[name], one) for name, one in pristine.state_dict().items())


@pytest.mark.asyncio(loop_scope="session")
async def test_requests_with_one_lora_at_four_weights_share_few_merges() -> None:
    own: dict[str, dict[str, object]] = {"base": {"engine": Engine(threads=1, max_running=4)}}
    async with started(MODELS, "shapes", loras="loras", own=own) as stack:
        requests = [Request(steps=20, loras=[("neon", weight)]) for weight in (0.25, 0.5, 0.75, 1.0)]
        openings = await asyncio.gather(*(stack.denoise_open(one) for one in requests))
        await asyncio.gather(*(_finish(stack, opening) for opening in openings))
        assert _loads(stack, "merge") <= 24
        assert _loads(stack, "adapter") == 1


async def _finish(stack: Stack, opening: Any) -> None:
    async for _ in stack.denoising(opening):
        pass


def _loads(stack: Stack, kind: str) -> float:
    """How often the denoiser has merged adapters, or pulled one."""
    metrics = stack.nodes["base"].context.metrics
    labels = {"model": "base", "role": "Denoiser", "kind": kind}
    return metrics.registry.get_sample_value("latentflow_loads_total", labels) or 0.0


class Store:
    """A LoRA store whose answers the test releases."""

    def __init__(self, *, error: Exception | None = None, seed: int = 1) -> None:
        self.pulls = 0
        self.released = asyncio.Event()
        self._error = error
        self._layers = layers(seed, "0")

    async def pull(self) -> Layers:
        self.pulls += 1
        await self.released.wait()
        if self._error is not None:
            raise self._error
        return self._layers


async def _started(
    cache: AdapterCache, store: Store, *, digest: str = "d", count: int = 1
) -> list[asyncio.Task[Layers]]:
    """Requests for an adapter, all of which wait for it."""
    requests = [asyncio.create_task(cache.get(digest, "unet", store="a:1", pull=store.pull)) for _ in range(count)]
    await asyncio.sleep(0)
    return requests


async def test_concurrent_requests_for_one_adapter_share_its_pull() -> None:
    cache, store = AdapterCache(1 << 20), Store()
    requests = await _started(cache, store, count=3)
    store.released.set()
    first, *others = await asyncio.gather(*requests)
    assert all(other is first for other in others)
    assert await cache.get("d", "unet", store="b:1", pull=store.pull) is first
    assert store.pulls == 1


async def test_a_cancelled_request_does_not_end_the_pull_of_the_others() -> None:
    cache, store = AdapterCache(1 << 20), Store()
    first, second = await _started(cache, store, count=2)
    first.cancel()
    await asyncio.sleep(0)
    store.released.set()
    assert set(await second) == {"0"}
    assert first.cancelled()


async def test_the_error_of_a_pull_reaches_its_requests_and_no_later_one() -> None:
    cache, broken = AdapterCache(1 << 20), Store(error=UnavailableError("gone"))
    requests = await _started(cache, broken, count=2)
    broken.released.set()
    errors = await asyncio.gather(*requests, return_exceptions=True)
    assert [str(error) for error in errors] == ["gone", "gone"]
    store = Store()
    store.released.set()
    assert set(await cache.get("d", "unet", store="a:1", pull=store.pull)) == {"0"}


async def test_the_least_recently_used_adapters_are_dropped_beyond_the_limit() -> None:
    store = Store()
    store.released.set()
    size = sum(4 * one.numel() for layer in layers(1, "0").values() for one in (layer.a, layer.b))
    cache = AdapterCache(2 * size + 2)
    for digest in ("a", "b", "a", "c", "a"):
        await cache.get(digest, "unet", store="a:1", pull=store.pull)
    assert store.pulls == 3
    await cache.get("b", "unet", store="a:1", pull=store.pull)
    assert store.pulls == 4


async def test_an_adapter_larger_than_the_limit_is_served_and_not_kept() -> None:
    cache, store = AdapterCache(16), Store()
    store.released.set()
    for _ in range(2):
        assert set(await cache.get("d", "unet", store="a:1", pull=store.pull)) == {"0"}
    assert store.pulls == 2
