"""The adapters that a denoiser's network has at present: one set merged into its weights, or by row beside them."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence

from latentflow.internal.metrics import Instruments

from latentflow_nodes.adapters.layers import Layers
from latentflow_nodes.adapters.merger import Merger
from latentflow_nodes.adapters.rows import RowAdapters
from latentflow_nodes.engine.batching import Merged
from latentflow_nodes.engine.load import moving_mean
from latentflow_nodes.engine.member import Member


class AppliedAdapters:
    """Changes the adapters of the network between passes. Used from the engine's thread.

    Args:
        merger: Merges adapters into the network; nothing is merged yet.
        metrics: Counts merges.

    Attributes:
        merge_seconds: How long a merge takes; 0 before the first.
    """

    def __init__(self, merger: Merger, metrics: Instruments) -> None:
        self._merger = merger
        self._metrics = metrics
        self._rows = RowAdapters(merger.module, names=merger.names)
        # None: unknown.
        self._merged: Hashable = ()
        self._merged_at = 0.0
        self.merge_seconds = 0.0

    @property
    def is_by_row_supported(self) -> bool:
        """Whether passes can have adapters by row."""
        return self._merger.has_whole_layers and self._rows.is_supported

    def merged(self) -> Merged:
        """The set that is merged now."""
        age = time.monotonic() - self._merged_at
        return Merged(adapters=self._merged, age=age, merge_seconds=self.merge_seconds)

    def apply(self, batch: Sequence[Member], *, by_row: bool) -> None:
        """Applies the adapters of the members of the next pass.

        Args:
            by_row: To each row those of its member. Otherwise all members have one set, which is merged.
        """
        if by_row:
            self._merge((), ())
            self._rows.apply([(one.adapter_key, one.adapters) for one in batch for _ in range(one.rows)])
        else:
            self._rows.remove()
            self._merge(batch[0].adapter_key, batch[0].adapters)

    def undo(self) -> None:
        """Undoes all adapters, and drops the copies of the weights that they changed."""
        self._rows.remove()
        self._merger.forget()
        self._merged = ()

    def _merge(self, key: Hashable, adapters: Sequence[tuple[Layers, float]]) -> None:
        if key == self._merged:
            return
        started = time.perf_counter()
        # Unknown until the merge has succeeded: after a failed one the next starts from the pristine weights.
        self._merged = None
        self._merger.apply(adapters)
        self._merged = key
        self._merged_at = time.monotonic()
        seconds = time.perf_counter() - started
        self.merge_seconds = moving_mean(self.merge_seconds, seconds)
        self._metrics.of("latentflow_loads_total", kind="merge").inc()
        self._metrics.of("latentflow_load_seconds_total", kind="merge").inc(seconds)
