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
    """

    def __init__(self, module: torch.nn.Module, *, what: str) -> None:
        self._module = module
        self._what = what
        self._pristine: dict[str, torch.Tensor] = {}
        self._touched: set[str] = set()

    def check(self, adapter: str, layers: Mapping[str, Layer]) -> None:
        """FailedPreconditionError unless every layer exists here and has this shape."""
        for name, layer in layers.items():
            weight = self._weight(name)
            if weight is None:
                raise FailedPreconditionError(
                    f"Adapter {adapter!r} changes layer {name!r}, which this {self._what} does not have; "
                    "it was trained for another base model.",
                    reason=Reason.ADAPTER_MISMATCH,
                )
            wanted = (weight.shape[0], math.prod(weight.shape[1:]))
            if (layer.b.shape[0], math.prod(layer.a.shape[1:])) != wanted:
                raise FailedPreconditionError(
                    f"Adapter {adapter!r} changes layer {name!r} by {layer.b.shape[0]}x{math.prod(layer.a.shape[1:])} "
                    f"where this {self._what} has {wanted[0]}x{wanted[1]}; it was trained for another base model.",
                    reason=Reason.ADAPTER_MISMATCH,
                )

    @torch.no_grad()
    def apply(self, adapters: Sequence[tuple[Mapping[str, Layer], float]]) -> None:
        """Sets the weights to the pristine ones plus exactly these adapters, each with its weight, in this order."""
        deltas: dict[str, torch.Tensor] = {}
        for layers, weight in adapters:
            for name, layer in layers.items():
                delta = layer.delta() * weight
                deltas[name] = deltas[name] + delta if name in deltas else delta
        for name in self._touched - deltas.keys():
            self._set(name, self._pristine[name])
        for name, delta in deltas.items():
            parameter = self._weight(name)
            if parameter is None:
                raise KeyError(name)
            if name not in self._pristine:
                self._pristine[name] = parameter.detach().to("cpu", copy=True)
            pristine = self._pristine[name]
            merged = pristine.to(torch.float32) + delta.reshape(pristine.shape)
            self._set(name, merged.to(pristine.dtype))
        self._touched = set(deltas)

    def _weight(self, name: str) -> torch.nn.Parameter | None:
        try:
            weight = self._module.get_submodule(name).weight
        except AttributeError:
            return None
        return weight if isinstance(weight, torch.nn.Parameter) else None

    def _set(self, name: str, value: torch.Tensor) -> None:
        # In place: the address does not change, so captured graphs and shared storage stay valid.
        parameter = self._weight(name)
        if parameter is None:
            raise KeyError(name)
        parameter.copy_(value)
