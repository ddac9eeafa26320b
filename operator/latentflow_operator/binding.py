"""Computes desired DiffusionModels, conflicts and bindings from workflows: pure.

Workflows that name the same model own it together. `latentflow.api.merge_scaling` merges their bounds. For other
settings that are not part of the identity, the value of the oldest owner is used, and the younger owners get a
conflict. A changed model takes over from the serving one when it is ready. All changed models of a workflow take over
together, because they may fit only each other. The denoiser's DiffusionModel contains what the containers of colocated
models need, so that a Deployment follows from one object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from latentflow.api import DiffusionWorkflow, Model, Role, merge_scaling, placed
from latentflow.api.types import ColocatedModel, Host, ModelSpec, Scaling


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A workflow in a cluster. Owners are ordered by age: by `created`, which is RFC 3339, then by uid."""

    workflow: DiffusionWorkflow
    uid: str
    created: str

    @property
    def age(self) -> tuple[str, str]:
        return (self.created, self.uid)


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """A workflow whose value for a setting of a shared model is not used, because `owner` is older."""

    uid: str
    model: str
    field: str
    owner: str

    @property
    def message(self) -> str:
        return (
            f"Model {self.model!r} is shared with the older workflow {self.owner}, which has another value for "
            f"{self.field}; the value of the older one is used. Use the same value, or change the model so that it is not shared."
        )


@dataclass(frozen=True, kw_only=True)
class DesiredModel:
    """A DiffusionModel that should exist.

    Attributes:
        name: The identity.
        owners: Workflows that name it, oldest first.
        conflicts: Settings of younger owners that are not used.
    """

    name: str
    spec: ModelSpec
    owners: tuple[Owner, ...]
    conflicts: tuple[Conflict, ...]


def desired_models(owners: Iterable[Owner]) -> dict[str, DesiredModel]:
    """The models of a namespace's workflows, by identity, without those by reference, which others create."""
    uses: dict[str, list[tuple[Owner, Model]]] = {}
    names: dict[str, dict[str, str]] = {}
    for owner in sorted(owners, key=lambda one: one.age):
        identities = names[owner.uid] = placed(owner.workflow)
        for model in owner.workflow.spec.models:
            if model.source is not None:
                uses.setdefault(identities[model.name], []).append((owner, model))
    return {name: _merge(name, uses_of_one, names[uses_of_one[0][0].uid]) for name, uses_of_one in uses.items()}


def _merge(name: str, uses: list[tuple[Owner, Model]], names: Mapping[str, str]) -> DesiredModel:
    """One model. `names` are the identities of the oldest owner's models, by name in the workflow."""
    oldest, first = uses[0]
    scaling: Scaling = first.scaling
    conflicts = []
    for owner, model in uses[1:]:
        scaling = merge_scaling(scaling, model.scaling)
        conflicts += [
            Conflict(uid=owner.uid, model=model.name, field=field, owner=oldest.workflow.name)
            for field, used, other in (
                ("parallelism", first.parallelism, model.parallelism),
                ("rollout", first.rollout, model.rollout),
                ("pod", first.pod, model.pod),
            )
            if used != other
        ]
    if first.source is None:
        raise ValueError(f"{name} is a model by reference")
    # Colocation is part of the identity, so it is the same for all owners.
    colocated = _colocated(oldest.workflow, names)
    index = next((index for index, one in enumerate(colocated, 1) if one.model == name), None)
    denoiser = names[oldest.workflow.of_role(Role.DENOISER)[0].name]
    spec = ModelSpec(
        host=Host(model=denoiser, index=index) if index is not None else None,
        colocated=list(colocated) if name == denoiser and colocated else None,
        preferred_host=denoiser if first.attach_to is not None and index is None else None,
        scaling=scaling,
        parallelism=first.parallelism,
        rollout=first.rollout,
        pod=first.pod,
        **first.served(),
    )
    unique = {owner.uid: owner for owner, _ in uses}
    return DesiredModel(name=name, spec=spec, owners=tuple(unique.values()), conflicts=tuple(conflicts))


def _colocated(workflow: DiffusionWorkflow, names: Mapping[str, str]) -> tuple[ColocatedModel, ...]:
    """The models that run in the denoiser's pods, in an order that does not depend on the order in the workflow."""
    found = {
        names[model.name]: ColocatedModel(model=names[model.name], **model.served())
        for model in workflow.spec.models
        if model.is_colocated and model.source is not None
    }
    return tuple(found[name] for name in sorted(found))


@dataclass(frozen=True, kw_only=True)
class Binding:
    """The DiffusionModel that serves one model of a workflow.

    Attributes:
        model: The DiffusionModel that serves.
        next: The one that takes over when it is ready; None if the model has not changed.
        by_reference: Whether the workflow names the DiffusionModel itself.
    """

    name: str
    role: Role
    model: str
    next: str | None
    by_reference: bool


def bind(
    workflow: DiffusionWorkflow,
    bound: Mapping[str, str],
    *,
    is_ready: Callable[[str], bool],
    has_served: Callable[[str], bool],
) -> tuple[Binding, ...]:
    """The bindings of a workflow's models, in the workflow's order.

    Args:
        bound: The DiffusionModel that has served each model so far, by the model's name.
        is_ready: Whether a DiffusionModel accepts requests.
        has_served: Whether a DiffusionModel exists and ever accepted requests. If one of the changed models did not, or
            if its rollout is Replace, the new ones take over at once.
    """
    wanted = placed(workflow)
    changed = {name for name, model in wanted.items() if bound.get(name, model) != model}
    replaced = any(model.name in changed and model.rollout == "Replace" for model in workflow.spec.models)
    served = all(has_served(bound[name]) for name in changed)
    switch = replaced or not served or all(is_ready(wanted[name]) for name in changed)
    return tuple(
        Binding(
            name=model.name,
            role=model.role,
            model=bound[model.name] if pending else wanted[model.name],
            next=wanted[model.name] if pending else None,
            by_reference=model.model_ref is not None,
        )
        for model in workflow.spec.models
        for pending in [model.name in changed and not switch]
    )
