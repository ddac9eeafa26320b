"""Merges adapters into a module's weights exactly, and undoes it bit for bit.

A layer's merged weight is W + sum_i weight_i * (alpha_i / rank_i) * B_i A_i, computed in float32 from the pristine W each
time. The product of the factors is added layer by layer, in place: no change of a whole layer is ever kept, so a merge
takes little more than reading and writing the changed weights once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from latentflow.errors import FailedPreconditionError
from latentflow.reasons import Reason

from latentflow_nodes.adapters.layers import Layer, by_module, flat


class Merger:
    """Merges adapters into one module's weights.

    Keeps a copy of every weight that it has changed, from before its first change. Every set of adapters, the empty one
    too, is computed from these copies, so that nothing drifts. Not thread-safe: only the thread that runs the module may
    call it.

    Args:
        names: The names of the module's layers in adapter files, as `Family.layer_names` returns them.
        what: The module's name in messages.

    Attributes:
        module, names: As the arguments.
        has_whole_layers: The module has all of each layer, so that adapters can be applied to it by row too (`RowAdapters`).
    """

    has_whole_layers: ClassVar = True

    def __init__(self, module: torch.nn.Module, *, names: Mapping[str, str], what: str) -> None:
        self.module = module
        self.names = names
        self._what = what
        self._pristine: dict[str, torch.Tensor] = {}
        # The weights that may differ from their copies.
        self._changed: set[str] = set()

    def check(self, adapter: str, layers: Mapping[str, Layer]) -> None:
        """FailedPreconditionError unless every layer exists here, once, and has this shape."""
        changed: dict[str, str] = {}
        for name, layer in layers.items():
            target = self.names.get(flat(name))
            if target is None:
                raise _mismatch(
                    f"LoRA {adapter!r} changes layer {name!r}, which this {self._what} does not have; "
                    "it was trained for another base model."
                )
            if target in changed:
                raise _mismatch(
                    f"LoRA {adapter!r} changes layer {target!r} twice, as {changed[target]!r} and as {name!r}; "
                    "remove one of them from its file."
                )
            changed[target] = name
            shape = self._shape(target)
            fits = layer.b.shape[0] == shape[0] and layer.a.shape[1] == shape[1]
            if not fits or math.prod(layer.a.shape[1:]) != math.prod(shape[1:]):
                raise _mismatch(
                    f"LoRA {adapter!r} changes layer {name!r} by B {list(layer.b.shape)} times A {list(layer.a.shape)}, "
                    f"and the layer of this {self._what} is {list(shape)}; it was trained for another base model."
                )

    @torch.no_grad()
    def apply(self, adapters: Sequence[tuple[Mapping[str, Layer], float]]) -> None:
        """Sets the weights to the pristine ones plus exactly these adapters, each with its weight, in this order.

        After an error in the middle of it, the next call starts from the pristine weights as well.
        """
        terms = by_module(adapters, names=self.names)
        for name in self._changed - terms.keys():
            self._restore(name)
        for name, of_layer in terms.items():
            if name in self._changed:
                self._restore(name)
            self._add(name, of_layer)

    def forget(self) -> None:
        """Undoes every merge and drops the copies, so that the memory of the weights may be replaced."""
        self.apply([])
        self._pristine.clear()

    def _restore(self, name: str) -> None:
        # In place, here and below: the address stays, so captured graphs and shared storage stay valid.
        self._weight(name).copy_(self._pristine[name])
        self._changed.discard(name)

    def _add(self, name: str, terms: Sequence[tuple[Layer, float]]) -> None:
        """Adds layers, each with its weight, to a pristine weight."""
        weight = self._weight(name)
        if name not in self._pristine:
            self._pristine[name] = _copied(weight)
        self._changed.add(name)
        matrix = weight.view(len(weight), -1)
        # float32 weights are changed where they are; others are rounded once.
        exact = matrix.to(torch.float32)
        for layer, strength in terms:
            b, a = layer.factors(weight.device)
            exact.addmm_(b, a, alpha=strength * layer.scale)
        if exact is not matrix:
            matrix.copy_(exact)

    def _target(self, name: str) -> str:
        """The layer of the module that an adapter's layer changes."""
        return self.names[flat(name)]

    def _shape(self, name: str) -> Sequence[int]:
        """The shape of a layer's weight, which adapters have to fit."""
        return self._weight(name).shape

    def _weight(self, name: str) -> torch.nn.Parameter:
        weight = self.module.get_submodule(name).weight
        if not isinstance(weight, torch.nn.Parameter):
            raise TypeError(f"{name} has no weight")
        return weight


def _copied(weight: torch.Tensor) -> torch.Tensor:
    """A copy on the weight's device, from where it is restored fastest; in host memory where the device's is full."""
    try:
        return weight.detach().clone()
    except torch.OutOfMemoryError:
        return weight.detach().to("cpu", copy=True)


def _mismatch(message: str) -> FailedPreconditionError:
    return FailedPreconditionError(message, reason=Reason.ADAPTER_MISMATCH)
