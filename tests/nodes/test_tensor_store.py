"""Held tensors: leases, loss, release."""

from __future__ import annotations

import asyncio

import pytest
import torch
from latentflow.errors import OwnerLostError
from latentflow.internal.metrics import NODE, Instruments
from latentflow_nodes.tensors import codec
from latentflow_nodes.tensors.store import INLINE_BYTES, TensorStore
from latentflow_nodes.tensors.transfer import Transport

LARGE = torch.zeros(INLINE_BYTES // 4 + 1)


class Clock:
    """Virtual time."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> TensorStore:
    metrics = Instruments(NODE, model="m", role="VAE")
    transport = Transport(memory=None, metrics=metrics)
    return TensorStore(address="a:1", lease=60, clock=clock, transport=transport, metrics=metrics)


def test_a_small_tensor_travels_in_its_message_and_is_not_held(store: TensorStore) -> None:
    tensor = torch.rand(INLINE_BYTES // 4)
    message = store.put(tensor)
    assert torch.equal(codec.from_inline(message), tensor)
    assert len(store) == 0


def test_a_held_tensor_is_read_any_number_of_times(store: TensorStore) -> None:
    tensor = torch.arange(INLINE_BYTES)
    handle = store.put(tensor).handle
    for _ in range(3):
        assert torch.equal(store.get(boot_id=handle.boot_id, key=handle.id).tensor, tensor)


def test_a_lease_that_is_not_renewed_expires(store: TensorStore, clock: Clock) -> None:
    handle = store.put(LARGE).handle
    clock.now = 59
    assert store.sweep() == 0
    clock.now = 60
    assert store.sweep() == 1
    with pytest.raises(OwnerLostError, match="Run the stage that produced it again"):
        store.get(boot_id=handle.boot_id, key=handle.id)


def test_a_renewed_lease_is_extended(store: TensorStore, clock: Clock) -> None:
    handle = store.put(LARGE).handle
    clock.now = 59
    assert store.renew(boot_id=handle.boot_id, keys=[handle.id, b"unknown"]) == [b"unknown"]
    clock.now = 100
    assert store.sweep() == 0
    assert len(store) == 1


def test_another_boot_finds_nothing_and_frees_nothing(store: TensorStore) -> None:
    handle = store.put(LARGE).handle
    with pytest.raises(OwnerLostError):
        store.get(boot_id="another", key=handle.id)
    assert store.release(boot_id="another", keys=[handle.id]) == 0
    assert store.renew(boot_id="another", keys=[handle.id]) == [handle.id]
    assert len(store) == 1


def test_releasing_twice_is_harmless(store: TensorStore) -> None:
    handle = store.put(LARGE).handle
    assert store.release(boot_id=handle.boot_id, keys=[handle.id]) == 1
    assert store.release(boot_id=handle.boot_id, keys=[handle.id]) == 0
    assert len(store) == 0


def test_a_request_releases_its_own_tensors_without_their_handles(store: TensorStore) -> None:
    for request_id in ("a", "a", "b", ""):
        store.put(LARGE, request_id=request_id)
    assert store.release(boot_id="", keys=[], request_id="a") == 2
    assert store.release(boot_id="", keys=[], request_id="") == 0
    assert len(store) == 2


async def test_a_draining_server_waits_for_release_or_expiry_of_its_tensors(store: TensorStore, clock: Clock) -> None:
    released, expired = store.put(LARGE).handle, store.put(LARGE).handle
    waiting = asyncio.create_task(store.emptied())
    store.release(boot_id=released.boot_id, keys=[released.id])
    assert await asyncio.wait({waiting}, timeout=0) == (set(), {waiting})
    clock.now = 60
    assert store.sweep() == 1
    await waiting
    with pytest.raises(OwnerLostError):
        store.get(boot_id=expired.boot_id, key=expired.id)
