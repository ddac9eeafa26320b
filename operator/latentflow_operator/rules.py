"""The CEL rules with which the API server validates the resources beyond their schema, by the type of `latentflow.api`.

Each rule corresponds to a pydantic validator of the type and has the same message where CEL can compute it. One table
of cases (`tests/kube`) tests that both give the same results.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from latentflow.api.fields import limits_of
from latentflow.api.types import (
    OPERATOR_LABELS,
    ColocatedModel,
    Engine,
    Model,
    ModelSpec,
    Parallelism,
    Pod,
    Role,
    Source,
    Typed,
    WorkflowSpec,
)

_SCHEME = "^[a-zA-Z][a-zA-Z0-9+.-]*:"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A CEL rule. `message` is a CEL expression if `computed`, and a text otherwise."""

    cel: str
    message: str
    computed: bool = False

    def schema(self) -> dict[str, str]:
        """The rule as an entry of x-kubernetes-validations."""
        return {"rule": self.cel, "messageExpression" if self.computed else "message": self.message}


def _single(role: str) -> Rule:
    count = f"self.models.filter(m, m.role == '{role}').size()"
    return Rule(
        cel=f"{count} == 1",
        message=f"({count} == 0 ? 'no model has' : 'several models have') + "
        f"' the role {role}; a workflow needs exactly one'",
        computed=True,
    )


def _colocated(cel: str, message: str) -> Rule:
    """A rule for models that run in the denoiser's pods."""
    return Rule(
        cel=f"self.placement != 'Colocated' || {cel}", message=f'"model \'" + self.name + "{message}"', computed=True
    )


def _engine() -> Iterator[Rule]:
    """Rules for a type with role and engine: an option that the role does not use keeps its default."""
    for field in Engine.model_fields.values():
        roles = limits_of(field).roles
        if others := [role.value for role in Role if role not in roles]:
            option = f"self.engine.{field.alias}"
            default = "" if field.default is None else f" || {option} == {json.dumps(field.default)}"
            yield Rule(
                cel=f"!has(self.engine) || !has({option}){default} || !(self.role in {others})",
                message=f"'engine.{field.alias} is an option of {', '.join(roles)}, not of ' + self.role + '; remove it'",
                computed=True,
            )


def _undivided(parallelism: str) -> str:
    return f"({parallelism}.tensor == 'Auto' || {parallelism}.tensor == 1)"


# A store reads every file of its folder.
_STORE_VARIANT = Rule(
    cel="self.role != 'LoRAStore' || !has(self.source) || !has(self.source.variant)",
    message="the files of a LoRAStore have no variants; remove source.variant",
)

_NETS = Rule(
    cel="!has(self.nets) || self.role == 'ControlNet'",
    message="'only a ControlNet has nets, a ' + self.role + ' has none; remove them'",
    computed=True,
)

_DIVIDED = Rule(
    cel="self.role == 'Denoiser' || !has(self.parallelism) || !has(self.parallelism.tensor) || "
    + _undivided("self.parallelism"),
    message="'parallelism.tensor is for a Denoiser, not for a ' + self.role + '; remove it'",
    computed=True,
)


def _served(type_: type[Typed]) -> Iterator[Rule]:
    """Rules for the fields of a type of which this version serves only some values."""
    for field in type_.model_fields.values():
        limits = limits_of(field)
        if limits.only:
            equal = [f"self.{field.alias} == {json.dumps(value)}" for value in limits.only if value is not None]
            yield Rule(
                cel=" || ".join([f"!has(self.{field.alias})", *equal]), message=f"{field.alias}: {limits.refusal}"
            )


def _degree(name: str, most: int) -> Rule:
    """A degree of parallelism: an integer or Auto, which a schema cannot bound."""
    return Rule(
        cel=f"type(self.{name}) == string ? self.{name} == 'Auto' : (self.{name} >= 1 && self.{name} <= {most})",
        message=f"{name} is Auto or 1 to {most}",
    )


_NO_POD = " && ".join(f"!has(self.pod.{field.alias})" for field in Pod.model_fields.values())

_OWN: dict[str, tuple[Rule, ...]] = {
    "Source": (
        Rule(
            cel=f"!self.uri.matches('{_SCHEME}') || self.uri.matches('^(file|pvc|hf|s3|oci):')",
            message="\"the scheme '\" + self.uri.split(':')[0] + \"' is unknown; use a folder under the model root or "
            'file://, pvc://, hf://, s3://, oci://"',
            computed=True,
        ),
        Rule(
            cel=f"self.uri.matches('{_SCHEME}') || !(self.uri.startsWith('/') || self.uri.matches('(^|/)[.][.](/|$)'))",
            message="a relative URI stays under the model root; write file:///… for a folder elsewhere",
        ),
        Rule(
            cel="!self.uri.startsWith('file:') || self.uri.matches('^file:(//(localhost)?/|/[^/])')",
            message="a file URI names an absolute path: file:///abs/path, with three slashes",
        ),
        Rule(
            cel="!self.uri.matches('^(file|pvc):') || !self.uri.matches('[?#]|%00')",
            message="? and # end the path of a URI; write %3F and %23 for those of a folder's name",
        ),
        Rule(
            # The path is decoded, so escapes of its dots and slashes count too.
            cel="!self.uri.startsWith('pvc:') || !self.uri.matches('(/|%2[fF])([.]|%2[eE])([.]|%2[eE])(/|%2[fF]|$)')",
            message="a pvc URI names a path inside the claim, without '..'",
        ),
        Rule(
            cel="!self.uri.startsWith('hf:') || self.uri.matches('^hf://[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+"
            "(/([^/?#.][^/?#]*/)*[^/?#.][^/?#]*[.]safetensors)?$')",
            message="a hub URI names organisation and repository, hf://org/repo, or a file of it that ends with .safetensors",
        ),
        Rule(
            cel="!self.uri.matches('^(pvc|s3|oci):') || self.uri.matches('^(pvc|s3|oci)://[^/]')",
            message="\"'\" + self.uri + \"' names nothing after \" + self.uri.split(':')[0] + '://'",
            computed=True,
        ),
        Rule(
            cel="!has(self.subfolder) || !(self.subfolder.size() == 0 || self.subfolder.startsWith('/') || "
            "self.subfolder.matches('(^|/)[.][.](/|$)'))",
            message="a subfolder is a relative path inside the source, without '..'",
        ),
        Rule(
            cel="!self.uri.endsWith('.safetensors') || !(has(self.subfolder) || has(self.variant))",
            message="a single file has neither a subfolder nor a variant; remove them",
        ),
        Rule(
            cel="!has(self.revision) || self.uri.startsWith('hf:')",
            message="only hf:// sources have a revision; remove it",
        ),
    ),
    "Scaling": (
        Rule(
            cel="self.minReplicas <= self.maxReplicas",
            message="minReplicas is above maxReplicas; swap or raise one",
        ),
    ),
    "Parallelism": (_degree("latent", 2), _degree("tensor", 16), _degree("context", 8)),
    "Pod": (
        Rule(
            cel="!has(self.labels) || !self.labels.exists(key, key.startsWith('latentflow.io/') || "
            f"key in {list(OPERATOR_LABELS)})",
            message="labels that the operator sets cannot be passed through: latentflow.io/… and "
            f"{', '.join(OPERATOR_LABELS)}",
        ),
    ),
    "ColocatedModel": (*_engine(), _STORE_VARIANT, _NETS),
    "Model": (
        *_engine(),
        _STORE_VARIANT,
        _NETS,
        _DIVIDED,
        Rule(
            cel="has(self.source) != has(self.modelRef)",
            message='"model \'" + self.name + "\' needs exactly one of source and modelRef"',
            computed=True,
        ),
        Rule(
            cel="!(self.role in ['ControlNet', 'LoRAStore']) || has(self.attachTo)",
            message="\"model '\" + self.name + \"' is a \" + self.role + ' and needs attachTo, the name of its denoiser'",
            computed=True,
        ),
        Rule(
            cel="self.role in ['ControlNet', 'LoRAStore'] || !has(self.attachTo)",
            message="\"model '\" + self.name + \"' is a \" + self.role + '; attachTo is for ControlNets and LoRA stores'",
            computed=True,
        ),
        _colocated(
            "self.role != 'Denoiser'",
            "' is the denoiser, in whose pods the others may run; remove its placement",
        ),
        _colocated("!has(self.modelRef)", "' is a modelRef, which has its own pods; Colocated needs a source"),
        _colocated(
            "(self.scaling.minReplicas == 1 && self.scaling.maxReplicas == 1 && self.scaling.mode == 'Managed')",
            "' is Colocated with the denoiser and scales with it; set scaling on the denoiser",
        ),
        _colocated(
            "self.rollout == 'Surge'",
            "' is Colocated with the denoiser in its pods; set rollout on the denoiser",
        ),
        _colocated(
            f"!has(self.pod) || ({_NO_POD})",
            "' is Colocated with the denoiser in its pods; set pod on the denoiser",
        ),
        Rule(
            cel="self.role == oldSelf.role",
            message='"model \'" + self.name + "\' was a " + oldSelf.role + \'; a role cannot change: remove the model and '
            "add another under a new name'",
            computed=True,
        ),
    ),
    "Slo": (
        Rule(
            cel="has(self.latencyScale) != has(self.latencySeconds)",
            message="slo needs exactly one of latencyScale and latencySeconds",
        ),
    ),
    "WorkflowSpec": (
        _single("TextEncoder"),
        _single("Denoiser"),
        _single("VAE"),
        Rule(
            cel="self.models.all(m, !has(m.attachTo) || self.models.exists(d, d.role == 'Denoiser' && "
            "d.name == m.attachTo))",
            message="a model's attachTo names no denoiser of this workflow",
        ),
        Rule(
            cel="self.models.filter(m, m.role == 'LoRAStore').size() <= 1",
            message="a denoiser takes one LoRA store; this workflow has several",
        ),
        Rule(
            cel="!self.models.exists(m, m.placement == 'Colocated') || "
            "!self.models.exists(m, m.role == 'Denoiser' && has(m.modelRef))",
            message="the denoiser is a modelRef, whose pods this workflow does not own; give it a source, or remove "
            "placement Colocated from the other models",
        ),
    ),
    "ModelSpec": (
        *_engine(),
        _STORE_VARIANT,
        _NETS,
        _DIVIDED,
        Rule(
            cel="self.parallelism.tensor == oldSelf.parallelism.tensor || "
            f"({_undivided('self.parallelism')} && {_undivided('oldSelf.parallelism')})",
            message="parallelism.tensor is part of the model's identity and cannot change; make another DiffusionModel",
        ),
        *(
            Rule(
                cel=f"has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || self.{field} == oldSelf.{field})",
                message=f"{field} is part of the model's identity and cannot change; make another DiffusionModel",
            )
            for field in ("role", "source", "nets", "dtype", "engine", "resources", "host", "colocated")
        ),
    ),
}
_SERVED = {
    type_.__name__: tuple(_served(type_))
    for type_ in (Source, Engine, Parallelism, Model, ColocatedModel, ModelSpec, WorkflowSpec)
}
RULES = {name: _OWN.get(name, ()) + _SERVED.get(name, ()) for name in _OWN | _SERVED}
