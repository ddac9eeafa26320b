"""DiffusionModel: one distinct model with its own servers, shared by the workflows that name it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from latentflow.api.parts import Name, Source, Typed
from latentflow.api.served import ScaledModel, ServedModel
from latentflow.api.workflow import Metadata


class Host(Typed):
    """The model in whose pods another model runs."""

    renamed: ClassVar[Mapping[str, str]] = {"place": "index"}

    model: Name = Field(description="The DiffusionModel, a denoiser, in whose pods it runs.")
    index: int = Field(
        ge=1, le=31, description="Its index among the denoiser's colocated models, which gives its ports."
    )


class ColocatedModel(ServedModel):
    """A model that runs in another model's pods, with the settings of its container."""

    model: Name = Field(description="Its own DiffusionModel.")
    source: Source = Field(description="Location of the weights.")


class ModelSpec(ScaledModel):
    """One distinct model, shared by all workflows that name it."""

    renamed: ClassVar[Mapping[str, str]] = {"inside": "host", "companions": "colocated", "near": "preferredHost"}

    replicas: int | None = Field(
        default=None,
        ge=0,
        le=1000,
        description="Desired replicas, written through the scale subresource. No effect on a model with a host, which "
        "has its host's replicas.",
    )
    host: Host | None = Field(
        default=None, description="The model in whose pods it runs; absent: it has pods of its own."
    )
    colocated: list[ColocatedModel] | None = Field(
        default=None,
        min_length=1,
        max_length=31,
        description="The models that run in its pods, in the order of their indices.",
    )
    preferred_host: Name | None = Field(
        default=None,
        description="The DiffusionModel with whose pods its pods should share a node, where that node has room.",
    )
    source: Source = Field(description="Location of the weights.")


class DiffusionModel(Typed):
    """One distinct model: served by its own servers, shared by the workflows that name it."""

    api_version: Literal["latentflow.io/v1alpha1"] = Field(description="latentflow.io/v1alpha1.")
    kind: Literal["DiffusionModel"] = Field(description="DiffusionModel.")
    metadata: Metadata = Field(description="Name and namespace.")
    spec: ModelSpec = Field(description="The model.")
