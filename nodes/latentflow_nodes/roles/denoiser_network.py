"""The network of a denoiser with what its engine needs of it: whole in this process, or divided among ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from latentflow_nodes.adapters.merger import Merger
from latentflow_nodes.context import Context
from latentflow_nodes.engine.runner import EagerRunner, Runner
from latentflow_nodes.engine.tensor_parallel import DividedDenoiser, Process, Weights
from latentflow_nodes.families.base import Family


@dataclass(frozen=True, kw_only=True)
class DenoiserNetwork:
    """A loaded network.

    Attributes:
        module: The network; of a divided one rank 0's part.
        merger: Merges adapters into it.
        runner: Runs its forward passes.
        read: Reads the whole network again, on the CPU.
        close: Ends the other ranks, after the engine has stopped.
    """

    module: torch.nn.Module
    merger: Merger
    runner: Runner
    read: Callable[[], torch.nn.Module]
    close: Callable[[], None]


def load(context: Context, family: Family, *, component: str, path: Path, variant: str | None) -> DenoiserNetwork:
    """Loads a network as the settings require. FailedPreconditionError where it cannot be loaded, or not divided so.

    Args:
        component: Folder of the network in its pipeline.
        path: The component's folder, or a single file.
    """

    def read() -> torch.nn.Module:
        return family.load_denoiser(path, dtype=context.dtype, variant=variant)

    if context.settings.tensor > 1:
        divided = _divided(context, family, component=component, path=path, variant=variant)
        return DenoiserNetwork(
            module=divided.network, merger=divided.merger, runner=divided.runner, read=read, close=divided.close
        )
    module = read().to(context.device).eval()
    return DenoiserNetwork(
        module=module,
        merger=Merger(module, names=family.layer_names(component, module), what="denoiser"),
        runner=EagerRunner(network=module, family=family, device=context.device, lock=context.compute_lock),
        read=read,
        close=lambda: None,
    )


def _divided(context: Context, family: Family, *, component: str, path: Path, variant: str | None) -> DividedDenoiser:
    settings = context.settings
    weights = Weights(
        family=family,
        component=component,
        path=path,
        variant=variant,
        dtype=context.dtype,
        plan=family.plan_split(path),
    )
    name = settings.identity or settings.role
    return DividedDenoiser(
        weights,
        Process(name=name, log_format=settings.log_format, threads=settings.threads),
        devices=[torch.device(device) for device in settings.devices],
        lock=context.compute_lock,
    )
