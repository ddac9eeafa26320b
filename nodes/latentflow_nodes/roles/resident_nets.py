"""Which nets of a ControlNet server are on its device: the most recently used ones, as many as there is memory for.

The others are in host memory: on a GPU's machine in pinned memory, from which they are copied while the device computes; with a
CPU in their files, which the kernel keeps in its page cache.

A net is used for one forward pass at a time and can leave the device between two steps of a request. So requests for more
nets than there is memory for make progress in turn, each step after a load.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

import structlog
import torch
from latentflow.internal.metrics import Instruments

from latentflow_nodes.engine.load import Load
from latentflow_nodes.engine.memory import is_out_of_memory, out_of_memory

_log = structlog.get_logger()


class ResidentNets:
    """The networks on a device. Used from one event loop.

    Args:
        read: By name, makes a network in host memory; called in a thread.
        first: The name of the network that is on the device already, and the network.
        capacity: Most networks on the device, at least 1.
        load: Where the names of those on the device are recorded.
    """

    def __init__(
        self,
        read: Mapping[str, Callable[[], torch.nn.Module]],
        *,
        first: tuple[str, torch.nn.Module],
        capacity: int,
        device: torch.device,
        load: Load,
        metrics: Instruments,
    ) -> None:
        self._read = read
        self._capacity = capacity
        self._device = device
        self._load = load
        self._metrics = metrics
        # The least recently used one first.
        self._resident = OrderedDict([first])
        self._uses: Counter[str] = Counter()
        # Copies in the host memory of a GPU's machine, of networks that may leave the device.
        self._in_host_memory: dict[str, torch.nn.Module] = {}
        # Held by the one that loads, so that loads happen in the order of the requests.
        self._turn = asyncio.Lock()
        self._is_short = False
        self._freed = asyncio.Event()
        self._report()

    @contextlib.asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[torch.nn.Module]:
        """A network, which stays on the device until the context is left.

        Where it is not on the device, it is loaded in place of the one that was used least recently. Only where all are in use,
        the call waits, and later calls wait behind it.

        Raises:
            FailedPreconditionError: Its files cannot be read any more, or the device has too little memory for it.
        """
        if name in self._resident and not self._is_short:
            network = self._take(name)
        else:
            async with self._turn:
                if name not in self._resident:
                    await self._bring(name)
                network = self._take(name)
        try:
            yield network
        finally:
            self._uses[name] -= 1
            self._freed.set()

    async def fill(self) -> None:
        """Loads networks in their order as long as there is room, before the first request."""
        for name in list(self._read)[: self._capacity]:
            if name not in self._resident:
                await self._bring(name)

    def clear(self) -> None:
        """Takes all networks off the device, while none is in use."""
        self._resident.clear()
        self._report()

    def _take(self, name: str) -> torch.nn.Module:
        self._resident.move_to_end(name)
        self._uses[name] += 1
        return self._resident[name]

    async def _bring(self, name: str) -> None:
        started = time.perf_counter()
        while True:
            await self._make_room()
            try:
                network = await _completed(asyncio.to_thread(self._placed, name))
                break
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if not self._resident:
                    raise out_of_memory() from error
                # Others use more of the device than when it was measured.
                self._capacity = len(self._resident)
                _log.warning("a net does not fit on the device", net=name, nets_on_device=self._capacity)
        self._resident[name] = network
        self._report()
        self._metrics.of("latentflow_loads_total", kind="net").inc()
        self._metrics.of("latentflow_load_seconds_total", kind="net").inc(time.perf_counter() - started)

    async def _make_room(self) -> None:
        while len(self._resident) >= self._capacity:
            unused = next((name for name in self._resident if not self._uses[name]), None)
            if unused is not None:
                del self._resident[unused]
                self._metrics.of("latentflow_net_evictions_total").inc()
                self._report()
                continue
            self._freed.clear()
            self._is_short = True
            try:
                await self._freed.wait()
            finally:
                self._is_short = False

    def _placed(self, name: str) -> torch.nn.Module:
        """A network on the device. In a thread."""
        network = self._in_host_memory.get(name)
        if network is None:
            network = self._read[name]()
            if self._device.type != "cpu" and self._capacity < len(self._read):
                self._in_host_memory[name] = network = _pinned(network)
        return network if self._device.type == "cpu" else _on_gpu(network, self._device)

    def _report(self) -> None:
        self._metrics.of("latentflow_nets_resident").set(len(self._resident))
        self._load.set_nets(tuple(self._resident))


async def _completed(work: Awaitable[torch.nn.Module]) -> torch.nn.Module:
    """The result of a thread. Waits for its end even if the caller is cancelled, because it takes memory of the device."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _pinned(network: torch.nn.Module) -> torch.nn.Module:
    """The network, its weights in memory from which a GPU copies without the CPU; where that has no room, unchanged."""
    with contextlib.suppress(RuntimeError):
        for tensor in network.parameters():
            tensor.data = tensor.data.pin_memory()
    return network


def _on_gpu(network: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """A copy of a network on a GPU, made while that computes."""
    stream, computing = torch.cuda.Stream(device), torch.cuda.default_stream(device)
    with torch.cuda.stream(stream):
        moved = copied(network, lambda tensor: tensor.to(device, non_blocking=True))
    stream.synchronize()
    for tensor in (*moved.parameters(), *moved.buffers()):
        # Once it is freed, its memory is not used again before the passes have ended that were begun with it.
        tensor.record_stream(computing)
    return moved


def copied(network: torch.nn.Module, move: Callable[[torch.Tensor], torch.Tensor]) -> torch.nn.Module:
    """A copy of a network, with what a function returns for each of its parameters and buffers."""
    moved: dict[int, torch.Tensor] = {
        id(one): torch.nn.Parameter(move(one.detach()), requires_grad=False) for one in network.parameters()
    }
    moved |= {id(one): move(one) for one in network.buffers()}
    # What is in the memo is not copied.
    return copy.deepcopy(network, moved)
