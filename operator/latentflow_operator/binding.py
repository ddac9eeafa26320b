"""Which models a namespace's workflows need: pure, from workflows to wished DiffusionModels and the conflicts among them.

Workflows that name the same model own it together: bounds merge as `latentflow.api.merge_scaling` says, and on what else
is not identity the oldest owner's word stands, the younger ones are told.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from latentflow.api import DiffusionWorkflow, Model, identity, merge_scaling
from latentflow.api.types import ModelSpec, Scaling


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
    for owner in sorted(owners, key=lambda one: one.age):
        for model in owner.workflow.spec.models:
            if model.source is not None:
                uses.setdefault(identity(model), []).append((owner, model))
    return {name: _merge(name, of_one) for name, of_one in uses.items()}


def _merge(name: str, uses: list[tuple[Owner, Model]]) -> WishedModel:
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
    spec = ModelSpec(
        role=first.role,
        source=first.source,
        dtype=first.dtype,
        engine=first.engine,
        scaling=scaling,
        parallelism=first.parallelism,
        resources=first.resources,
        pod=first.pod,
    )
    unique = {owner.uid: owner for owner, _ in uses}
    return WishedModel(name=name, spec=spec, owners=tuple(unique.values()), conflicts=tuple(conflicts))
