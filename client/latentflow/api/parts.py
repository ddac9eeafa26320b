"""The types that a DiffusionWorkflow and a DiffusionModel share, checked without a cluster.

The two resources are in `latentflow.api.workflow` and `latentflow.api.model`; `latentflow.api.types` has all of them. Field
names are camelCase in files and snake_case in Python.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlparse

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import ErrorDetails

from latentflow.api.fields import Limits, field, limits_of, unserved
from latentflow.internal import source_uri

API_VERSION = "latentflow.io/v1alpha1"
# On everything that serves a model in a cluster.
MODEL_LABEL, ROLE_LABEL = "latentflow.io/model", "latentflow.io/role"
SCHEMES = ("", "file", "pvc", "hf", "s3", "oci")
_DNS_LABEL = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
_DEVICE = r"^(cpu|cuda(:[0-9]{1,2})?)$"
# A repository, or a single file in it.
_HUB = r"hf://[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+(/([^/?#.][^/?#]*/)*[^/?#.][^/?#]*\.safetensors)?"
_WORD = r"^[A-Za-z0-9_-]{1,64}$"
# In words, for errors.
PATTERNS = {
    _DNS_LABEL: "a name of lower-case letters, digits and '-', at most 63 characters",
    _DEVICE: "a device; devices are cpu, cuda and cuda:N",
    _WORD: "a word of letters, digits, '_' and '-', at most 64 characters",
}

Name = Annotated[str, Field(pattern=_DNS_LABEL, max_length=63)]
Word = Annotated[str, Field(pattern=_WORD)]
Device = Annotated[str, Field(pattern=_DEVICE)]
Size = Annotated[int, Field(ge=8, le=8192, multiple_of=8)]


class Role(StrEnum):
    """The function of a model in a workflow."""

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

    @model_validator(mode="after")
    def _served_by_this_version(self) -> Self:
        if refusals := list(unserved(self)):
            raise ValueError("; ".join(refusals))
        return self


def problems(error: ValidationError) -> str:
    """The problems of a value, in one line that names the fields as in files."""
    return "; ".join(
        f"{'.'.join(to_camel(str(part)) for part in one['loc']) or 'value'}: {explained(one) or one['msg']}"
        for one in error.errors(include_url=False)
    )


def explained(detail: ErrorDetails) -> str | None:
    """In words, that a value does not match the pattern of its field; None for another problem."""
    if detail["type"] != "string_pattern_mismatch":
        return None
    return f"{detail['input']!r} is not {PATTERNS[detail['ctx']['pattern']]}"


class Source(Typed):
    """The location of a model's weights."""

    uri: str = Field(
        min_length=1,
        max_length=1024,
        description="A folder under the model root, or file:///abs/path, hf://org/repo, pvc://claim/path, s3://bucket/path, "
        "oci://registry/image. Names a diffusers pipeline folder, out of which the role takes its parts, one component's "
        "folder, or a single file that ends with .safetensors.",
    )
    subfolder: str | None = Field(
        default=None, max_length=512, description="One component of the pipeline folder, such as controlnet-edges."
    )
    revision: str | None = Field(default=None, max_length=256, description="Branch, tag or commit of an hf:// source.")
    variant: Word | None = Field(
        default=None,
        description="Variant of the weight files, such as fp16 for files named model.fp16.safetensors; absent: the files "
        "without a variant in their names.",
    )
    parts: list[Word] | None = field(
        min_length=1,
        max_length=16,
        description="The parts of the pipeline folder that the model takes, such as text_encoder_3; absent: all of its role.",
        limits=Limits(only=[None]),
    )

    @field_validator("uri")
    @classmethod
    def _known_scheme(cls, uri: str) -> str:
        try:
            parsed = urlparse(uri)
        except ValueError as error:
            raise ValueError(f"{uri!r} is not a URI: {error}") from None
        if hub := source_uri.hub_of_page(uri):
            raise ValueError(f"{uri} is the address of a web page; for the repository of a hub, write {hub}")
        if parsed.scheme not in SCHEMES:
            known = ", ".join(f"{scheme}://" for scheme in SCHEMES if scheme)
            raise ValueError(f"the scheme {parsed.scheme!r} is unknown; use a folder under the model root or {known}")
        if parsed.scheme == "" and (uri.startswith("/") or ".." in uri.split("/")):
            raise ValueError("a relative URI stays under the model root; write file:///… for a folder elsewhere")
        if parsed.scheme == "file":
            source_uri.file_path(uri)
        if parsed.scheme == "pvc":
            # The claim is mounted, and the servers read file:///MOUNT/path.
            path = source_uri.file_path(f"file://{uri.removeprefix('pvc:/')}")
            if ".." in path.parts:
                raise ValueError("a pvc URI names a path inside the claim, without '..'")
        if parsed.scheme == "hf" and not re.fullmatch(_HUB, uri):
            raise ValueError(
                "a hub URI names organisation and repository, hf://org/repo, or a file of it that ends with .safetensors"
            )
        if parsed.scheme in ("pvc", "s3", "oci") and not parsed.netloc:
            raise ValueError(f"{uri!r} names nothing after {parsed.scheme}://")
        return uri

    @field_validator("subfolder")
    @classmethod
    def _inside(cls, subfolder: str | None) -> str | None:
        if subfolder is not None and (subfolder.startswith("/") or ".." in subfolder.split("/") or not subfolder):
            raise ValueError("a subfolder is a relative path inside the source, without '..'")
        return subfolder

    @model_validator(mode="after")
    def _a_file_is_whole(self) -> Source:
        if source_uri.is_single_file(self.uri) and (self.subfolder is not None or self.variant is not None):
            raise ValueError("a single file has neither a subfolder nor a variant; remove them")
        return self

    @model_validator(mode="after")
    def _revision_needs_a_hub(self) -> Source:
        if self.revision is not None and urlparse(self.uri).scheme != "hf":
            raise ValueError("only hf:// sources have a revision; remove it")
        return self


_COMPUTING = (Role.TEXT_ENCODER, Role.DENOISER, Role.CONTROL_NET, Role.VAE)


class Engine(Typed):
    """How a model's server runs it: the options of `latentflow-node --engine`.

    This is the only list of them. CRD, server arguments of operator and embedded runtime, and reference follow from it.
    """

    device: Device = field(
        default="cpu", description="Device of the model: cpu, cuda or cuda:N.", limits=Limits(roles=_COMPUTING)
    )
    threads: int | None = field(
        ge=1,
        le=1024,
        description="CPU threads of a forward pass; absent: all usable cores.",
        limits=Limits(roles=_COMPUTING),
    )
    max_running: int = field(
        default=4,
        ge=1,
        le=64,
        description="Maximum number of requests in one forward pass.",
        limits=Limits(roles=_COMPUTING),
    )
    max_waiting: int = field(
        default=64,
        ge=0,
        le=4096,
        description="Maximum number of queued requests; further ones are refused.",
        limits=Limits(roles=_COMPUTING),
    )
    compile: bool = field(
        default=False,
        description="Whether the network is compiled at start-up.",
        limits=Limits(roles=[Role.DENOISER], only=[False]),
    )
    step_cache: Literal["None", "Auto"] = field(
        default="None",
        description="Auto: steps that would change little reuse activations of the step before; results are approximate.",
        limits=Limits(roles=[Role.DENOISER], only=["None"]),
    )
    async_steps: int = field(
        default=0,
        ge=0,
        le=1000,
        description="Steps that a request may take before its LoRAs are loaded; 0: LoRAs apply from the first step.",
        limits=Limits(roles=[Role.LORA_STORE]),
    )

    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults, as in files."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True)

    def distinguishing(self, role: Role) -> dict[str, Any]:
        """The options that are part of a model's identity, by Python names: used by its role, and not at their defaults.

        The default of an option that changes results, such as `compile`, must therefore never change.
        """
        changed = self.model_dump(exclude_defaults=True)
        return {name: value for name, value in changed.items() if role in limits_of(Engine.model_fields[name]).roles}

    def override(self, role: Role, changes: Mapping[str, Any]) -> Engine:
        """A copy with those of the changes, by Python names, that a role uses. Raises ValidationError for a bad value."""
        used = {name: value for name, value in changes.items() if role in limits_of(Engine.model_fields[name]).roles}
        return Engine.model_validate(self.model_dump(exclude_defaults=True) | used)

    def check(self, role: Role) -> None:
        """Raises ValueError if an option that servers of the role do not use differs from its default."""
        for name, info in Engine.model_fields.items():
            roles = limits_of(info).roles
            if role not in roles and getattr(self, name) != info.default:
                raise ValueError(f"engine.{info.alias} is an option of {', '.join(roles)}, not of {role}; remove it")


class Scaling(Typed):
    """How many replicas a model may have."""

    min_replicas: int = Field(
        default=1, ge=0, le=1000, description="Minimum number of replicas; 0: the model may scale to zero."
    )
    max_replicas: int = Field(default=1, ge=1, le=1000, description="Maximum number of replicas.")
    mode: Literal["Managed", "External"] = Field(
        default="Managed", description="Managed: the scheduler scales the model. External: HPA, KEDA or a person does."
    )

    @model_validator(mode="after")
    def _bounds(self) -> Scaling:
        if self.min_replicas > self.max_replicas:
            raise ValueError("minReplicas is above maxReplicas; swap or raise one")
        return self


Latent = Literal["Auto"] | Annotated[int, Field(ge=1, le=2)]


class Parallelism(Typed):
    """Over how many devices a request or a replica may be spread. Auto: the scheduler chooses."""

    latent: Latent = Field(
        default=1,
        description="Replicas that share one request's steps, of a Denoiser: 1, 2 for the two halves of guidance, or Auto for "
        "2 where another replica is idle, and only until that one gets a request of its own. A request that finds no other "
        "ready replica runs on one.",
    )
    tensor: Literal["Auto"] | Annotated[int, Field(ge=1, le=16)] = field(
        default=1,
        description="Devices among which the weights of one replica of a Denoiser are divided: 1 to 16 or Auto. On the CPU, "
        "processes that share the threads of the engine.",
        limits=Limits(without_effect=["Auto"]),
    )
    context: Literal["Auto"] | Annotated[int, Field(ge=1, le=8)] = field(
        default=1,
        description="Devices, each with whole weights, among which one request's tokens are divided: 1 to 8 or Auto.",
        limits=Limits(only=["Auto", 1], without_effect=["Auto"]),
    )

    @property
    def tensor_degree(self) -> int:
        """The number of devices among which weights are divided. Auto: they are not."""
        return 1 if self.tensor == "Auto" else self.tensor


class Net(Typed):
    """A further net of a ControlNet."""

    name: Name = Field(description="Name by which requests select the net; unique among the nets of its model.")
    source: Source = Field(description="Location of the weights.")


OPERATOR_LABELS = ("app.kubernetes.io/name", "app.kubernetes.io/component", "app.kubernetes.io/managed-by")


class Pod(Typed):
    """Passed through unchanged to a model's pods. Each field is as in a Kubernetes PodSpec unless it is described otherwise."""

    labels: dict[str, str] | None = Field(
        default=None,
        max_length=64,
        description="Labels of the pods, beside the operator's own. Keys that begin with latentflow.io/ are refused, and "
        f"{', '.join(OPERATOR_LABELS)}.",
    )
    annotations: dict[str, str] | None = Field(
        default=None, max_length=64, description="Annotations of the pods; they override the operator's own."
    )
    service_account_name: str | None = Field(default=None, description="As PodSpec.serviceAccountName.")
    scheduling_gates: list[dict[str, Any]] | None = Field(default=None, description="As PodSpec.schedulingGates.")
    scheduler_name: str | None = Field(default=None, description="As PodSpec.schedulerName.")
    node_selector: dict[str, str] | None = Field(default=None, description="As PodSpec.nodeSelector.")
    tolerations: list[dict[str, Any]] | None = Field(default=None, description="As PodSpec.tolerations.")
    affinity: dict[str, Any] | None = Field(default=None, description="As PodSpec.affinity.")
    topology_spread_constraints: list[dict[str, Any]] | None = Field(
        default=None, description="As PodSpec.topologySpreadConstraints."
    )
    priority_class_name: str | None = Field(default=None, description="As PodSpec.priorityClassName.")
    preemption_policy: str | None = Field(default=None, description="As PodSpec.preemptionPolicy.")
    runtime_class_name: str | None = Field(default=None, description="As PodSpec.runtimeClassName.")
    image_pull_secrets: list[dict[str, Any]] | None = Field(default=None, description="As PodSpec.imagePullSecrets.")
    init_containers: list[dict[str, Any]] | None = Field(default=None, description="As PodSpec.initContainers.")
    env: list[dict[str, Any]] | None = Field(default=None, description="As Container.env.")
    volumes: list[dict[str, Any]] | None = Field(default=None, description="As PodSpec.volumes.")
    volume_mounts: list[dict[str, Any]] | None = Field(default=None, description="As Container.volumeMounts.")
    resource_claims: list[dict[str, Any]] | None = Field(default=None, description="As PodSpec.resourceClaims.")
    readiness_gates: list[dict[str, Any]] | None = Field(default=None, description="As PodSpec.readinessGates.")
    dns_policy: str | None = Field(default=None, description="As PodSpec.dnsPolicy.")
    dns_config: dict[str, Any] | None = Field(default=None, description="As PodSpec.dnsConfig.")
    host_aliases: list[dict[str, Any]] | None = Field(default=None, description="As PodSpec.hostAliases.")
    host_network: bool | None = Field(default=None, description="As PodSpec.hostNetwork.")
    host_users: bool | None = Field(default=None, description="As PodSpec.hostUsers.")

    @field_validator("labels")
    @classmethod
    def _labels_of_others(cls, labels: dict[str, str] | None) -> dict[str, str] | None:
        if any(key.startswith("latentflow.io/") or key in OPERATOR_LABELS for key in labels or ()):
            raise ValueError(
                f"labels that the operator sets cannot be passed through: latentflow.io/… and {', '.join(OPERATOR_LABELS)}"
            )
        return labels
