"""The roles: for each kind of model one module that loads it, warms it up, says what it is and runs it.

The servicers find a role's calls by its methods; `load` makes the one that the settings name.
"""

from __future__ import annotations

from typing import Protocol

from latentflow.errors import FailedPreconditionError
from latentflow.v1 import control_pb2, stage_pb2

from latentflow_nodes.context import Context
from latentflow_nodes.roles.control_net import ControlNet
from latentflow_nodes.roles.denoiser import Denoiser
from latentflow_nodes.roles.lora_store import LoRAStore
from latentflow_nodes.roles.text_encoder import TextEncoder
from latentflow_nodes.roles.vae import VAE


class Role(Protocol):
    """What every role can do besides its calls."""

    family: str
    content_digest: str

    def describe(self, response: control_pb2.DescribeResponse) -> None:
        """Fills in the role's own part of a description."""
        ...

    async def warm_up(self) -> None:
        """Runs the model once, so that the first request finds everything in place."""
        ...

    def close(self) -> None:
        """Ends the role's threads."""
        ...


_ROLES: dict[str, type[TextEncoder | Denoiser | ControlNet | LoRAStore | VAE]] = {
    "TextEncoder": TextEncoder,
    "Denoiser": Denoiser,
    "ControlNet": ControlNet,
    "LoRAStore": LoRAStore,
    "VAE": VAE,
}


def calls(role: str) -> list[str]:
    """The Stage calls that a role answers."""
    methods = stage_pb2.DESCRIPTOR.services_by_name["Stage"].methods
    return [method.name for method in methods if hasattr(_ROLES[role], method.name.lower())]


def load(context: Context) -> TextEncoder | Denoiser | ControlNet | LoRAStore | VAE:
    """Loads the model of the settings. LatentflowError where its weights cannot be used."""
    try:
        return _ROLES[context.settings.role](context)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        settings = context.settings
        raise FailedPreconditionError(
            f"{settings.role} {settings.uri}{'/' + settings.subfolder if settings.subfolder else ''} does not load: "
            f"{type(error).__name__}: {error}. Check that the folder is whole and is a {settings.role}'s.",
            reason="WEIGHTS_UNAVAILABLE",
        ) from error
