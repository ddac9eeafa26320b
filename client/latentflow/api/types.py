"""The types that a DiffusionWorkflow and a DiffusionModel share, checked without a cluster.

The two resources are in `latentflow.api.workflow` and `latentflow.api.model`. `latentflow.api.loading` parses workflows
from YAML with positions in its errors; the embedded runtime, the gateway and the operator read them. Field names are
camelCase in files and snake_case in Python.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, Self, cast
from urllib.parse import urlparse

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer, field_validator, model_validator
from pydantic.alias_generators import to_camel

API_VERSION = "latentflow.io/v1alpha1"
# On everything that serves a model in a cluster.
MODEL_LABEL, ROLE_LABEL = "latentflow.io/model", "latentflow.io/role"
SCHEMES = ("", "file", "pvc", "hf", "s3", "oci")
_DNS_LABEL = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
_DEVICE = r"^(cpu|cuda(:[0-9]{1,2})?)$"
# What a text has to be that does not match a pattern.
PATTERNS = {
    _DNS_LABEL: "a name of lower-case letters, digits and '-', at most 63 characters",
    _DEVICE: "a device; devices are cpu, cuda and cuda:N",
}

Name = Annotated[str, Field(pattern=_DNS_LABEL, max_length=63)]
Device = Annotated[str, Field(pattern=_DEVICE)]
Size = Annotated[int, Field(ge=8, le=8192, multiple_of=8)]


class Role(StrEnum):
    """What a model is for in a workflow."""

    TEXT_ENCODER = "TextEncoder"
    DENOISER = "Denoiser"
    CONTROL_NET = "ControlNet"
    LORA_STORE = "LoRAStore"
    VAE = "VAE"


class Typed(BaseModel):
    """A frozen type whose fields are camelCase in files. `renamed` maps names of earlier versions to the present ones."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True, use_enum_values=False
    )
    renamed: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _no_former_names(cls, data: Any) -> Any:
        for former, present in cls.renamed.items():
            if isinstance(data, dict) and former in data:
                raise ValueError(f"the field {former} was renamed; write {present}")
        return data


def problems(error: ValidationError) -> str:
    """What is wrong with a value, in one line that names the fields as in files."""
    return "; ".join(
        f"{'.'.join(to_camel(str(part)) for part in one['loc']) or 'value'}: {one['msg']}"
        for one in error.errors(include_url=False)
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


_COMPUTING = (Role.TEXT_ENCODER, Role.DENOISER, Role.CONTROL_NET, Role.VAE)


def _option(*roles: Role, default: Any, description: str, **constraints: Any) -> Any:
    """An engine option: the roles whose servers use it, its default and its bounds, as of pydantic's Field."""
    return Field(
        default=default,
        description=f"{description} Used by {', '.join(roles)}.",
        json_schema_extra={"roles": list(roles)},
        **constraints,
    )


class Engine(Typed):
    """How a model's server runs it: the options of `latentflow-node --engine`.

    This is the only list of them. CRD, server arguments of operator and embedded runtime, and reference follow from it.
    """

    device: Device = _option(*_COMPUTING, default="cpu", description="Device of the model: cpu, cuda or cuda:N.")
    threads: int | None = _option(
        *_COMPUTING, default=None, ge=1, le=1024, description="CPU threads of a forward pass; absent: all usable cores."
    )
    max_running: int = _option(
        Role.DENOISER, default=4, ge=1, le=64, description="Maximum number of requests in one forward pass."
    )
    max_waiting: int = _option(
        *_COMPUTING,
        default=64,
        ge=0,
        le=4096,
        description="Maximum number of queued requests; further ones are refused.",
    )

    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults, as in files."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True)

    def distinguishing(self, role: Role) -> dict[str, Any]:
        """The options that make a model of a role another one, by Python names: used by it, and not at a neutral value."""
        found = {name: getattr(self, name) for name in Engine.model_fields if role in option_roles(name)}
        return {name: value for name, value in found.items() if value != Engine.model_fields[name].default}

    def override(self, role: Role, changes: Mapping[str, Any]) -> Engine:
        """With changes, by Python names, of the options that a role uses. ValueError for a value out of bounds."""
        used = {name: value for name, value in changes.items() if role in option_roles(name)}
        return Engine.model_validate(self.model_dump(exclude_defaults=True) | used)

    def check(self, role: Role) -> None:
        """Raises ValueError if an option differs from its default that servers of the role do not use."""
        for name, field in Engine.model_fields.items():
            roles = option_roles(name)
            if role not in roles and getattr(self, name) != field.default:
                raise ValueError(f"engine.{field.alias} is an option of {', '.join(roles)}, not of {role}; remove it")


def option_roles(option: str) -> tuple[Role, ...]:
    """The roles whose servers use an engine option, by its Python name."""
    extra = Engine.model_fields[option].json_schema_extra
    if not isinstance(extra, dict):
        raise TypeError(f"{option} is not declared as an option")
    return tuple(Role(str(role)) for role in cast("list[str]", extra["roles"]))


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


class ServedModel(Typed):
    """What a model server needs to know of its model, whatever names the model."""

    role: Role = Field(description="What the model is for.")
    source: Source | None = Field(default=None, description="Where its weights are.")
    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        default="float32", description="Element type of the weights."
    )
    engine: Engine = Field(default_factory=Engine, description="How the model's server runs it.")
    resources: dict[str, Any] = Field(default_factory=dict, description="As Container.resources: requests and limits.")

    @model_validator(mode="after")
    def _options_of_its_role(self) -> Self:
        self.engine.check(self.role)
        return self

    @field_serializer("engine")
    def _only_options_that_are_set(self, engine: Engine) -> dict[str, Any]:
        # So a later change of a default reaches objects that were written before, and a new option changes none.
        return engine.options()

    def served(self) -> dict[str, Any]:
        """The fields that every ServedModel has, by their Python names."""
        return {name: getattr(self, name) for name in ServedModel.model_fields}


class ScaledModel(ServedModel):
    """A model that may have pods of its own."""

    scaling: Scaling = Field(default_factory=Scaling, description="How many replicas it may have.")
    parallelism: Parallelism = Field(default_factory=Parallelism, description="How one request may be spread.")
    pod: Pod = Field(
        default_factory=Pod, description="Passed through to the model's pods, to each of their containers."
    )
