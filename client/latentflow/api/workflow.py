"""DiffusionWorkflow: the models of a generation task and what its requests get by default."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from latentflow.api.fields import ANY, Limits, field
from latentflow.api.parts import API_VERSION, Name, Pod, Role, Scaling, Size, Source, Typed
from latentflow.api.served import ScaledModel

ATTACHED = frozenset({Role.CONTROL_NET, Role.LORA_STORE})
SINGLE = (Role.TEXT_ENCODER, Role.DENOISER, Role.VAE)


class Model(ScaledModel):
    """A model of a workflow."""

    name: Name = Field(description="Name within the workflow; requests name ControlNets by it.")
    source: Source | None = Field(default=None, description="Location of the weights; or modelRef.")
    model_ref: Name | None = Field(default=None, description="Name of an existing DiffusionModel, instead of a source.")
    attach_to: Name | None = Field(
        default=None, description="The denoiser that a ControlNet or LoRA store works for; those two roles need it."
    )
    placement: Literal["Spread", "Colocated"] = Field(
        default="Spread",
        description="Colocated: a container in the denoiser's pods, with a memory volume between them; it scales with the "
        "denoiser. In the embedded runtime it changes nothing.",
    )

    @property
    def is_colocated(self) -> bool:
        """Whether it runs in its denoiser's pods."""
        return self.placement == "Colocated"

    @field_validator("placement", mode="before")
    @classmethod
    def _no_former_placement(cls, placement: Any) -> Any:
        if placement == "Together":
            raise ValueError("the placement Together was renamed; write Colocated")
        return placement

    @model_validator(mode="after")
    def _fits_its_placement(self) -> Model:
        if not self.is_colocated:
            return self
        if self.role is Role.DENOISER:
            raise ValueError(
                f"model {self.name!r} is the denoiser, in whose pods the others may run; remove its placement"
            )
        if self.model_ref is not None:
            raise ValueError(f"model {self.name!r} is a modelRef, which has its own pods; Colocated needs a source")
        if self.scaling != Scaling():
            raise ValueError(
                f"model {self.name!r} is Colocated with the denoiser and scales with it; set scaling on the denoiser"
            )
        if self.rollout != "Surge":
            raise ValueError(
                f"model {self.name!r} is Colocated with the denoiser in its pods; set rollout on the denoiser"
            )
        if self.pod != Pod():
            raise ValueError(f"model {self.name!r} is Colocated with the denoiser in its pods; set pod on the denoiser")
        return self

    @model_validator(mode="after")
    def _complete(self) -> Model:
        if (self.source is None) == (self.model_ref is None):
            raise ValueError(f"model {self.name!r} needs exactly one of source and modelRef")
        if self.role in ATTACHED and self.attach_to is None:
            raise ValueError(f"model {self.name!r} is a {self.role} and needs attachTo, the name of its denoiser")
        if self.role not in ATTACHED and self.attach_to is not None:
            raise ValueError(f"model {self.name!r} is a {self.role}; attachTo is for ControlNets and LoRA stores")
        return self


class Defaults(Typed):
    """The values of a request's fields that the request leaves out."""

    steps: int = Field(
        default=20,
        ge=1,
        le=1000,
        description="Denoising steps. With some samplers the denoiser runs more often, and progress counts its runs: 21 with "
        "PNDM for 20 steps.",
    )
    guidance_scale: float = Field(
        default=5.0, ge=0, le=100, description="Scale of classifier-free guidance; 1 or less: no guidance."
    )
    width: Size = Field(default=512, description="Image width in pixels, a multiple of 8.")
    height: Size = Field(default=512, description="Image height in pixels, a multiple of 8.")
    sampler: str | None = Field(default=None, max_length=64, description="Sampler by name; absent: the model's own.")
    negative_prompt: str | None = Field(default=None, max_length=10_000, description="Negative prompt.")

    @field_validator("guidance_scale")
    @classmethod
    def _finite(cls, scale: float) -> float:
        if not math.isfinite(scale):
            raise ValueError("guidanceScale has to be a finite number")
        return scale


class Degrade(Typed):
    """How a request may be reduced to meet its deadline."""

    min_steps: int = Field(ge=1, le=1000, description="Fewest denoising steps.")


class Editing(Typed):
    """How masked edits are served."""

    cache: Literal["Auto", "None"] = Field(
        default="Auto", description="Auto: activations of templates are cached so that edits recompute only the mask."
    )


class Slo(Typed):
    """The deadline of a request and how many requests have to meet it."""

    latency_scale: float | None = Field(
        default=None, gt=1, le=1000, description="Deadline as a multiple of the latency of a request alone."
    )
    latency_seconds: float | None = Field(default=None, gt=0, le=86_400, description="Deadline in seconds.")
    attainment: float = Field(default=0.9, gt=0, le=1, description="Share of requests that have to meet the deadline.")
    priority: int | None = Field(
        default=None, ge=0, le=100, description="Priority of the workflow's requests; higher ones run first."
    )
    degrade: Degrade | None = Field(
        default=None, description="What a request may lose to meet its deadline; absent: it is refused instead."
    )

    @model_validator(mode="after")
    def _one(self) -> Slo:
        if (self.latency_scale is None) == (self.latency_seconds is None):
            raise ValueError("slo needs exactly one of latencyScale and latencySeconds")
        return self


class WorkflowSpec(Typed):
    """The models of a generation task and its defaults."""

    task: Literal["TextToImage", "ImageToImage", "Inpainting"] = field(
        default="TextToImage",
        description="The kind of generation.",
        limits=Limits(only=["TextToImage"]),
    )
    models: list[Model] = Field(min_length=1, max_length=32, description="The models, each with a unique name.")
    defaults: Defaults = Field(
        default_factory=Defaults, description="The values of a request's fields that the request leaves out."
    )
    slo: Slo | None = field(
        description="The deadline of a request and how many requests have to meet it.",
        limits=Limits(without_effect=[ANY]),
    )
    editing: Editing | None = field(description="How masked edits are served.", limits=Limits(without_effect=[ANY]))

    @model_validator(mode="before")
    @classmethod
    def _no_stages(cls, data: Any) -> Any:
        if isinstance(data, dict) and "stages" in data:
            raise ValueError("stages is reserved; the stage graph follows from task, family and roles: remove it")
        return data

    @model_validator(mode="after")
    def _fits_together(self) -> WorkflowSpec:
        names = [model.name for model in self.models]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"two models are named {doubled[0]!r}; every name has to be unique in its workflow")
        for role in SINGLE:
            count = sum(model.role is role for model in self.models)
            if count != 1:
                what = "no model has" if count == 0 else "several models have"
                raise ValueError(f"{what} the role {role}; a workflow needs exactly one")
        denoisers = [model.name for model in self.models if model.role is Role.DENOISER]
        for model in self.models:
            if model.attach_to is not None and model.attach_to not in denoisers:
                raise ValueError(
                    f"model {model.name!r} has attachTo {model.attach_to!r}, which names no denoiser of this workflow; "
                    f"its denoiser is {denoisers[0]!r}"
                )
        stores = [model.name for model in self.models if model.role is Role.LORA_STORE]
        if len(stores) > 1:
            raise ValueError(f"{stores[0]!r} and {stores[1]!r} are both LoRA stores; a denoiser takes one")
        referred = any(model.role is Role.DENOISER and model.model_ref is not None for model in self.models)
        if referred and any(model.is_colocated for model in self.models):
            raise ValueError(
                f"the denoiser {denoisers[0]!r} is a modelRef, whose pods this workflow does not own; give it a source, or "
                "remove placement Colocated from the other models"
            )
        return self


class Metadata(Typed):
    """The resource's name, namespace, labels and annotations."""

    name: Name = Field(description="Name of the workflow.")
    namespace: Name = Field(default="default", description="Namespace of the workflow.")
    labels: dict[str, str] = Field(
        default_factory=dict, description="Kubernetes labels of the workflow; for those of pods see pod.labels."
    )
    annotations: dict[str, str] = Field(
        default_factory=dict,
        description="Kubernetes annotations of the workflow; for those of pods see pod.annotations.",
    )


class DiffusionWorkflow(Typed):
    """The models of a text-to-image workflow, and what its requests get by default."""

    api_version: Literal["latentflow.io/v1alpha1"] = Field(description="latentflow.io/v1alpha1.")
    kind: Literal["DiffusionWorkflow"] = Field(description="DiffusionWorkflow.")
    metadata: Metadata = Field(description="Name and namespace.")
    spec: WorkflowSpec = Field(description="The workflow.")

    @classmethod
    def of_object(cls, body: dict[str, Any]) -> DiffusionWorkflow:
        """From an API server's object, whose metadata has more fields. pydantic's ValidationError for another schema."""
        metadata = Metadata(name=body["metadata"]["name"], namespace=body["metadata"]["namespace"])
        return cls(api_version=API_VERSION, kind="DiffusionWorkflow", metadata=metadata, spec=body["spec"])

    @property
    def name(self) -> str:
        return self.metadata.name

    @property
    def namespace(self) -> str:
        return self.metadata.namespace

    @property
    def full_name(self) -> str:
        """ "namespace/name", as requests name it."""
        return f"{self.namespace}/{self.name}"

    def of_role(self, role: Role) -> list[Model]:
        """The models of a role, in the file's order."""
        return [model for model in self.spec.models if model.role is role]
