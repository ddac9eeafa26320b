"""Loads a rank's part of a network of diffusers: of the weight files it copies only the slices that the rank needs."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from latentflow.internal import weight_files
from safetensors import safe_open

from latentflow_nodes.families import single_files
from latentflow_nodes.families.splits import Shard
from latentflow_nodes.weights import files


def empty(cls: Any, path: Path, part: str) -> torch.nn.Module:
    """A network without weights, by the configuration of a component folder or of a part of a single file."""
    if path.is_file():
        return single_files.empty(cls, path, part)
    with init_empty_weights():
        module: torch.nn.Module = cls.from_config(weight_files.config(path))
    return module


def network(
    cls: Any, path: Path, part: str, *, dtype: torch.dtype, variant: str | None, shard: Shard
) -> torch.nn.Module:
    """A network with a rank's part of the weights, which computes with its part of heads and groups.

    FailedPreconditionError where the weights are not those that the configuration describes.
    """
    module = empty(cls, path, part)
    needed = module.state_dict()
    with contextlib.ExitStack() as stack:
        wholes = (
            single_files.converted(cls, path, part, needed)
            if path.is_file()
            else _slices(stack, path, variant=variant, needed=needed)
        )
        for name, whole in wholes.items():
            owner, _, attribute = name.rpartition(".")
            weight = torch.nn.Parameter(shard.parameter(name, whole).to(dtype), requires_grad=False)
            setattr(module.get_submodule(owner), attribute, weight)
    for count in shard.plan.counts:
        setattr(module.get_submodule(count.module), count.attribute, count.value // shard.ranks)
    return module


def _slices(
    stack: contextlib.ExitStack, folder: Path, *, variant: str | None, needed: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """The tensors of a component folder, unread. They can be read until the stack ends."""
    found: dict[str, Any] = {}
    for file in weight_files.of_component(folder, variant=variant):
        opened = stack.enter_context(safe_open(file, framework="pt"))
        found |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
    shapes = {name: tuple(one.get_shape()) for name, one in found.items()}
    files.check_complete(folder, files.differences(needed={k: tuple(v.shape) for k, v in needed.items()}, found=shapes))
    return found
