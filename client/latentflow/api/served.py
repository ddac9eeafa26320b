"""The settings of a model's servers and pods, which a workflow's models and the DiffusionModels have alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_serializer, model_validator

from latentflow.api.fields import Limits, field
from latentflow.api.parts import Engine, Net, Parallelism, Pod, Role, Scaling, Source, Typed


class ServedModel(Typed):
    """The settings of one model's servers."""

    role: Role = Field(description="The function of the model in a workflow.")
    source: Source | None = Field(default=None, description="Location of the weights.")
    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        default="float32", description="Element type of the weights."
    )
    engine: Engine = Field(default_factory=Engine, description="How the model's server runs it.")
    nets: list[Net] | None = Field(
        default=None,
        min_length=1,
        max_length=32,
        description="Further nets of a ControlNet, of the architecture of the one in source. Each of its servers holds all "
        "of them, the recently used ones on the device. A request selects one by its name, or else gets that of source.",
    )
    resources: dict[str, Any] = Field(default_factory=dict, description="As Container.resources: requests and limits.")

    @model_validator(mode="after")
    def _options_of_its_role(self) -> Self:
        self.engine.check(self.role)
        if self.role is Role.LORA_STORE and self.source is not None and self.source.variant is not None:
            raise ValueError("the files of a LoRAStore have no variants; remove source.variant")
        return self

    @model_validator(mode="after")
    def _nets_of_a_control_net(self) -> Self:
        names = [net.name for net in self.nets or ()]
        if names and self.role is not Role.CONTROL_NET:
            raise ValueError(f"only a ControlNet has nets, a {self.role} has none; remove them")
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two nets are named {doubled[0]!r}; every name has to be unique in its model")
        return self

    @field_serializer("engine")
    def _only_options_that_are_set(self, engine: Engine) -> dict[str, Any]:
        # So a later change of a default reaches objects that were written before, and a new option changes none.
        return engine.options()

    def sources(self) -> dict[str, Source]:
        """All its sources: that of the model with an empty name, then those of its nets by their names."""
        of_model = {} if self.source is None else {"": self.source}
        return of_model | {net.name: net.source for net in self.nets or ()}

    def with_sources(self, sources: Mapping[str, Source]) -> Self:
        """A copy with other sources, which are named as `sources` names them."""
        nets = [net.model_copy(update={"source": sources[net.name]}) for net in self.nets or ()]
        return self.model_copy(update={"source": sources.get(""), "nets": nets or None})

    def nets_option(self) -> str | None:
        """The value of the option `--nets` of its servers; None: it has no nets."""
        nets = [net.model_dump(mode="json", by_alias=True, exclude_none=True) for net in self.nets or ()]
        return json.dumps(nets) if nets else None

    def served(self) -> dict[str, Any]:
        """The fields that every ServedModel has, by their Python names."""
        return {name: getattr(self, name) for name in ServedModel.model_fields}


class ScaledModel(ServedModel):
    """A model that may have pods of its own."""

    scaling: Scaling = Field(default_factory=Scaling, description="Bounds of the number of replicas.")
    parallelism: Parallelism = Field(
        default_factory=Parallelism, description="Devices over which a request or a replica may be spread."
    )
    devices: Literal["Exclusive", "Shared"] = field(
        default="Exclusive",
        description="Exclusive: each replica has its devices to itself. Shared: replicas sleep and wake on devices that "
        "several models share.",
        limits=Limits(only=["Exclusive"]),
    )
    rollout: Literal["Surge", "Replace"] = Field(
        default="Surge",
        description="Surge: a new replica is ready before an old one ends. Replace: an old replica ends first, for clusters "
        "without spare devices; requests wait or fail meanwhile. In the embedded runtime it changes nothing.",
    )
    pod: Pod = Field(
        default_factory=Pod, description="Passed through to the model's pods, to each of their containers."
    )

    @model_validator(mode="after")
    def _only_denoisers_are_divided(self) -> Self:
        if self.role is not Role.DENOISER and self.parallelism.tensor_degree > 1:
            raise ValueError(f"parallelism.tensor is for a Denoiser, not for a {self.role}; remove it")
        return self
