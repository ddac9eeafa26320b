"""Typed events of a request, and the result that they add up to. Pure."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from PIL import Image

from latentflow.errors import DataLossError
from latentflow.v1 import generation_pb2


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """The request is valid and admitted. `queue_position` is the length of the gateway's queue, the request included."""

    request_id: str
    queue_position: int
    seed: int
    workflow: str


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Step `step` of `total` of the image with index `image` has ended. Steps are repeated where a stage is repeated.

    `total` counts evaluations of the denoiser. With some samplers they are more than the requested steps: PNDM, the own
    sampler of many models, evaluates the denoiser once more, Heun nearly twice as often.

    `preview` is a small PNG, or empty.
    """

    image: int
    step: int
    total: int
    preview: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, kw_only=True)
class ImageReady:
    """An image is finished.

    Attributes:
        image: Its index in the request.
        png: The file.
        seed: The seed that generates it by itself.
        steps_without_loras: Steps that ran before its LoRAs were loaded; 0 unless the request allowed it.
    """

    image: int
    png: bytes = field(repr=False)
    seed: int
    steps_without_loras: int = 0

    @property
    def pil(self) -> Image.Image:
        """The image, decoded. DataLossError where the bytes are damaged."""
        try:
            picture = Image.open(io.BytesIO(self.png), formats=("PNG",))
            picture.load()
        except (OSError, ValueError) as error:
            raise DataLossError(f"Image {self.image} is damaged: {error}. Send the request again.") from None
        return picture


@dataclass(frozen=True, kw_only=True)
class StageTiming:
    """One stage of one image, in seconds: wall time, time in forward passes, time before the first forward pass.

    `attempts` is 1 where no attempt failed.
    """

    stage: str
    image: int
    replica: str
    wall: float
    forward: float
    wait: float
    attempts: int


@dataclass(frozen=True, kw_only=True)
class ModelUse:
    """A model that the request used: its name in the workflow, its identity, and the digest of its weights."""

    name: str
    model: str
    content_digest: str


@dataclass(frozen=True, kw_only=True)
class Done:
    """The request has succeeded: its settings with defaults filled in, and times in seconds.

    `truncated` and `negative_truncated` are the parts of the prompts that were cut off because they were too long.
    """

    seed: int
    width: int
    height: int
    steps: int
    guidance_scale: float
    sampler: str
    total: float
    queued: float
    stages: tuple[StageTiming, ...]
    models: tuple[ModelUse, ...]
    truncated: str
    negative_truncated: str


Event: TypeAlias = Accepted | Progress | ImageReady | Done


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished request: its images in order, and its settings."""

    accepted: Accepted
    ready: tuple[ImageReady, ...]
    done: Done

    @property
    def images(self) -> list[Image.Image]:
        """The images, decoded."""
        return [ready.pil for ready in self.ready]

    @property
    def image(self) -> Image.Image:
        """The first image."""
        return self.ready[0].pil

    @property
    def seed(self) -> int:
        return self.done.seed


@dataclass(frozen=True, kw_only=True)
class WorkflowModel:
    """A model of a workflow, as the gateway knows it.

    Attributes:
        adapters: Of a LoRA store, the adapters that a request may use.
        unusable_adapters: Of a LoRA store, the others, and why each cannot be used.
        nets: Of a ControlNet, the further nets that a request may use.
    """

    name: str
    role: str
    model: str
    content_digest: str
    ready_replicas: int
    adapters: tuple[str, ...]
    unusable_adapters: Mapping[str, str]
    nets: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Workflow:
    """A workflow's inputs and models."""

    name: str
    task: str
    family: str
    ready: bool
    models: tuple[WorkflowModel, ...]
    defaults: Mapping[str, float | int]
    samplers: tuple[str, ...]
    limits: Mapping[str, int]


def event(response: generation_pb2.GenerateResponse) -> Event | None:
    """The event of a message; None for a kind of event that this version does not know."""
    kind = response.WhichOneof("event")
    if kind == "accepted":
        a = response.accepted
        return Accepted(request_id=a.request_id, queue_position=a.queue_position, seed=a.seed, workflow=a.workflow)
    if kind == "progress":
        p = response.progress
        return Progress(image=p.image, step=p.step, total=p.total, preview=p.preview.data)
    if kind == "image":
        return ImageReady(
            image=response.image.image,
            png=response.image.content.data,
            seed=response.image.seed,
            steps_without_loras=response.image.steps_without_loras,
        )
    if kind == "done":
        return _done(response.done)
    return None


def workflow(response: generation_pb2.DescribeWorkflowResponse) -> Workflow:
    """The workflow of a response."""
    return Workflow(
        name=response.workflow,
        task=response.task,
        family=response.family,
        ready=response.ready,
        models=tuple(
            WorkflowModel(
                name=m.name,
                role=m.role,
                model=m.model,
                content_digest=m.content_digest,
                ready_replicas=m.ready_replicas,
                adapters=tuple(m.adapters),
                unusable_adapters={adapter.name: adapter.problem for adapter in m.unusable_adapters},
                nets=tuple(m.nets),
            )
            for m in response.models
        ),
        defaults={
            "width": response.default_width,
            "height": response.default_height,
            "steps": response.default_steps,
            "guidance_scale": response.default_guidance_scale,
        },
        samplers=tuple(response.samplers),
        limits={
            "size_multiple": response.size_multiple,
            "max_pixels": response.max_pixels,
            "max_steps": response.max_steps,
            "max_images": response.max_images,
            "max_control_image_bytes": response.max_control_image_bytes,
            "max_prompt_tokens": response.max_prompt_tokens,
        },
    )


class Collector:
    """Collects events into a result, and recognises those that a retry repeats."""

    def __init__(self) -> None:
        self._accepted: Accepted | None = None
        self._images: dict[int, ImageReady] = {}
        self._done: Done | None = None

    def take(self, one: Event) -> bool:
        """Adds an event. False for one that a retry has repeated, which is not passed on."""
        if isinstance(one, Accepted):
            first, self._accepted = self._accepted is None, self._accepted or one
            return first
        if isinstance(one, ImageReady):
            return self._images.setdefault(one.image, one) is one
        if isinstance(one, Done):
            self._done = one
        return True

    @property
    def complete(self) -> bool:
        return self._done is not None

    def result(self) -> Result:
        """The result of all events. DataLossError where the stream ended before Done."""
        if self._accepted is None or self._done is None or not self._images:
            raise DataLossError("The gateway ended the stream before the request had ended; send it again.")
        return Result(
            accepted=self._accepted, ready=tuple(self._images[i] for i in sorted(self._images)), done=self._done
        )


def _done(message: generation_pb2.Done) -> Done:
    return Done(
        seed=message.seed,
        width=message.width,
        height=message.height,
        steps=message.steps,
        guidance_scale=message.guidance_scale,
        sampler=message.sampler,
        total=message.total.ToNanoseconds() / 1e9,
        queued=message.queued.ToNanoseconds() / 1e9,
        stages=tuple(
            StageTiming(
                stage=s.stage,
                image=s.image,
                replica=s.replica,
                wall=s.wall.ToNanoseconds() / 1e9,
                forward=s.forward.ToNanoseconds() / 1e9,
                wait=s.wait.ToNanoseconds() / 1e9,
                attempts=s.attempts,
            )
            for s in message.stages
        ),
        models=tuple(ModelUse(name=m.name, model=m.model, content_digest=m.content_digest) for m in message.models),
        truncated=message.truncated,
        negative_truncated=message.negative_truncated,
    )
