"""Tensor parallelism: a denoiser whose weights are divided among the ranks of one replica.

Rank 0 has an engine like that of any denoiser. Its runner and its merger send each operation to the other ranks, which hold no
state but their weights: a pass takes latents, conditioning and residuals from rank 0 and leaves its result there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import structlog
import torch
from latentflow.errors import FailedPreconditionError, LatentflowError
from latentflow.internal import logs
from latentflow.reasons import Reason

from latentflow_nodes.adapters.layers import Layer, pack_layers, unpack_layers
from latentflow_nodes.adapters.merger import Merger
from latentflow_nodes.adapters.shard_merger import ShardMerger
from latentflow_nodes.engine import malloc, ranks
from latentflow_nodes.engine.compute_lock import ComputeLock
from latentflow_nodes.engine.ranks import Failed, Group, Place, Ranks
from latentflow_nodes.engine.runner import EagerRunner
from latentflow_nodes.engine.threads import compute_with
from latentflow_nodes.families.base import Family, LazyResiduals, Residuals
from latentflow_nodes.families.splits import INPUTS, Plan, Shard

_log = structlog.get_logger()


@dataclass(frozen=True)
class Pass:
    """A forward pass: latents, timestep, inputs, and whether residuals are added."""

    value: dict[str, Any]


@dataclass(frozen=True)
class Added:
    """The residuals of the present pass: those of the skip connections, and that of the middle block."""

    value: list[Any]


@dataclass(frozen=True)
class Merge:
    """The adapters to be merged: for each its layers, as named tensors, and its weight."""

    value: list[Any]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What each rank loads its part of.

    Attributes:
        component: Folder of the network in its pipeline.
        path: The component's folder, or a single file.
    """

    family: Family
    component: str
    path: Path
    variant: str | None
    dtype: torch.dtype
    plan: Plan

    def load(self, place: Place, group: Group) -> tuple[torch.nn.Module, Shard]:
        """A rank's part of the network, which sums over the ranks while it computes."""
        shard = Shard(plan=self.plan, rank=place.rank, ranks=place.ranks)
        loaded = self.family.load_denoiser(self.path, dtype=self.dtype, variant=self.variant, shard=shard)
        for split in self.plan.splits:
            if split.dim == INPUTS:
                loaded.get_submodule(split.layer).register_forward_hook(
                    lambda _module, _inputs, output: group.sum(output)
                )
        return loaded.to(place.device).eval(), shard

    def layer_names(self, network: torch.nn.Module) -> Mapping[str, str]:
        return self.family.layer_names(self.component, network)


@dataclass(frozen=True, kw_only=True)
class Process:
    """How the process of another rank runs.

    Attributes:
        name: Of the server, for logs.
        threads: Torch's threads of each rank.
    """

    name: str
    log_format: Any
    threads: int


class TensorRunner(EagerRunner):
    """Runs forward passes of a network on all ranks."""

    def __init__(
        self, *, network: torch.nn.Module, family: Family, device: torch.device, lock: ComputeLock, ranks: Ranks
    ) -> None:
        super().__init__(network=network, family=family, device=device, lock=lock)
        self._ranks = ranks

    def _predict(
        self, latents: torch.Tensor, timestep: torch.Tensor, inputs: dict[str, Any], residuals: LazyResiduals | None
    ) -> torch.Tensor:
        value = {"latents": latents, "timestep": timestep, "inputs": inputs, "has_residuals": residuals is not None}
        sent = None if residuals is None else _SentResiduals(residuals, self._ranks)
        with self._ranks.together():
            self._ranks.send(Pass, value)
            return super()._predict(latents, timestep, inputs, sent)


class _SentResiduals:
    """Residuals that rank 0 sends to the others as soon as they are there."""

    def __init__(self, residuals: LazyResiduals, ranks: Ranks) -> None:
        self._residuals = residuals
        self._ranks = ranks

    def wait(self) -> Residuals:
        found = self._residuals.wait()
        self._ranks.send(Added, [found.down, found.mid])
        return found


class _ReceivedResiduals:
    """The residuals that rank 0 sends."""

    def __init__(self, connection: Connection, group: Group) -> None:
        self._connection = connection
        self._group = group

    def wait(self) -> Residuals:
        message = self._connection.recv()
        if not isinstance(message, Added):
            raise ranks.Abandoned
        down, mid = ranks.replaced(message.value, ranks.Blank, self._group.receive)
        return Residuals(down=tuple(down), mid=mid)


class _RanksMerger(ShardMerger):
    """Merges adapters on all ranks."""

    def __init__(
        self, module: torch.nn.Module, *, names: Mapping[str, str], what: str, shard: Shard, ranks: Ranks
    ) -> None:
        super().__init__(module, names=names, what=what, shard=shard)
        self._ranks = ranks

    def apply(self, adapters: Sequence[tuple[Mapping[str, Layer], float]]) -> None:
        with self._ranks.together():
            self._ranks.send(Merge, [(pack_layers(layers), weight) for layers, weight in adapters])
            super().apply(adapters)


class DividedDenoiser:
    """Rank 0's part of a denoiser, and the other ranks, which are started here.

    Attributes:
        network, merger, runner: What an engine needs.

    Args:
        devices: Of all ranks, this one first.
        lock: Held while all ranks compute.
    """

    def __init__(
        self, weights: Weights, process: Process, *, devices: Sequence[torch.device], lock: ComputeLock
    ) -> None:
        # Before any rank loads anything.
        weights.plan.check(len(devices))
        _check(devices)
        self._ranks = Ranks(follow, (weights, process), devices=devices)
        with self._ranks.loading():
            self.network, shard = weights.load(self._ranks.place, self._ranks.group)
        self.merger: Merger = _RanksMerger(
            self.network, names=weights.layer_names(self.network), what="denoiser", shard=shard, ranks=self._ranks
        )
        self.runner = TensorRunner(
            network=self.network, family=weights.family, device=devices[0], lock=lock, ranks=self._ranks
        )

    def close(self) -> None:
        """Ends the other ranks. The engine has to be stopped."""
        self._ranks.close()


def _check(devices: Sequence[torch.device]) -> None:
    """FailedPreconditionError where this machine has fewer GPUs than ranks need."""
    present = torch.cuda.device_count()
    if devices[-1].type == "cuda" and (devices[-1].index or 0) >= present:
        raise FailedPreconditionError(
            f"The {len(devices)} ranks need the GPUs {devices[0].index or 0} to {devices[-1].index}, and this server has "
            f"{present}. Give it as many GPUs as parallelism.tensor, or lower that.",
            reason=Reason.DEVICE_UNAVAILABLE,
        )


def follow(connection: Connection, place: Place, part: tuple[Weights, Process]) -> None:
    """The process of another rank than 0: loads its part, and does what rank 0 sends until it ends."""
    ranks.begin_following()
    weights, process = part
    logs.configure(process=f"{process.name} rank {place.rank}", form=process.log_format)
    compute_with(process.threads)
    malloc.keep_freed_memory()
    connection.send(ranks.Ready())
    try:
        group = Group(place)
        network, shard = weights.load(place, group)
    except LatentflowError as error:
        connection.send(ranks.Refusal(error.message, Reason[error.reason]))
        return
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        connection.send(ranks.Refusal(f"{type(error).__name__}: {error}", None))
        return
    merger = ShardMerger(network, names=weights.layer_names(network), what="denoiser", shard=shard)
    connection.send(ranks.Ready())
    _Follower(connection, group, network, weights.family, merger).run()


class _Follower:
    """Does the operations that rank 0 sends."""

    def __init__(
        self, connection: Connection, group: Group, network: torch.nn.Module, family: Family, merger: Merger
    ) -> None:
        self._connection = connection
        self._group = group
        self._network = network
        self._family = family
        self._merger = merger

    def run(self) -> None:
        """Returns when the rank has to end: rank 0 requests it, or an operation failed here alone."""
        while not isinstance(message := self._connection.recv(), ranks.Stop):
            try:
                self._do(message)
            except ranks.Abandoned:
                pass
            except Exception as error:
                if not self._connection.poll(ranks.FAILURE_SECONDS) or not isinstance(self._connection.recv(), Failed):
                    _log.exception("an operation failed on this rank alone", exc_info=error)
                    raise SystemExit(1) from error
            else:
                continue
            self._connection.send(Failed())

    @torch.inference_mode()
    def _do(self, message: object) -> None:
        match message:
            case Pass():
                value = ranks.replaced(message.value, ranks.Blank, self._group.receive)
                residuals = _ReceivedResiduals(self._connection, self._group) if value["has_residuals"] else None
                self._family.predict(
                    self._network, value["latents"], value["timestep"], inputs=value["inputs"], residuals=residuals
                )
            case Merge():
                value = ranks.replaced(message.value, ranks.Blank, self._group.receive)
                self._merger.apply([(unpack_layers(tensors), weight) for tensors, weight in value])
            case Failed():
                raise ranks.Abandoned
