"""What the operator says of a workflow and a model: the status of the two resources, a documented contract."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from latentflow.api.parts import Role, Source, Typed


class ConditionType(StrEnum):
    """The conditions that a workflow and a model have."""

    READY = "Ready"
    MODELS_READY = "ModelsReady"
    WEIGHTS_AVAILABLE = "WeightsAvailable"
    SCHEDULED = "Scheduled"
    DEGRADED = "Degraded"
    PROGRESSING = "Progressing"


class Condition(Typed):
    """One statement about a resource, as Kubernetes writes them."""

    type: ConditionType = Field(description="What it is about.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it is so.")
    reason: str = Field(min_length=1, max_length=1024, description="Why, in one CamelCase word.")
    message: str = Field(default="", max_length=32768, description="Why, in one sentence, and what to do.")
    last_transition_time: str = Field(description="When the status last changed, RFC 3339.")
    observed_generation: int | None = Field(default=None, ge=0, description="The generation that it is about.")


class Scheduling(Typed):
    """What the scheduler last decided for a model."""

    replicas: int | None = Field(default=None, ge=0, description="Replicas it asked for.")
    reason: str | None = Field(default=None, max_length=1024, description="Why, in one line.")
    signals: Literal["Present", "Missing"] | None = Field(
        default=None, description="Missing: nothing is known of its load, so it stays as it is."
    )
    time: str | None = Field(default=None, description="When, RFC 3339.")


class ParallelismInForce(Typed):
    """How a model is spread at present, whatever its spec allows."""

    latent: int = Field(ge=1, description="Replicas that share one request's steps.")
    tensor: int = Field(ge=1, description="Devices that share one replica's weights.")


class BoundModel(Typed):
    """What serves one model of a workflow."""

    name: str = Field(max_length=63, description="Name within the workflow.")
    role: Role = Field(description="What the model is for.")
    model: str = Field(max_length=63, description="The DiffusionModel that serves it.")
    replicas: int = Field(default=0, ge=0, description="Replicas it should have.")
    ready_replicas: int = Field(default=0, ge=0, description="Replicas that take requests.")
    next: str | None = Field(
        default=None, max_length=63, description="The DiffusionModel that takes over when it is ready, after a change."
    )
    parallelism: ParallelismInForce | None = Field(default=None, description="How it is spread at present.")
    scheduling: Scheduling | None = Field(default=None, description="What the scheduler last decided for it.")


class WorkflowStatus(Typed):
    """What has become of a workflow."""

    observed_generation: int | None = Field(default=None, ge=0, description="The generation this is about.")
    conditions: list[Condition] = Field(
        default_factory=list, max_length=16, description="Statements about it, by type."
    )
    models: list[BoundModel] = Field(default_factory=list, max_length=32, description="What serves each model.")
    models_ready: str | None = Field(default=None, max_length=16, description="Models that take requests, of all: 3/5.")
    endpoint: str | None = Field(default=None, max_length=512, description="host:port of the gateways in the cluster.")


class ModelStatus(Typed):
    """What has become of a model."""

    observed_generation: int | None = Field(default=None, ge=0, description="The generation this is about.")
    conditions: list[Condition] = Field(
        default_factory=list, max_length=16, description="Statements about it, by type."
    )
    replicas: int = Field(default=0, ge=0, description="Pods there are.")
    ready_replicas: int = Field(default=0, ge=0, description="Pods that take requests.")
    selector: str | None = Field(
        default=None, max_length=512, description="Label selector of its pods, for autoscalers."
    )
    parallelism: ParallelismInForce | None = Field(default=None, description="How it is spread at present.")
    source: Source | None = Field(default=None, description="The source as resolved, an hf:// revision pinned.")
    scheduling: Scheduling | None = Field(default=None, description="What the scheduler last decided.")
