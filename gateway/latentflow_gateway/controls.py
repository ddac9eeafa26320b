"""Which ControlNets a request uses, each with its control image and settings: a pure decision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from latentflow.api import DiffusionWorkflow, Role, identity
from latentflow.errors import FailedPreconditionError, NotFoundError
from latentflow.internal import control_names, images, strengths
from latentflow.reasons import Reason
from latentflow.v1 import control_pb2, generation_pb2

from latentflow_gateway import conditioning
from latentflow_gateway.fields import FIELD, naming, wrong
from latentflow_gateway.settings import Limits


@dataclass(frozen=True, kw_only=True)
class ControlPlan:
    """A ControlNet that the request uses.

    Attributes:
        name: As `control_names.written`.
        model: Its identity.
        net: Name of the net; empty: that of the model's source.
    """

    name: str
    model: str
    net: str
    image: bytes
    media_type: str
    scale: float
    start: float
    end: float
    guess_mode: bool


def plan(
    workflow: DiffusionWorkflow,
    request: generation_pb2.GenerateRequest,
    denoiser: control_pb2.DenoiserDescription,
    descriptions: Mapping[str, control_pb2.DescribeResponse],
    *,
    size: tuple[int, int],
    limits: Limits,
) -> tuple[ControlPlan, ...]:
    """The ControlNets of a request. Raises a LatentflowError that names the ControlNet and the remedy.

    Args:
        size: Width and height of the request's images.
    """
    known = {model.name: identity(model) for model in workflow.of_role(Role.CONTROL_NET)}
    plans: list[ControlPlan] = []
    for given in request.control_images:
        name = control_names.written(given.model, given.net)
        if given.model not in known:
            remedy = (
                ""
                if known
                else f" Add a model with role: ControlNet and attachTo: {workflow.of_role(Role.DENOISER)[0].name} to it, as "
                "docs/controlnets.md shows."
            )
            raise NotFoundError(
                f"Workflow {workflow.full_name} has no ControlNet {given.model!r}; it has {', '.join(known) or 'none'}.{remedy}",
                reason=Reason.UNKNOWN_MODEL,
                details={FIELD: "control_images"},
            )
        if any(plan.name == name for plan in plans):
            raise wrong("control_images", f"ControlNet {name!r} has two control images; pass one.")
        _check_net(given.model, descriptions[known[given.model]].control_net, given.net, denoiser)
        with naming("control_images"):
            scale = strengths.control_scale(given.scale if given.HasField("scale") else 1.0, name=name)
        start = given.start if given.HasField("start") else 0.0
        end = given.end if given.HasField("end") else 1.0
        if not 0 <= start < end <= 1:
            raise wrong(
                "control_images",
                f"ControlNet {name!r}: 0 <= start < end <= 1 must hold; got start {start}, end {end}.",
            )
        _check_image(given, name=name, size=size, limits=limits)
        plans.append(
            ControlPlan(
                name=name,
                model=known[given.model],
                net=given.net,
                image=given.image.data,
                media_type=given.image.media_type,
                scale=scale,
                start=start,
                end=end,
                guess_mode=given.guess_mode,
            )
        )
    return tuple(plans)


def _check_net(
    model: str, described: control_pb2.ControlNetDescription, net: str, denoiser: control_pb2.DenoiserDescription
) -> None:
    problems = {one.name: one.problem for one in described.nets}
    if net and net not in problems:
        names = ", ".join(name for name, problem in problems.items() if name and not problem)
        raise NotFoundError(
            f"ControlNet {model!r} has no net {net!r}; it has {names or 'none with a name'}.",
            reason=Reason.UNKNOWN_MODEL,
            details={FIELD: "control_images"},
        )
    if problem := problems.get(net):
        raise FailedPreconditionError(
            f"The net {net!r} of ControlNet {model!r} cannot be used: {problem}",
            reason=Reason.WEIGHTS_UNAVAILABLE,
            details={FIELD: "control_images"},
        )
    if described.latent_channels != denoiser.latent_channels:
        raise FailedPreconditionError(
            f"ControlNet {model!r} takes latents of {described.latent_channels} channels, the denoiser of "
            f"{denoiser.latent_channels}: it was made for another base model. Correct its source in the workflow.",
            reason=Reason.CONTROLNET_MISMATCH,
        )
    if problem := conditioning.mismatch(needed=described.conditioning, given=denoiser.conditioning):
        raise FailedPreconditionError(
            f"ControlNet {model!r} and the denoiser do not take the same conditioning: {problem}. The ControlNet was made for "
            "another base model; correct its source in the workflow.",
            reason=Reason.CONTROLNET_MISMATCH,
        )


def _check_image(given: generation_pb2.ControlImage, *, name: str, size: tuple[int, int], limits: Limits) -> None:
    what = f"The control image of {name!r}"
    data = given.image.data
    if len(data) > limits.max_control_image_bytes:
        raise wrong(
            "control_images",
            f"{what} has {len(data)} bytes; this gateway accepts at most {limits.max_control_image_bytes}.",
        )
    # The header only: the ControlNet decodes the image, once, and a size that is refused is never decoded.
    with naming("control_images"):
        found = images.opened(given.image, what=what).size
    if found != size:
        raise wrong(
            "control_images",
            f"{what} is {found[0]}x{found[1]}, the request {size[0]}x{size[1]}; resize one to the other.",
        )
