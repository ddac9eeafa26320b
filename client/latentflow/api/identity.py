"""Identity, which decides that two models are the same, and the settings on which workflows that share a model agree.

One server serves all models of one identity. It is a hash of role, source, everything that changes results, and of all
other settings those that the role uses and that differ from their defaults. So a new option with a neutral default changes
no identity and restarts no model. In a cluster it also depends on the models that share the pods.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from latentflow.api.parts import Role, Scaling
from latentflow.api.workflow import DiffusionWorkflow, Model

_WORDS = {
    Role.TEXT_ENCODER: "text-encoder",
    Role.DENOISER: "denoiser",
    Role.CONTROL_NET: "controlnet",
    Role.LORA_STORE: "lora-store",
    Role.VAE: "vae",
}


def identity(model: Model) -> str:
    """A model's identity, such as "denoiser-1f3c9a0b12": equal for models that one server serves. A DNS label.

    A `modelRef` is its own identity: it names a model that exists already. Placement does not count: see `placed`.
    """
    if model.source is None:
        return model.model_ref or ""
    meaning = {
        "role": model.role.value,
        "source": model.source.model_dump(exclude_none=True),
        "dtype": model.dtype,
        # Auto starts at degree 1; another degree is another model.
        "tensor": model.parallelism.tensor_degree,
        "nets": {net.name: net.source.model_dump(exclude_none=True) for net in model.nets or ()},
        "engine": model.engine.distinguishing(model.role),
        "resources": model.resources,
    }
    return _named(model.role, {name: value for name, value in meaning.items() if value not in ({}, [])})


def placed(workflow: DiffusionWorkflow) -> dict[str, str]:
    """Identities in a cluster, by the models' names within the workflow.

    As `identity`, except of a denoiser with models in its pods ("placement: Colocated") and of those colocated models: their
    identities depend on the pods they run in. So workflows share such a denoiser only with all its colocated models.
    """
    alone = {model.name: identity(model) for model in workflow.spec.models}
    colocated = [model for model in workflow.spec.models if model.is_colocated]
    if not colocated:
        return alone
    (denoiser,) = workflow.of_role(Role.DENOISER)
    # The host's identity uses the colocated models' own identities, as theirs in its pods depend on the host's.
    own = sorted({alone[model.name] for model in colocated})
    host = _named(Role.DENOISER, {"alone": alone[denoiser.name], "colocated": own})
    hosted = {model.name: _named(model.role, {"alone": alone[model.name], "host": host}) for model in colocated}
    return alone | {denoiser.name: host} | hosted


def _named(role: Role, meaning: dict[str, Any]) -> str:
    canonical = json.dumps(meaning, sort_keys=True, separators=(",", ":"), default=str)
    return f"{_WORDS[role]}-{hashlib.sha256(canonical.encode()).hexdigest()[:10]}"


def distinct_models(workflows: Iterable[DiffusionWorkflow]) -> dict[str, Model]:
    """The models that have to run for these workflows, by identity, each with the bounds that its sharers agree on."""
    distinct: dict[str, Model] = {}
    for workflow in workflows:
        for model in workflow.spec.models:
            key = identity(model)
            other = distinct.get(key)
            if other is None:
                distinct[key] = model
            else:
                distinct[key] = other.model_copy(update={"scaling": merge_scaling(other.scaling, model.scaling)})
    return distinct


def merge_scaling(first: Scaling, second: Scaling) -> Scaling:
    """The bounds of a model that two workflows share: the larger minimum, the larger maximum, External if either is."""
    return Scaling(
        min_replicas=max(first.min_replicas, second.min_replicas),
        max_replicas=max(first.max_replicas, second.max_replicas),
        mode="External" if "External" in (first.mode, second.mode) else "Managed",
    )
