"""Every type of the workflow API: the two resources and what they consist of."""

from __future__ import annotations

from latentflow.api.model import ColocatedModel, DiffusionModel, Host, ModelSpec
from latentflow.api.parts import (
    API_VERSION,
    MODEL_LABEL,
    OPERATOR_LABELS,
    PATTERNS,
    ROLE_LABEL,
    Engine,
    Latent,
    Name,
    Net,
    Parallelism,
    Pod,
    Role,
    Scaling,
    Source,
    Typed,
    problems,
)
from latentflow.api.served import ScaledModel, ServedModel
from latentflow.api.workflow import Defaults, Degrade, DiffusionWorkflow, Editing, Metadata, Model, Slo, WorkflowSpec

__all__ = [
    "API_VERSION",
    "MODEL_LABEL",
    "OPERATOR_LABELS",
    "PATTERNS",
    "ROLE_LABEL",
    "ColocatedModel",
    "Defaults",
    "Degrade",
    "DiffusionModel",
    "DiffusionWorkflow",
    "Editing",
    "Engine",
    "Host",
    "Latent",
    "Metadata",
    "Model",
    "ModelSpec",
    "Name",
    "Net",
    "Parallelism",
    "Pod",
    "Role",
    "ScaledModel",
    "Scaling",
    "ServedModel",
    "Slo",
    "Source",
    "Typed",
    "WorkflowSpec",
    "problems",
]
