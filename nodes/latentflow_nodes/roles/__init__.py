"""The roles: for each kind of model one module that loads it, warms it up, describes it and runs it.

`ROLES` is the one table of them; `load` makes the one that the settings name.
"""

from __future__ import annotations

import torch
from latentflow.errors import FailedPreconditionError
from latentflow.reasons import Reason
from latentflow.v1 import control_pb2

from latentflow_nodes.context import Context
from latentflow_nodes.roles.control_net import ControlNet
from latentflow_nodes.roles.denoiser import Denoiser
from latentflow_nodes.roles.lora_store import LoRAStore
from latentflow_nodes.roles.role import LOAD_ERRORS, Role, does_not_load
from latentflow_nodes.roles.text_encoder import TextEncoder
from latentflow_nodes.roles.vae import VAE

__all__ = ["ROLES", "Role", "calls", "load", "wire"]

# By its name in the workflow API: its class, and its value on the wire.
ROLES: dict[str, tuple[type[Role], control_pb2.Role]] = {
    "TextEncoder": (TextEncoder, control_pb2.ROLE_TEXT_ENCODER),
    "Denoiser": (Denoiser, control_pb2.ROLE_DENOISER),
    "ControlNet": (ControlNet, control_pb2.ROLE_CONTROL_NET),
    "LoRAStore": (LoRAStore, control_pb2.ROLE_LORA_STORE),
    "VAE": (VAE, control_pb2.ROLE_VAE),
}


def calls(role: str) -> tuple[str, ...]:
    """The methods of the Stage service that a role serves."""
    return ROLES[role][0].calls


def wire(role: str) -> control_pb2.Role:
    """A role's value on the wire."""
    return ROLES[role][1]


def load(context: Context) -> Role:
    """Loads the model that the settings name. FailedPreconditionError where its weights or device cannot be used."""
    _check(context.device)
    cls: type = ROLES[context.settings.role][0]
    try:
        role: Role = cls(context)
    except LOAD_ERRORS as error:
        raise does_not_load(context.settings, error) from error
    return role


def _check(device: torch.device) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        problem = str(error).strip().partition("\n")[0].rstrip(".")
        raise FailedPreconditionError(
            f"This server cannot use the device {device}: {problem}. Check the driver and the number of the GPU, or use "
            "the device cpu.",
            reason=Reason.DEVICE_UNAVAILABLE,
        ) from None
