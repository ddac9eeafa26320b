"""Merges adapters into a rank's part of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from latentflow_nodes.adapters.layers import Layer
from latentflow_nodes.adapters.merger import Merger
from latentflow_nodes.families.splits import INPUTS, Shard


class ShardMerger(Merger):
    """As `Merger`, for a module whose divided layers hold a part of their weights. Adapters are those of the whole network.

    Of a layer whose outputs are divided it takes the rows of B, and of one whose inputs are divided the columns of A.

    Args:
        shard: The part of the network that the module holds.
    """

    has_whole_layers = False

    def __init__(self, module: torch.nn.Module, *, names: Mapping[str, str], what: str, shard: Shard) -> None:
        super().__init__(module, names=names, what=what)
        self._shard = shard

    @torch.no_grad()
    def apply(self, adapters: Sequence[tuple[Mapping[str, Layer], float]]) -> None:
        super().apply(
            [({name: self._cut(name, layer) for name, layer in layers.items()}, weight) for layers, weight in adapters]
        )

    def _cut(self, name: str, layer: Layer) -> Layer:
        split = self._shard.splits.get(self._target(name))
        if split is None:
            return layer
        if split.dim == INPUTS:
            return replace(layer, a=self._shard.cut(split, layer.a))
        return replace(layer, b=self._shard.cut(split, layer.b))

    def _shape(self, name: str) -> Sequence[int]:
        shape = list(super()._shape(name))
        if (split := self._shard.splits.get(name)) is not None:
            shape[split.dim] = split.size
        return shape
