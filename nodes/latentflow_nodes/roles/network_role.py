"""What the roles with networks have in common: their weights, which leave the device and return.

Such a role runs its networks in one thread. A sleeping role has none, because the thread and its OpenMP team are made anew
in less time than the first forward pass takes.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from latentflow.reasons import Reason

from latentflow_nodes.context import Context
from latentflow_nodes.engine.memory import device_full, is_out_of_memory
from latentflow_nodes.engine.module_weights import ModuleWeights, Networks
from latentflow_nodes.roles.role import LOAD_ERRORS, Role, does_not_load
from latentflow_nodes.weights.files import LoadedFiles


class NetworkRole(Role):
    """A role with networks. Its constructor starts the thread, and calls `_keep` unless the role overrides what needs it."""

    _context: Context

    def _keep(self, networks: Networks, *, files: LoadedFiles, load: Callable[[], Any]) -> None:
        """Notes what `release` and `restore` need.

        Args:
            networks: By name, on the device.
            files: What they were loaded from.
            load: Loads the same networks again, on the CPU.
        """
        self._files = files
        device = self._context.device
        self._weights = ModuleWeights(networks, device=device, load=load, keeps_copies=device.type != "cpu")
        self.weights_bytes = self._weights.total_bytes

    @abstractmethod
    def start(self) -> None:
        """Starts the role's thread again after `close`."""

    def undo_merges(self) -> None:
        """Undoes what adapters have changed in the weights, while the role has no thread."""

    async def release(self) -> None:
        """Frees the memory of the networks, while the role has no thread. Has no effect where it is free already."""
        await asyncio.to_thread(self._release)

    async def restore(self) -> None:
        """Restores the networks, or raises as `wake` does."""
        await asyncio.to_thread(self._restore)

    async def sleep(self) -> None:
        await asyncio.to_thread(self.close)
        await self.release()

    async def wake(self) -> None:
        try:
            await self.restore()
            self.start()
            await self.warm_up()
        except Exception as error:
            await self.sleep()
            if is_out_of_memory(error) or getattr(error, "reason", "") == Reason.OUT_OF_MEMORY:
                raise device_full(error) from error
            raise

    def _release(self) -> None:
        self.undo_merges()
        self._weights.release()

    def _restore(self) -> None:
        self._files.check_unchanged()
        try:
            self._weights.restore()
        except LOAD_ERRORS as error:
            if is_out_of_memory(error):
                raise
            raise does_not_load(self._context.settings, error) from error
