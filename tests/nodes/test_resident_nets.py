"""Which nets are on a device that has no memory for all of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial

import pytest
import torch
from latentflow.errors import FailedPreconditionError, LatentflowError
from latentflow.internal.metrics import NODE, Instruments
from latentflow.reasons import Reason
from latentflow_nodes.engine.load import Load
from latentflow_nodes.roles.nets import capacity
from latentflow_nodes.roles.resident_nets import ResidentNets, copied
from support.step_loop import EDGES, FAMILY, IMAGE, inputs

pytestmark = pytest.mark.asyncio
NAMES = ("", "a", "b", "c")


class Nets:
    """Resident nets of one number each.

    Args:
        room: Networks for which the device has memory; more are an error of torch.
    """

    def __init__(self, most: int, *, room: int = 9, read: Callable[[str], None] = lambda name: None) -> None:
        self.metrics = Instruments(NODE, model="m", role="ControlNet")
        self.load = Load(self.metrics)
        self.reads: list[str] = []

        def made(name: str) -> torch.nn.Module:
            self.reads.append(name)
            read(name)
            if len(self.load.state().nets) >= room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return network(name)

        self.resident = ResidentNets(
            {name: partial(made, name) for name in NAMES},
            first=("", network("")),
            capacity=most,
            device=torch.device("cpu"),
            load=self.load,
            metrics=self.metrics,
        )

    async def use(self, name: str) -> None:
        async with self.resident.use(name) as found:
            assert found.get_parameter("bias").item() == NAMES.index(name)

    def on_device(self) -> tuple[str, ...]:
        """In the order in which they were loaded, or used before others were."""
        return self.load.state().nets

    def value(self, metric: str, **labels: str) -> float:
        labels |= {"model": "m", "role": "ControlNet"}
        return self.metrics.registry.get_sample_value(metric, labels) or 0.0


def network(name: str) -> torch.nn.Linear:
    made = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(made.bias, NAMES.index(name))
    return made


async def test_a_copy_of_a_net_has_its_own_weights_and_the_same_results() -> None:
    moved = copied(EDGES, torch.clone)
    originals = {tensor.data_ptr() for tensor in EDGES.parameters()}
    assert originals.isdisjoint(tensor.data_ptr() for tensor in moved.parameters())
    # The weights of the original are mapped from a file, where they are aligned otherwise, so sums may round otherwise.
    assert torch.allclose(middle(moved), middle(EDGES), atol=1e-4)


@torch.inference_mode()
def middle(net: torch.nn.Module) -> torch.Tensor:
    """The residual that a net computes for the middle block."""
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    image = FAMILY.embed_control_image(net, IMAGE)
    return FAMILY.residuals(net, latents, torch.tensor([7]), image=image, inputs=inputs(1)).mid


@pytest.mark.parametrize(
    ("size", "free", "count", "expected"),
    [(10, 100, 3, 3), (10, 59, 3, 2), (10, 20, 3, 1), (10, 0, 3, 1), (10, 1000, 1, 1)],
)
async def test_half_of_the_free_memory_is_for_nets(size: int, free: int, count: int, expected: int) -> None:
    assert capacity(size=size, free=free, count=count) == expected


async def test_the_least_recently_used_net_leaves_the_device_for_another() -> None:
    nets = Nets(2)
    for name in ("a", "", "b"):
        await nets.use(name)
    assert set(nets.on_device()) == {"", "b"}
    assert nets.value("latentflow_net_evictions_total") == 1
    assert nets.value("latentflow_nets_resident") == 2
    assert nets.value("latentflow_loads_total", kind="net") == 2


async def test_nets_are_loaded_before_the_first_request_as_far_as_there_is_room() -> None:
    nets = Nets(3)
    await nets.resident.fill()
    assert nets.on_device() == ("", "a", "b")
    await nets.use("b")
    assert nets.reads == ["a", "b"]


async def test_requests_for_one_net_share_its_load() -> None:
    nets = Nets(2)
    await asyncio.gather(*(nets.use("a") for _ in range(5)))
    assert nets.reads == ["a"]


async def test_a_net_that_is_in_use_stays_and_the_next_load_takes_its_place_afterwards() -> None:
    nets = Nets(1)
    async with nets.resident.use(""):
        waiting = asyncio.create_task(nets.use("a"))
        later = asyncio.create_task(nets.use(""))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert nets.on_device() == ("",)
    await asyncio.gather(waiting, later)
    # The later request did not overtake, so a net that is requested all the time keeps no other from the device.
    assert nets.reads == ["a", ""]


async def test_a_net_on_the_device_is_used_while_another_is_loaded() -> None:
    reading, go_on = threading.Event(), threading.Event()

    def read(_: str) -> None:
        reading.set()
        assert go_on.wait(60)

    nets = Nets(2, read=read)
    loading = asyncio.create_task(nets.use("a"))
    await asyncio.to_thread(reading.wait, 60)
    await nets.use("")
    assert not loading.done()
    go_on.set()
    await loading


async def test_a_net_that_cannot_be_read_harms_no_other() -> None:
    def read(name: str) -> None:
        if name == "a":
            raise FailedPreconditionError("its files are gone", reason=Reason.WEIGHTS_UNAVAILABLE)

    nets = Nets(2, read=read)
    with pytest.raises(FailedPreconditionError, match="its files are gone"):
        await nets.use("a")
    for name in ("", "b", "c"):
        await nets.use(name)


async def test_a_device_with_less_memory_than_measured_holds_fewer_nets() -> None:
    nets = Nets(3, room=2)
    for name in ("a", "b", "c", "a"):
        await nets.use(name)
    assert len(nets.on_device()) == 2
    assert nets.value("latentflow_net_evictions_total") == 3


async def test_a_net_without_room_beside_nets_in_use_waits_for_them() -> None:
    reading = threading.Event()
    nets = Nets(2, room=1, read=lambda _: reading.set())
    async with nets.resident.use(""):
        waiting = asyncio.create_task(nets.use("a"))
        await asyncio.to_thread(reading.wait, 60)
    await waiting
    assert nets.on_device() == ("a",)


async def test_a_net_that_does_not_fit_alone_is_an_error_of_its_request() -> None:
    nets = Nets(1, room=0)
    with pytest.raises(LatentflowError) as caught:
        await nets.use("a")
    assert caught.value.reason == Reason.OUT_OF_MEMORY


async def test_a_request_that_is_cancelled_during_a_load_leaves_the_next_its_turn() -> None:
    reading, go_on = threading.Event(), threading.Event()

    def read(_: str) -> None:
        reading.set()
        assert go_on.wait(60)

    nets = Nets(1, read=read)
    async with AsyncExitStack() as stack:
        cancelled = asyncio.create_task(stack.enter_async_context(nets.resident.use("a")))
        await asyncio.to_thread(reading.wait, 60)
        cancelled.cancel()
        following = asyncio.create_task(nets.use("b"))
        go_on.set()
        await asyncio.wait([cancelled])
    await following
    assert nets.on_device() == ("b",)
