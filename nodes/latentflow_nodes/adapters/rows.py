"""Applies adapters without merging them: each row of a batch has its own set.

While adapters are applied, a layer's output is W x + sum_i weight_i * (alpha_i / rank_i) * B_i (A_i x) with the adapters of
the row. The factors of all sets of a batch are stacked, with zeros up to the highest rank, so that a layer takes two batched
products whatever the number of sets. The weights of the module stay as they are.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch.nn.functional import conv2d
from torch.utils.hooks import RemovableHandle

from latentflow_nodes.adapters.layers import Layer, Layers, by_module

AdapterSet = Sequence[tuple[Layers, float]]
# The adapters of a set in one layer: A, [rank, in * ...], and B with all strengths, [out, rank]. The ranks add up.
_Factors = tuple[torch.Tensor, torch.Tensor]


class RowAdapters:
    """Applies adapters to the rows of one module's batches.

    Not thread-safe: only the thread that runs the module may call it.

    Args:
        names: The names of the module's layers in adapter files, as `Family.layer_names` returns them.

    Attributes:
        is_supported: Whether adapters of any layer can be applied by row. Adapters of other modules have to be merged.
    """

    def __init__(self, module: torch.nn.Module, *, names: Mapping[str, str]) -> None:
        self._module = module
        self._names = names
        self.is_supported = all(_is_plain(module.get_submodule(name)) for name in set(names.values()))
        # The layers that the sets of the last batch change, and the position of each set in their stacks.
        self._layers: dict[str, _RowLayer] = {}
        self._positions: dict[Hashable, int] = {}
        self._rows: tuple[Hashable, ...] = ()
        self._hooks: list[RemovableHandle] = []

    @torch.no_grad()
    def apply(self, rows: Sequence[tuple[Hashable, AdapterSet]]) -> None:
        """Applies to each row of the following forward passes its own set, and nothing else.

        After an error nothing is applied.

        Args:
            rows: For each row of the batch its set of adapters, with their weights, after a key that is equal for equal sets.
        """
        keys = tuple(key for key, _ in rows)
        if keys == self._rows:
            return
        sets = dict(rows)
        try:
            if sets.keys() != self._positions.keys():
                self.remove()
                self._stack(sets)
            device = next(self._module.parameters()).device
            index = torch.tensor([self._positions[key] for key in keys], device=device)
            for layer in self._layers.values():
                layer.select(index)
        except BaseException:
            self.remove()
            raise
        self._rows = keys

    def remove(self) -> None:
        """Applies nothing any more, and frees the memory of the adapters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._layers, self._positions, self._rows = {}, {}, ()

    def _stack(self, sets: Mapping[Hashable, AdapterSet]) -> None:
        by_set = [by_module(adapters, names=self._names) for adapters in sets.values()]
        for name in dict.fromkeys(name for found in by_set for name in found):
            layer = self._module.get_submodule(name)
            assert isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
            self._layers[name] = _RowLayer(layer, [found.get(name, []) for found in by_set])
        self._hooks = [
            self._module.get_submodule(name).register_forward_hook(layer) for name, layer in self._layers.items()
        ]
        self._positions = {key: position for position, key in enumerate(sets)}


class _RowLayer:
    """The adapters of one layer, as a hook of its forward pass.

    Args:
        sets: For each set its adapters in this layer, with their weights.
    """

    def __init__(self, layer: torch.nn.Linear | torch.nn.Conv2d, sets: Sequence[Sequence[tuple[Layer, float]]]) -> None:
        out, inside = layer.weight.shape[0], layer.weight[0].numel()
        factors = [_factors(terms, layer.weight.device) for terms in sets]
        rank = max(len(a) for a, _ in filter(None, factors))
        # [sets, rank, in * ...] and [sets, out, rank].
        a, b = layer.weight.new_zeros(len(sets), rank, inside), layer.weight.new_zeros(len(sets), out, rank)
        for position, pair in enumerate(factors):
            if pair is not None:
                a[position, : len(pair[0])] = pair[0]
                b[position, :, : len(pair[0])] = pair[1]
        self._sets = (a, b)
        # The same of each row of the present batch.
        self._a, self._b = a, b

    def select(self, index: torch.Tensor) -> None:
        """Sets the rows of the following passes.

        Args:
            index: For each row the position of its set, on the layer's device.
        """
        self._a, self._b = (one.index_select(0, index) for one in self._sets)

    def __call__(self, layer: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        rows, x = len(self._a), inputs[0]
        if isinstance(layer, torch.nn.Linear):
            if x.dim() != 3:
                flat = self(layer, (x.reshape(rows, -1, x.shape[-1]),), output.reshape(rows, -1, output.shape[-1]))
                return flat.view(output.shape)
            # Measured on two cores: factors that are stored transposed make a layer's additional time 1.6 times as long.
            inner = torch.bmm(x, self._a.transpose(1, 2))
            # In place: nothing else has the output of a layer.
            return output.baddbmm_(inner, self._b.transpose(1, 2))
        assert isinstance(layer, torch.nn.Conv2d)
        flat = output.reshape(rows, output.shape[1], -1)
        return flat.baddbmm_(self._b, self._convolved(layer, x)).view(output.shape)

    def _convolved(self, layer: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        """A x of each row, [rows, rank, pixels]."""
        rows, rank = self._a.shape[:2]
        if layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0):
            return torch.bmm(self._a, x.reshape(rows, x.shape[1], -1))
        # Each row has a group of channels.
        inner = conv2d(
            x.reshape(1, -1, *x.shape[2:]),
            self._a.view(rows * rank, *layer.weight.shape[1:]),
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=rows,
        )
        return inner.view(rows, rank, -1)


def _is_plain(layer: torch.nn.Module) -> bool:
    """Whether its output is its weight times its input, so that A and B can be applied one after the other."""
    if isinstance(layer, torch.nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros"
    return isinstance(layer, torch.nn.Linear)


def _factors(terms: Sequence[tuple[Layer, float]], device: torch.device) -> _Factors | None:
    """The factors of a set in one layer, in float32; None where it does not change the layer."""
    if not terms:
        return None
    pairs = [(layer.factors(device), weight * layer.scale) for layer, weight in terms]
    return torch.cat([a for (_, a), _ in pairs]), torch.cat([b * strength for (b, _), strength in pairs], dim=1)
