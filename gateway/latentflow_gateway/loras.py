"""Which LoRAs a request uses, and how many steps it may take before they are loaded: a pure decision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from latentflow.api import DiffusionWorkflow, Role, identity
from latentflow.errors import FailedPreconditionError, NotFoundError
from latentflow.internal import strengths
from latentflow.reasons import Reason
from latentflow.v1 import control_pb2, generation_pb2

from latentflow_gateway.fields import FIELD, naming, wrong

# Below this number of steps for each step without the LoRAs, a request waits for them: they would act in too few steps.
_STEPS_OF_ASYNC_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class AdapterPlan:
    """A LoRA that the request uses.

    Attributes:
        async_steps: Steps that may run before it is loaded.
    """

    name: str
    weight: float
    digest: str
    components: tuple[str, ...]
    async_steps: int = 0


def plan(
    workflow: DiffusionWorkflow,
    request: generation_pb2.GenerateRequest,
    descriptions: Mapping[str, control_pb2.DescribeResponse],
    *,
    steps: int,
) -> tuple[AdapterPlan, ...]:
    """The LoRAs of a request of so many steps. Raises a LatentflowError that names the LoRA and the remedy."""
    if not request.loras:
        return ()
    stores = workflow.of_role(Role.LORA_STORE)
    if not stores:
        raise NotFoundError(
            f"Workflow {workflow.full_name} has no LoRA store. Add a model with role: LoRAStore and "
            f"attachTo: {workflow.of_role(Role.DENOISER)[0].name} to it, as docs/loras.md shows.",
            reason=Reason.UNKNOWN_ADAPTER,
            details={FIELD: "loras"},
        )
    known = {adapter.name: adapter for adapter in descriptions[identity(stores[0])].lora_store.adapters}
    applied = {
        *descriptions[identity(workflow.of_role(Role.TEXT_ENCODER)[0])].text_encoder.adapter_components,
        *descriptions[identity(workflow.of_role(Role.DENOISER)[0])].denoiser.adapter_components,
    }
    plans: list[AdapterPlan] = []
    for lora in request.loras:
        adapter = known.get(lora.name)
        if adapter is None:
            raise NotFoundError(
                f"LoRA store {stores[0].name!r} has no LoRA {lora.name!r}; it has "
                f"{', '.join(name for name, one in known.items() if not one.problem) or 'none'}.",
                reason=Reason.UNKNOWN_ADAPTER,
                details={FIELD: "loras"},
            )
        if adapter.problem:
            raise FailedPreconditionError(
                f"LoRA {lora.name!r} cannot be used: {adapter.problem}", reason=Reason.ADAPTER_UNREADABLE
            )
        with naming("loras"):
            strengths.lora_weight(lora.weight, name=lora.name)
        if unused := sorted(set(adapter.components) - applied):
            raise FailedPreconditionError(
                f"LoRA {lora.name!r} changes the {' and '.join(unused)}, which no model of workflow {workflow.full_name} "
                "has; it was trained for another base model.",
                reason=Reason.ADAPTER_MISMATCH,
            )
        if any(plan.name == lora.name for plan in plans):
            raise wrong("loras", f"LoRA {lora.name!r} occurs twice; pass it once, with the sum of the weights.")
        wanted = lora.async_steps if lora.HasField("async_steps") else stores[0].engine.async_steps
        plans.append(
            AdapterPlan(
                name=lora.name,
                weight=lora.weight,
                digest=adapter.digest,
                components=tuple(adapter.components),
                async_steps=async_steps(wanted, steps=steps, deterministic=request.deterministic),
            )
        )
    return tuple(plans)


def async_steps(wanted: int, *, steps: int, deterministic: bool) -> int:
    """The steps that a request of so many steps may take without a LoRA; 0 for one of few steps or a deterministic one."""
    return 0 if deterministic or steps < _STEPS_OF_ASYNC_STEPS * wanted else wanted
