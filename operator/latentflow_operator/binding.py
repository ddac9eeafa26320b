"""Which models workflows need and which serve them: pure, from workflows to wished DiffusionModels, conflicts, bindings.

Workflows that name the same model own it together: bounds merge as `latentflow.api.merge_scaling` says, and on what else
is not identity the oldest owner's word stands, the younger ones are told. A changed model takes over from the one that
serves when it is ready, and all that changed take over at once, as they may only fit each other. Of a model in its denoiser's
pods the denoiser's DiffusionModel says what its container needs, so that a Deployment follows from one object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from latentflow.api import DiffusionWorkflow, Model, Role, merge_scaling, placed
from latentflow.api.model import ColocatedModel, Host, ModelSpec
from latentflow.api.types import Scaling


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A workflow as its API server knows it. Ordered by age: `created` is RFC 3339, and the uid breaks ties."""

    workflow: DiffusionWorkflow
    uid: str
    created: str

    @property
    def age(self) -> tuple[str, str]:
        return (self.created, self.uid)


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """A workflow whose word on a shared model does not stand."""

    uid: str
    model: str
    field: str
    owner: str

    @property
    def message(self) -> str:
        return (
            f"Model {self.model!r} is shared with {self.owner}, which is older and says otherwise about {self.field}; "
            "its word stands. Say the same, or change what makes the model's identity to have one of your own."
        )


@dataclass(frozen=True, kw_only=True)
class WishedModel:
    """A DiffusionModel there should be.

    Attributes:
        name: The identity.
        owners: Workflows that name it, oldest first.
        conflicts: Owners whose word does not stand.
    """

    name: str
    spec: ModelSpec
    owners: tuple[Owner, ...]
    conflicts: tuple[Conflict, ...]


def wished(owners: Iterable[Owner]) -> dict[str, WishedModel]:
    """The models of a namespace's workflows, by identity. Models by reference are not ours to make."""
    uses: dict[str, list[tuple[Owner, Model]]] = {}
    names: dict[str, dict[str, str]] = {}
    for owner in sorted(owners, key=lambda one: one.age):
        own = names[owner.uid] = placed(owner.workflow)
        for model in owner.workflow.spec.models:
            if model.source is not None:
                uses.setdefault(own[model.name], []).append((owner, model))
    return {name: _merge(name, of_one, names[of_one[0][0].uid]) for name, of_one in uses.items()}


def _merge(name: str, uses: list[tuple[Owner, Model]], names: Mapping[str, str]) -> WishedModel:
    """One model. `names` are what the oldest owner's models are called."""
    oldest, first = uses[0]
    scaling: Scaling = first.scaling
    conflicts = []
    for owner, model in uses[1:]:
        scaling = merge_scaling(scaling, model.scaling)
        conflicts += [
            Conflict(uid=owner.uid, model=model.name, field=field, owner=oldest.workflow.name)
            for field, ours, theirs in (
                ("parallelism.latent", first.parallelism.latent, model.parallelism.latent),
                ("pod", first.pod, model.pod),
            )
            if ours != theirs
        ]
    if first.source is None:
        raise ValueError(f"{name} is a model by reference")
    # Whose word stands makes no difference here: by their identities all owners place it alike.
    colocated = _colocated(oldest.workflow, names)
    index = next((index for index, one in enumerate(colocated, 1) if one.model == name), None)
    denoiser = names[oldest.workflow.of_role(Role.DENOISER)[0].name]
    spec = ModelSpec(
        host=Host(model=denoiser, index=index) if index is not None else None,
        colocated=list(colocated) if name == denoiser and colocated else None,
        preferred_host=denoiser if first.attach_to is not None and index is None else None,
        scaling=scaling,
        parallelism=first.parallelism,
        pod=first.pod,
        **first.served(),
    )
    unique = {owner.uid: owner for owner, _ in uses}
    return WishedModel(name=name, spec=spec, owners=tuple(unique.values()), conflicts=tuple(conflicts))


def _colocated(workflow: DiffusionWorkflow, names: Mapping[str, str]) -> tuple[ColocatedModel, ...]:
    """What runs in the denoiser's pods, in an order that does not depend on the workflow's."""
    found = {
        names[model.name]: ColocatedModel(model=names[model.name], **model.served())
        for model in workflow.spec.models
        if model.is_colocated and model.source is not None
    }
    return tuple(found[name] for name in sorted(found))


@dataclass(frozen=True, kw_only=True)
class Binding:
    """What serves one model of a workflow.

    Attributes:
        model: The DiffusionModel that serves.
        next: The one that takes over when it is ready; None where nothing has changed.
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
    """What serves each model of a workflow now, in the workflow's order.

    Args:
        bound: What served until now, DiffusionModel by the model's name.
        is_ready: Whether a DiffusionModel takes requests.
        has_served: Whether a DiffusionModel exists and ever took requests; what never did is not waited for.
    """
    wanted = placed(workflow)
    changed = {name for name, model in wanted.items() if bound.get(name, model) != model}
    switch = all(is_ready(wanted[name]) for name in changed) or not all(has_served(bound[name]) for name in changed)
    return tuple(
        Binding(
            name=model.name,
            role=model.role,
            model=bound[model.name] if waits else wanted[model.name],
            next=wanted[model.name] if waits else None,
            by_reference=model.model_ref is not None,
        )
        for model in workflow.spec.models
        for waits in [model.name in changed and not switch]
    )
