"""Merges adapters into a module's weights exactly, and undoes it bit for bit.

A layer's merged weight is W + sum_i weight_i * (alpha_i / rank_i) * B_i A_i, computed in float32 from the pristine W each
time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from latentflow.errors import FailedPreconditionError
from latentflow.reasons import Reason

from latentflow_nodes.adapters.layers import Layer


class Merger:
    """Merges adapters into one module's weights.

    Keeps the pristine values of every weight that it has changed in host memory. Every set of adapters, the empty one too,
    is computed from them, so that nothing drifts. Not thread-safe: only the thread that runs the module may call it.

    Args:
        names: The names of the module's layers in adapter files, as `Family.layer_names` returns them.
        what: The module's name in messages.
    """

    def __init__(self, module: torch.nn.Module, *, names: Mapping[str, str], what: str) -> None:
        self._module = module
        self._names = names
        self._what = what
        self._pristine: dict[str, torch.Tensor] = {}
        self._touched: set[str] = set()

    def check(self, adapter: str, layers: Mapping[str, Layer]) -> None:
        """FailedPreconditionError unless every layer exists here, once, and has this shape."""
        changed: dict[str, str] = {}
        for name, layer in layers.items():
            target = self._names.get(_flat(name))
            if target is None:
                raise _mismatch(
                    f"Adapter {adapter!r} changes layer {name!r}, which this {self._what} does not have; "
                    "it was trained for another base model."
                )
            if target in changed:
                raise _mismatch(
                    f"Adapter {adapter!r} changes layer {target!r} twice, as {changed[target]!r} and as {name!r}; "
                    "remove one of them from its file."
                )
            changed[target] = name
            shape = self._weight(target).shape
            fits = layer.b.shape[0] == shape[0] and layer.a.shape[1] == shape[1]
            if not fits or math.prod(layer.a.shape[1:]) != math.prod(shape[1:]):
                raise _mismatch(
                    f"Adapter {adapter!r} changes layer {name!r} by B {list(layer.b.shape)} times A {list(layer.a.shape)}, "
                    f"and the layer of this {self._what} is {list(shape)}; it was trained for another base model."
                )

    @torch.no_grad()
    def apply(self, adapters: Sequence[tuple[Mapping[str, Layer], float]]) -> None:
        """Sets the weights to the pristine ones plus exactly these adapters, each with its weight, in this order."""
        deltas: dict[str, torch.Tensor] = {}
        for layers, weight in adapters:
            for name, layer in layers.items():
                target = self._names[_flat(name)]
                delta = layer.delta() * weight
                deltas[target] = deltas[target] + delta if target in deltas else delta
        for name in self._touched - deltas.keys():
            self._set(name, self._pristine[name])
        for name, delta in deltas.items():
            if name not in self._pristine:
                self._pristine[name] = self._weight(name).detach().to("cpu", copy=True)
            pristine = self._pristine[name]
            merged = pristine.to(torch.float32) + delta.reshape(pristine.shape)
            self._set(name, merged.to(pristine.dtype))
        self._touched = set(deltas)

    def _weight(self, name: str) -> torch.nn.Parameter:
        weight = self._module.get_submodule(name).weight
        if not isinstance(weight, torch.nn.Parameter):
            raise TypeError(f"{name} has no weight")
        return weight

    def _set(self, name: str, value: torch.Tensor) -> None:
        # In place: the address does not change, so captured graphs and shared storage stay valid.
        self._weight(name).copy_(value)


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _mismatch(message: str) -> FailedPreconditionError:
    return FailedPreconditionError(message, reason=Reason.ADAPTER_MISMATCH)
