"""The status of the two resources, which the operator writes: a documented contract."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from latentflow.api.parts import Net, Role, Source, Typed


class ConditionType(StrEnum):
    """The conditions that a workflow and a model have."""

    READY = "Ready"
    MODELS_READY = "ModelsReady"
    WEIGHTS_AVAILABLE = "WeightsAvailable"
    SCHEDULED = "Scheduled"
    DEGRADED = "Degraded"
    PROGRESSING = "Progressing"


class Condition(Typed):
    """A condition of a resource, as Kubernetes defines it."""

    type: ConditionType = Field(description="The aspect that the condition describes.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether the condition holds.")
    reason: str = Field(min_length=1, max_length=1024, description="The cause, a constant CamelCase word.")
    message: str = Field(default="", max_length=32768, description="The cause and the remedy, in one sentence.")
    last_transition_time: str = Field(description="Time of the last change of the status, RFC 3339.")
    observed_generation: int | None = Field(
        default=None, ge=0, description="The generation of the spec that the condition describes."
    )


class Scheduling(Typed):
    """The last decision of the scheduler for a model."""

    replicas: int | None = Field(default=None, ge=0, description="Number of replicas that it decided.")
    reason: str | None = Field(default=None, max_length=1024, description="The cause, in one line.")
    signals: Literal["Present", "Missing"] | None = Field(
        default=None, description="Missing: the load of the model is unknown, so its replicas stay unchanged."
    )
    time: str | None = Field(default=None, description="Time of the decision, RFC 3339.")


class ParallelismInForce(Typed):
    """The degrees of parallelism that are in force."""

    latent: int = Field(ge=1, description="Replicas that share one request's steps.")
    tensor: int = Field(ge=1, description="Devices that share one replica's weights.")


class BoundModel(Typed):
    """The DiffusionModel that serves one model of a workflow."""

    name: str = Field(max_length=63, description="Name within the workflow.")
    role: Role = Field(description="The function of the model in a workflow.")
    model: str = Field(max_length=63, description="The DiffusionModel that serves it.")
    replicas: int = Field(default=0, ge=0, description="Desired number of replicas.")
    ready_replicas: int = Field(default=0, ge=0, description="Number of replicas that accept requests.")
    next: str | None = Field(
        default=None, max_length=63, description="The DiffusionModel that takes over when it is ready, after a change."
    )
    parallelism: ParallelismInForce | None = Field(default=None, description="The degrees of parallelism in force.")
    scheduling: Scheduling | None = Field(default=None, description="The last decision of the scheduler for it.")


class WorkflowStatus(Typed):
    """The status of a workflow."""

    observed_generation: int | None = Field(
        default=None, ge=0, description="The generation of the spec that the status describes."
    )
    conditions: list[Condition] = Field(default_factory=list, max_length=16, description="The conditions, by type.")
    models: list[BoundModel] = Field(
        default_factory=list, max_length=32, description="The DiffusionModel that serves each model."
    )
    models_ready: str | None = Field(
        default=None, max_length=16, description="Models that accept requests, of all models, such as 3/5."
    )
    endpoint: str | None = Field(default=None, max_length=512, description="host:port of the gateways in the cluster.")


class ModelStatus(Typed):
    """The status of a model."""

    observed_generation: int | None = Field(
        default=None, ge=0, description="The generation of the spec that the status describes."
    )
    conditions: list[Condition] = Field(default_factory=list, max_length=16, description="The conditions, by type.")
    replicas: int = Field(default=0, ge=0, description="Number of pods.")
    ready_replicas: int = Field(default=0, ge=0, description="Number of pods that accept requests.")
    selector: str | None = Field(
        default=None, max_length=512, description="Label selector of its pods, for autoscalers."
    )
    parallelism: ParallelismInForce | None = Field(default=None, description="The degrees of parallelism in force.")
    source: Source | None = Field(default=None, description="The source as resolved, an hf:// revision pinned.")
    nets: list[Net] | None = Field(
        default=None, max_length=32, description="The nets with their sources as resolved; absent: the model has none."
    )
    scheduling: Scheduling | None = Field(default=None, description="The last decision of the scheduler.")
