"""The weights of a role's networks, which leave the device while the server sleeps.

Networks, parameters and buffers stay the same objects, so whatever refers to them stays valid; only their memory is
replaced. On a GPU the weights move to pinned host memory, or are dropped where that has no room. On a CPU they are always
dropped: the role's loader reads them again from the page cache, where most of them are mapped rather than copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain

import torch

from latentflow_nodes.engine.memory import free_bytes

_CPU = torch.device("cpu")
# Pinned memory is allocated in powers of two.
_MARGIN = 2

Networks = Mapping[str, torch.nn.Module]


class ModuleWeights:
    """The parameters and buffers of some networks. Used by one thread at a time, while no forward pass runs.

    Args:
        networks: By name.
        device: Where they run.
        load: Makes the same networks again from their files, on the CPU.
        keeps_copies: Released weights stay in host memory, where that has room for them.

    Attributes:
        total_bytes: Their size.
    """

    def __init__(
        self, networks: Networks, *, device: torch.device, load: Callable[[], Networks], keeps_copies: bool
    ) -> None:
        self._tensors = _tensors(networks)
        self._device = device
        self._load = load
        self._keeps_copies = keeps_copies
        self._is_released = False
        # In host memory, while the weights are released.
        self._kept: dict[str, torch.Tensor] | None = None
        self.total_bytes = sum(tensor.nbytes for tensor in self._tensors.values())

    def release(self) -> None:
        """Frees their memory on the device. Has no effect on weights that are released already."""
        if self._is_released:
            return
        if self._keeps_copies and free_bytes(_CPU) > _MARGIN * self.total_bytes:
            self._kept = self._copies()
        _empty(self._tensors)
        self._is_released = True
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def restore(self) -> None:
        """Brings back the values that the weights had when they were loaded. Whatever it raises leaves them released."""
        if not self._is_released:
            return
        loaded = _tensors(self._load()) if self._kept is None else self._kept
        # All of them before the first is used, so that nothing has changed if the device is full.
        placed = {name: loaded[name].data.to(self._device, non_blocking=True) for name in self._tensors}
        for name, tensor in self._tensors.items():
            tensor.data = placed[name]
        self._is_released = False
        if self._kept is None:
            # Whatever still refers to the loaded networks must not keep their memory at the next sleep.
            _empty(loaded)
        self._kept = None

    def _copies(self) -> dict[str, torch.Tensor] | None:
        """Copies in host memory, pinned for a GPU; None where that cannot be had."""
        is_gpu = self._device.type == "cuda"
        copies = {}
        try:
            for name, tensor in self._tensors.items():
                copies[name] = torch.empty_like(tensor.data, device=_CPU, pin_memory=is_gpu)
                copies[name].copy_(tensor.data, non_blocking=True)
        except RuntimeError:
            return None
        finally:
            if is_gpu:
                torch.cuda.synchronize(self._device)
        return copies


def _tensors(networks: Networks) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": tensor
        for part, network in networks.items()
        for name, tensor in chain(network.named_parameters(), network.named_buffers())
    }


def _empty(tensors: Mapping[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        tensor.data = tensor.new_empty(0)
