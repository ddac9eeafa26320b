"""The typed DiffusionWorkflow and DiffusionModel: what a user writes, checked without a cluster.

`latentflow.api.loading` makes them from YAML with positions in its errors; the embedded runtime, the gateway and the
operator read them. Field names are camelCase in files and snake_case in Python.
"""

from __future__ import annotations

import math
import re
from enum import StrEnum
from typing import Annotated, Any, Literal
from urllib.parse import urlparse

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.alias_generators import to_camel

API_VERSION = "latentflow.io/v1alpha1"
# On everything that serves a model in a cluster.
MODEL_LABEL, ROLE_LABEL = "latentflow.io/model", "latentflow.io/role"
SCHEMES = ("", "file", "pvc", "hf", "s3", "oci")
_DNS_LABEL = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"

Name = Annotated[str, Field(pattern=_DNS_LABEL, max_length=63)]
Size = Annotated[int, Field(ge=8, le=8192, multiple_of=8)]


class Role(StrEnum):
    """What a model is for in a workflow."""

    TEXT_ENCODER = "TextEncoder"
    DENOISER = "Denoiser"
    CONTROL_NET = "ControlNet"
    LORA_STORE = "LoRAStore"
    VAE = "VAE"


ATTACHED = frozenset({Role.CONTROL_NET, Role.LORA_STORE})
SINGLE = (Role.TEXT_ENCODER, Role.DENOISER, Role.VAE)


class Typed(BaseModel):
    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True, use_enum_values=False
    )


class Source(Typed):
    """Where a model's weights are."""

    uri: str = Field(
        min_length=1,
        max_length=1024,
        description="A folder under the model root, or file:///abs/path, hf://org/repo, pvc://claim/path, s3://bucket/path, "
        "oci://registry/image. Names a diffusers pipeline folder, out of which the role takes its parts.",
    )
    subfolder: str | None = Field(
        default=None, max_length=512, description="One component of the pipeline folder, such as controlnet-edges."
    )
    revision: str | None = Field(default=None, max_length=256, description="Branch, tag or commit of an hf:// source.")

    @field_validator("uri")
    @classmethod
    def _known_scheme(cls, uri: str) -> str:
        try:
            parsed = urlparse(uri)
        except ValueError as error:
            raise ValueError(f"{uri!r} is no URI: {error}") from None
        if parsed.scheme not in SCHEMES:
            known = ", ".join(f"{scheme}://" for scheme in SCHEMES if scheme)
            raise ValueError(f"the scheme {parsed.scheme!r} is unknown; use a folder under the model root or {known}")
        if parsed.scheme == "" and (uri.startswith("/") or ".." in uri.split("/")):
            raise ValueError("a relative URI stays under the model root; write file:///… for a folder elsewhere")
        if parsed.scheme == "file" and (parsed.netloc or not parsed.path.startswith("/")):
            raise ValueError("a file URI names an absolute path: file:///abs/path, with three slashes")
        if parsed.scheme == "hf" and not re.fullmatch(r"hf://[\w.-]+/[\w.-]+", uri):
            raise ValueError("a hub URI names organisation and repository: hf://org/repo")
        if parsed.scheme in ("pvc", "s3", "oci") and not parsed.netloc:
            raise ValueError(f"{uri!r} lacks what comes after {parsed.scheme}://")
        return uri

    @field_validator("subfolder")
    @classmethod
    def _inside(cls, subfolder: str | None) -> str | None:
        if subfolder is not None and (subfolder.startswith("/") or ".." in subfolder.split("/") or not subfolder):
            raise ValueError("a subfolder is a relative path inside the source, without '..'")
        return subfolder

    @model_validator(mode="after")
    def _revision_needs_a_hub(self) -> Source:
        if self.revision is not None and urlparse(self.uri).scheme != "hf":
            raise ValueError("revision goes with hf:// sources only")
        return self


class Engine(Typed):
    """How a model's server runs it."""

    device: Literal["cpu", "cuda"] = Field(default="cpu", description="Where the model runs.")
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="CPU threads of a forward pass; absent: the cores of the container."
    )
    max_running: int = Field(default=4, ge=1, le=64, description="Requests that may share a forward pass.")
    max_waiting: int = Field(default=64, ge=0, le=4096, description="Requests that may wait in the server.")


class Scaling(Typed):
    """How many replicas a model may have."""

    min_replicas: int = Field(default=1, ge=0, le=1000, description="Fewest replicas; 0 lets the model scale to zero.")
    max_replicas: int = Field(default=1, ge=1, le=1000, description="Most replicas.")
    mode: Literal["Managed", "External"] = Field(
        default="Managed", description="Managed: the scheduler scales it. External: HPA, KEDA or a person does."
    )

    @model_validator(mode="after")
    def _bounds(self) -> Scaling:
        if self.min_replicas > self.max_replicas:
            raise ValueError("minReplicas is above maxReplicas; swap or raise one")
        return self


class Parallelism(Typed):
    """How one request may be spread over devices."""

    latent: Literal["Auto"] | Annotated[int, Field(ge=1, le=2)] = Field(
        default=1, description="Replicas that share one request's steps (2: the guidance halves); Auto: as load allows."
    )
    tensor: int = Field(default=1, ge=1, le=16, description="Devices that share one replica's weights.")


class Pod(Typed):
    """What is passed through to a model's pods as it stands; each as in a Kubernetes PodSpec."""

    node_selector: dict[str, str] | None = Field(default=None, description="As PodSpec.nodeSelector.")
    tolerations: list[dict[str, Any]] | None = Field(default=None, description="As PodSpec.tolerations.")
    affinity: dict[str, Any] | None = Field(default=None, description="As PodSpec.affinity.")
    topology_spread_constraints: list[dict[str, Any]] | None = Field(
        default=None, description="As PodSpec.topologySpreadConstraints."
    )
    priority_class_name: str | None = Field(default=None, description="As PodSpec.priorityClassName.")
    runtime_class_name: str | None = Field(default=None, description="As PodSpec.runtimeClassName.")
    image_pull_secrets: list[dict[str, Any]] | None = Field(default=None, description="As PodSpec.imagePullSecrets.")
    env: list[dict[str, Any]] | None = Field(default=None, description="As Container.env.")
    volumes: list[dict[str, Any]] | None = Field(default=None, description="As PodSpec.volumes.")
    volume_mounts: list[dict[str, Any]] | None = Field(default=None, description="As Container.volumeMounts.")
    resource_claims: list[dict[str, Any]] | None = Field(default=None, description="As PodSpec.resourceClaims.")


class Model(Typed):
    """A model of a workflow."""

    name: Name = Field(description="Name within the workflow; requests name ControlNets by it.")
    role: Role = Field(description="What the model is for.")
    source: Source | None = Field(default=None, description="Where its weights are; or modelRef.")
    model_ref: Name | None = Field(default=None, description="Name of an existing DiffusionModel, instead of a source.")
    attach_to: Name | None = Field(
        default=None, description="The denoiser that a ControlNet or LoRA store works for; those two roles need it."
    )
    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        default="float32", description="Element type of the weights."
    )
    engine: Engine = Field(default_factory=Engine, description="How the model's server runs it.")
    scaling: Scaling = Field(default_factory=Scaling, description="How many replicas it may have.")
    parallelism: Parallelism = Field(default_factory=Parallelism, description="How one request may be spread.")
    resources: dict[str, Any] = Field(default_factory=dict, description="As Container.resources: requests and limits.")
    placement: Literal["Spread", "Together"] = Field(
        default="Spread",
        description="Together: a container in the denoiser's pods, with a memory volume between them; it scales with the "
        "denoiser. In the embedded runtime it changes nothing.",
    )
    pod: Pod = Field(
        default_factory=Pod, description="Passed through to the model's pods, to each of their containers."
    )

    @property
    def is_together(self) -> bool:
        """Whether it runs in its denoiser's pods."""
        return self.placement == "Together"

    @model_validator(mode="after")
    def _fits_its_placement(self) -> Model:
        if not self.is_together:
            return self
        if self.role is Role.DENOISER:
            raise ValueError(
                f"model {self.name!r} is the denoiser, in whose pods the others may run; leave its placement out"
            )
        if self.model_ref is not None:
            raise ValueError(f"model {self.name!r} is a modelRef, which has pods of its own; Together needs a source")
        if self.scaling != Scaling():
            raise ValueError(
                f"model {self.name!r} is Together with the denoiser and scales with it; put scaling at the denoiser"
            )
        if self.pod != Pod():
            raise ValueError(f"model {self.name!r} is Together with the denoiser in its pods; put pod at the denoiser")
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
    """What a request gets that does not say otherwise."""

    steps: int = Field(default=20, ge=1, le=1000, description="Denoising steps.")
    guidance_scale: float = Field(default=5.0, ge=0, le=100, description="Classifier-free guidance; 1 or less: none.")
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


class Slo(Typed):
    """When a request counts as served in time."""

    latency_scale: float | None = Field(
        default=None, gt=1, le=1000, description="Deadline as a multiple of the latency of a request alone."
    )
    latency_seconds: float | None = Field(default=None, gt=0, le=86_400, description="Deadline in seconds.")
    attainment: float = Field(default=0.9, gt=0, le=1, description="Share of requests that have to meet it.")

    @model_validator(mode="after")
    def _one(self) -> Slo:
        if (self.latency_scale is None) == (self.latency_seconds is None):
            raise ValueError("slo needs exactly one of latencyScale and latencySeconds")
        return self


class WorkflowSpec(Typed):
    """The models of a generation task and its defaults."""

    task: Literal["TextToImage", "ImageToImage", "Inpainting"] = Field(
        default="TextToImage", description="What the workflow makes of its inputs."
    )
    models: list[Model] = Field(min_length=1, max_length=32, description="The models, each with a name of its own.")
    defaults: Defaults = Field(default_factory=Defaults, description="What a request gets that does not say otherwise.")
    slo: Slo | None = Field(default=None, description="When a request counts as served in time.")

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
        if referred and any(model.is_together for model in self.models):
            raise ValueError(
                f"the denoiser {denoisers[0]!r} is a modelRef, whose pods are not this workflow's; give it a source, or no "
                "model the placement Together"
            )
        return self


class Metadata(Typed):
    """The resource's name and namespace; labels and annotations pass through."""

    name: Name = Field(description="Name of the workflow.")
    namespace: Name = Field(default="default", description="Namespace of the workflow.")
    labels: dict[str, str] = Field(default_factory=dict, description="Kubernetes labels.")
    annotations: dict[str, str] = Field(default_factory=dict, description="Kubernetes annotations.")


class DiffusionWorkflow(Typed):
    """The models of a text-to-image workflow, and what its requests get by default."""

    api_version: Literal["latentflow.io/v1alpha1"] = Field(description="latentflow.io/v1alpha1.")
    kind: Literal["DiffusionWorkflow"] = Field(description="DiffusionWorkflow.")
    metadata: Metadata = Field(description="Name and namespace.")
    spec: WorkflowSpec = Field(description="The workflow.")

    @classmethod
    def of_object(cls, body: dict[str, Any]) -> DiffusionWorkflow:
        """As an API server has it, whose metadata says more than ours. pydantic's ValidationError for another schema."""
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


class Inside(Typed):
    """Where a model runs that has no pods of its own."""

    model: Name = Field(description="The DiffusionModel, a denoiser, in whose pods it runs.")
    place: int = Field(ge=1, le=31, description="Its place among the denoiser's companions, which gives its ports.")


class Companion(Typed):
    """A model that runs in another's pods: what its container needs."""

    model: Name = Field(description="Its own DiffusionModel.")
    role: Role = Field(description="What the model is for.")
    source: Source = Field(description="Where its weights are.")
    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        default="float32", description="Element type of the weights."
    )
    engine: Engine = Field(default_factory=Engine, description="How the model's server runs it.")
    resources: dict[str, Any] = Field(default_factory=dict, description="As Container.resources.")


class ModelSpec(Typed):
    """A model by itself, as workflows that name the same one share it."""

    replicas: int | None = Field(
        default=None,
        ge=0,
        le=1000,
        description="Replicas there should be; written through the scale subresource. Of no effect where it is inside "
        "another's pods.",
    )
    inside: Inside | None = Field(
        default=None, description="Where it runs, when that is in another's pods; absent: in pods of its own."
    )
    companions: list[Companion] | None = Field(
        default=None, min_length=1, max_length=31, description="The models that run in its pods, by their places."
    )
    near: Name | None = Field(
        default=None, description="The DiffusionModel whose pods its pods would share a node with, where one has room."
    )
    role: Role = Field(description="What the model is for.")
    source: Source = Field(description="Where its weights are.")
    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        default="float32", description="Element type of the weights."
    )
    engine: Engine = Field(default_factory=Engine, description="How the model's server runs it.")
    scaling: Scaling = Field(default_factory=Scaling, description="How many replicas it may have.")
    parallelism: Parallelism = Field(default_factory=Parallelism, description="How one request may be spread.")
    resources: dict[str, Any] = Field(default_factory=dict, description="As Container.resources.")
    pod: Pod = Field(default_factory=Pod, description="Passed through to the model's pods.")


class DiffusionModel(Typed):
    """One distinct model: served by its own servers, shared by the workflows that name it."""

    api_version: Literal["latentflow.io/v1alpha1"] = Field(description="latentflow.io/v1alpha1.")
    kind: Literal["DiffusionModel"] = Field(description="DiffusionModel.")
    metadata: Metadata = Field(description="Name and namespace.")
    spec: ModelSpec = Field(description="The model.")
