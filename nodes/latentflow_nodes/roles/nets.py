"""The nets of a ControlNet server: the one of the model's source, and further ones of the same architecture.

A further net that cannot be served is listed with the problem, and affects no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from latentflow.errors import FailedPreconditionError, LatentflowError, NotFoundError
from latentflow.internal.source_folder import SourceFolder
from latentflow.reasons import Reason

from latentflow_nodes import families
from latentflow_nodes.context import Context
from latentflow_nodes.engine.memory import is_out_of_memory
from latentflow_nodes.families.base import Family
from latentflow_nodes.roles.role import LOAD_ERRORS
from latentflow_nodes.weights import files


@dataclass(frozen=True, kw_only=True)
class Net:
    """A net that the server can serve, and how it is read from its files.

    Attributes:
        name: As ControlNetRef.net.
        folder: Its component folder or single file.
        digest: SHA-256 of its weights, hexadecimal.
        loaded: Its files, as they were when it was checked.
    """

    name: str
    family: Family
    folder: Path
    variant: str | None
    dtype: torch.dtype
    digest: str
    loaded: files.LoadedFiles

    def read(self) -> torch.nn.Module:
        """The network in host memory.

        Where the files have its element type, its weights are mapped from them, and are read when they are used.
        """
        return self.family.load_control_net(self.folder, dtype=self.dtype, variant=self.variant).eval()

    def read_again(self) -> torch.nn.Module:
        """As `read`, of a net that was read before. FailedPreconditionError where its files are missing or have changed."""
        try:
            self.loaded.check_unchanged()
            return self.read()
        except LatentflowError as error:
            raise FailedPreconditionError(
                f"The net {self.name!r} cannot be used any more: {error.message}", reason=Reason[error.reason]
            ) from error
        except LOAD_ERRORS as error:
            if is_out_of_memory(error):
                raise
            raise FailedPreconditionError(
                f"The net {self.name!r} in {self.folder} cannot be read any more: {_words(error)}. Put its files back.",
                reason=Reason.WEIGHTS_UNAVAILABLE,
            ) from error


@dataclass(frozen=True, kw_only=True)
class Nets:
    """All nets of a server.

    Attributes:
        served: By name, in the order of the workflow; that of the model's source is the first, with an empty name.
        problems: Of the others, why they cannot be served, by name.
    """

    served: dict[str, Net]
    problems: dict[str, str]

    @property
    def digest(self) -> str:
        """SHA-256 of the weights of all of them, hexadecimal."""
        digests = [net.digest for net in self.served.values()]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    def check(self, name: str) -> None:
        """Raises NotFoundError or FailedPreconditionError for a net that cannot be served."""
        if name in self.problems:
            raise FailedPreconditionError(
                f"The net {name!r} cannot be used: {self.problems[name]}", reason=Reason.WEIGHTS_UNAVAILABLE
            )
        if name not in self.served:
            raise NotFoundError(
                f"This ControlNet has no net {name!r}; it has {', '.join(filter(None, self.served)) or 'only one'}.",
                reason=Reason.UNKNOWN_MODEL,
            )


def of_source(context: Context) -> Net:
    """The net of the model's source. Raises an error where it cannot be served."""
    return _net(context, "", context.source())


def with_further(context: Context, first: Net, network: torch.nn.Module) -> Nets:
    """The net of the source and the further ones, each of which is read once to be checked.

    Args:
        network: The first net, as it was read.
    """
    served, problems = {first.name: first}, {}
    architecture = _architecture(network)
    for one in context.settings.nets:
        try:
            net = _net(context, one.name, context.folder_of(one.source))
            if _architecture(net.read()) != architecture:
                raise FailedPreconditionError(
                    f"{net.folder} has another architecture than {first.folder}, the net in the model's source; give it a "
                    "ControlNet of its own.",
                    reason=Reason.WEIGHTS_MISMATCH,
                )
            served[one.name] = net
        except LatentflowError as error:
            problems[one.name] = error.message
        except LOAD_ERRORS as error:
            problems[one.name] = f"It does not load: {_words(error)}."
    return Nets(served=served, problems=problems)


def size(network: torch.nn.Module) -> int:
    """Bytes of its weights."""
    return sum(tensor.nbytes for tensor in network.state_dict().values())


def capacity(*, size: int, free: int, count: int) -> int:
    """How many of `count` nets of `size` bytes each may be on a device with `free` bytes; at least 1.

    Half of the memory is left for what forward passes need.
    """
    return max(1, min(count, free // 2 // size))


def _net(context: Context, name: str, source: SourceFolder) -> Net:
    family = families.of_source(source, "ControlNet")
    folder = source.part(family.parts["ControlNet"][0])
    loaded = files.LoadedFiles(files.check(folder, variant=source.variant))
    return Net(
        name=name,
        family=family,
        folder=folder,
        variant=source.variant,
        dtype=context.dtype,
        digest=loaded.digest,
        loaded=loaded,
    )


def _architecture(network: torch.nn.Module) -> Sequence[tuple[str, torch.Size]]:
    return [(name, tensor.shape) for name, tensor in network.state_dict().items()]


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(". ")
