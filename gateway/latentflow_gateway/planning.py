"""Plans a request, or refuses it, before any model runs. Pure.

A plan holds every setting of a request with defaults filled in, and its models by identity; execution carries it out. What
depends on the weights comes from the descriptions that the model servers return.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from latentflow.api import DiffusionWorkflow, Role, identity
from latentflow.api.types import Latent
from latentflow.errors import FailedPreconditionError, InvalidRequestError, NotFoundError, UnimplementedError
from latentflow.internal import images, unserved
from latentflow.internal.guidance import Guidance
from latentflow.reasons import Reason
from latentflow.v1 import control_pb2, generation_pb2

from latentflow_gateway import conditioning, controls, loras
from latentflow_gateway.controls import ControlPlan
from latentflow_gateway.fields import FIELD, wrong
from latentflow_gateway.loras import AdapterPlan
from latentflow_gateway.settings import Limits

_MAX_SEED = (1 << 64) - 1
_MAX_KEY = 128
_MAX_PRIORITY = 100
_NAME_ONE = "Name one: --workflow on the command line, workflow=… in Python, the field model over HTTP."


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every setting of a request. Models are identities; `names` has them by their names in the workflow.

    Attributes:
        latent: Replicas of the denoiser that may share the request's steps; 1 where its steps have no two halves, or the
            denoiser's version does not share them.
    """

    workflow: str
    names: Mapping[str, str]
    text_encoder: str
    denoiser: str
    vae: str
    store: str | None
    prompt: str
    negative_prompt: str | None
    strict_prompt: bool
    deterministic: bool
    guidance: bool
    guidance_scale: float
    latent: Latent
    width: int
    height: int
    scale_factor: int
    steps: int
    sampler: str
    seed: int
    images: int
    controls: tuple[ControlPlan, ...]
    adapters: tuple[AdapterPlan, ...]
    preview_interval: int


def find(workflows: tuple[DiffusionWorkflow, ...], name: str) -> DiffusionWorkflow:
    """The workflow that a request names; without a name, the only one. NotFoundError lists those that are served."""
    known = ", ".join(workflow.full_name for workflow in workflows) or "none"
    if not name:
        if len(workflows) == 1:
            return workflows[0]
        raise NotFoundError(
            f"The request names no workflow, and the gateway serves {known}. {_NAME_ONE}",
            reason=Reason.UNKNOWN_WORKFLOW,
            details={FIELD: "workflow"},
        )
    full = name if "/" in name else f"default/{name}"
    for workflow in workflows:
        if workflow.full_name == full:
            return workflow
    raise NotFoundError(
        f"The gateway has no workflow {full!r}; it serves {known}. {_NAME_ONE}",
        reason=Reason.UNKNOWN_WORKFLOW,
        details={FIELD: "workflow"},
    )


def needed(workflow: DiffusionWorkflow, request: generation_pb2.GenerateRequest) -> dict[str, str]:
    """The models that a request uses, identities by name. Their descriptions are needed to plan it."""
    named = {image.model for image in request.control_images}
    used = {}
    for model in workflow.spec.models:
        attached = model.role in (Role.CONTROL_NET, Role.LORA_STORE)
        wanted = model.name in named or (model.role is Role.LORA_STORE and bool(request.loras))
        if not attached or wanted:
            used[model.name] = identity(model)
    return used


def plan(
    *,
    workflow: DiffusionWorkflow,
    request: generation_pb2.GenerateRequest,
    descriptions: Mapping[str, control_pb2.DescribeResponse],
    limits: Limits,
    seed: int,
) -> Plan:
    """The plan of a request.

    Args:
        descriptions: Of the models of `needed`, by identity.
        seed: For a request without a seed.

    Raises:
        LatentflowError: Names the field that is impossible, and what to do.
    """
    unserved.refuse(request)
    if request.media_type not in ("", images.PNG):
        raise UnimplementedError(f"This version returns images as {images.PNG} only, not as {request.media_type!r}.")
    if workflow.spec.task != "TextToImage":
        raise UnimplementedError(
            f"Workflow {workflow.full_name} has the task {workflow.spec.task}; this version serves only TextToImage."
        )
    one = {role: identity(workflow.of_role(role)[0]) for role in (Role.TEXT_ENCODER, Role.DENOISER, Role.VAE)}
    denoiser = descriptions[one[Role.DENOISER]].denoiser
    factor = descriptions[one[Role.VAE]].vae.scale_factor
    defaults = workflow.spec.defaults
    width = request.width if request.HasField("width") else defaults.width
    height = request.height if request.HasField("height") else defaults.height
    steps = request.steps if request.HasField("steps") else defaults.steps
    guidance_scale = request.guidance_scale if request.HasField("guidance_scale") else defaults.guidance_scale
    count = request.images if request.HasField("images") else 1
    seed = request.seed if request.HasField("seed") else seed
    _check_families(workflow, descriptions)
    _check_conditioning(workflow, descriptions)
    _check_latents(workflow, descriptions)
    _check_size(width, height, factor=factor, limits=limits)
    _between("steps", "The number of steps", steps, 1, limits.max_steps)
    _between("images", "The number of images", count, 1, limits.max_images)
    _between("priority", "The priority", request.priority, 0, _MAX_PRIORITY)
    if request.HasField("deadline") and request.deadline.ToNanoseconds() <= 0:
        raise wrong("deadline", "The deadline must be a positive duration, counted from the request's arrival.")
    if not (math.isfinite(guidance_scale) and 0 <= guidance_scale <= 100):
        raise wrong("guidance_scale", f"The guidance scale must be from 0 to 100, not {guidance_scale}.")
    if seed + count - 1 > _MAX_SEED:
        raise wrong(
            "seed",
            f"The seed {seed} is too large for {count} images, whose seeds must be below 2^64; choose a smaller one.",
        )
    for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
        if len(text) > limits.max_prompt_chars:
            what, most = name.replace("_", " "), limits.max_prompt_chars
            raise wrong(name, f"The {what} has {len(text)} characters; this gateway accepts at most {most}.")
    if len(request.idempotency_key) > _MAX_KEY:
        raise InvalidRequestError(f"The idempotency key has more than {_MAX_KEY} characters; use a UUID.")
    sampler = request.sampler if request.HasField("sampler") else (defaults.sampler or "")
    samplers = list(denoiser.samplers)
    if sampler and sampler not in samplers:
        raise InvalidRequestError(
            f"Sampler {sampler!r} is unknown; use one of {', '.join(samplers)}.",
            reason=Reason.UNKNOWN_SAMPLER,
            details={FIELD: "sampler"},
        )
    negative = request.negative_prompt if request.HasField("negative_prompt") else defaults.negative_prompt
    stores = workflow.of_role(Role.LORA_STORE)
    guidance = Guidance(scale=guidance_scale, is_embedded=not denoiser.classifier_free_guidance).has_halves
    # A deterministic request is computed by one replica.
    can_have_peer = guidance and denoiser.guidance_peers and not request.deterministic
    return Plan(
        workflow=workflow.full_name,
        names=needed(workflow, request),
        text_encoder=one[Role.TEXT_ENCODER],
        denoiser=one[Role.DENOISER],
        vae=one[Role.VAE],
        store=identity(stores[0]) if stores and request.loras else None,
        prompt=request.prompt,
        negative_prompt=negative,
        strict_prompt=request.strict_prompt,
        deterministic=request.deterministic,
        guidance=guidance,
        guidance_scale=guidance_scale,
        latent=workflow.of_role(Role.DENOISER)[0].parallelism.latent if can_have_peer else 1,
        width=width,
        height=height,
        scale_factor=factor,
        steps=steps,
        sampler=sampler or (samplers[0] if samplers else ""),
        seed=seed,
        images=count,
        controls=controls.plan(workflow, request, denoiser, descriptions, size=(width, height), limits=limits),
        adapters=loras.plan(workflow, request, descriptions, steps=steps),
        preview_interval=request.preview_interval,
    )


def _check_families(workflow: DiffusionWorkflow, descriptions: Mapping[str, control_pb2.DescribeResponse]) -> None:
    denoiser = identity(workflow.of_role(Role.DENOISER)[0])
    for model in workflow.spec.models:
        found = descriptions.get(identity(model))
        if found is not None and found.family and found.family != descriptions[denoiser].family:
            raise FailedPreconditionError(
                f"Model {model.name!r} belongs to the family {found.family}, the denoiser to {descriptions[denoiser].family}; "
                "they cannot be used together. Correct the sources in the workflow.",
                reason=Reason.FAMILY_MISMATCH,
            )


def _check_latents(workflow: DiffusionWorkflow, descriptions: Mapping[str, control_pb2.DescribeResponse]) -> None:
    """FailedPreconditionError where the VAE does not decode what the denoiser makes."""
    denoiser, vae = (workflow.of_role(role)[0] for role in (Role.DENOISER, Role.VAE))
    made = descriptions[identity(denoiser)].denoiser.latent_channels
    taken = descriptions[identity(vae)].vae.latent_channels
    if made != taken:
        raise FailedPreconditionError(
            f"The denoiser {denoiser.name!r} makes latents of {made} channels, the VAE {vae.name!r} takes {taken}. They "
            "belong to different base models; correct their sources in the workflow.",
            reason=Reason.FAMILY_MISMATCH,
        )


def _check_conditioning(workflow: DiffusionWorkflow, descriptions: Mapping[str, control_pb2.DescribeResponse]) -> None:
    """FailedPreconditionError where the text encoder does not make what the denoiser needs."""
    encoder, denoiser = (workflow.of_role(role)[0] for role in (Role.TEXT_ENCODER, Role.DENOISER))
    problem = conditioning.mismatch(
        needed=descriptions[identity(denoiser)].denoiser.conditioning,
        given=descriptions[identity(encoder)].text_encoder.conditioning,
    )
    if problem:
        raise FailedPreconditionError(
            f"The text encoder {encoder.name!r} does not make what the denoiser {denoiser.name!r} needs: {problem}. They "
            "belong to different base models; correct their sources in the workflow.",
            reason=Reason.TEXT_ENCODER_MISMATCH,
        )


def _check_size(width: int, height: int, *, factor: int, limits: Limits) -> None:
    for name, value in (("width", width), ("height", height)):
        if value < factor or value % factor:
            near = max(factor, round(value / factor) * factor)
            raise wrong(name, f"The {name} must be a multiple of {factor}, such as {near}, not {value}.")
    if width * height > limits.max_pixels:
        raise wrong(
            "width",
            f"{width}x{height} is {width * height} pixels; this gateway accepts at most {limits.max_pixels} (--max-pixels).",
        )


def _between(field: str, what: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise wrong(field, f"{what} must be from {least} to {most}, not {value}.")
