import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from latentflow.v1 import images_pb2 as _images_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Lora(_message.Message):
    __slots__ = ("name", "weight", "async_steps")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    ASYNC_STEPS_FIELD_NUMBER: _ClassVar[int]
    name: str
    weight: float
    async_steps: int
    def __init__(self, name: _Optional[str] = ..., weight: _Optional[float] = ..., async_steps: _Optional[int] = ...) -> None: ...

class ControlImage(_message.Message):
    __slots__ = ("model", "image", "scale", "start", "end", "net", "guess_mode")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    NET_FIELD_NUMBER: _ClassVar[int]
    GUESS_MODE_FIELD_NUMBER: _ClassVar[int]
    model: str
    image: _images_pb2.EncodedImage
    scale: float
    start: float
    end: float
    net: str
    guess_mode: bool
    def __init__(self, model: _Optional[str] = ..., image: _Optional[_Union[_images_pb2.EncodedImage, _Mapping]] = ..., scale: _Optional[float] = ..., start: _Optional[float] = ..., end: _Optional[float] = ..., net: _Optional[str] = ..., guess_mode: _Optional[bool] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("workflow", "prompt", "negative_prompt", "width", "height", "steps", "guidance_scale", "sampler", "seed", "images", "control_images", "loras", "idempotency_key", "strict_prompt", "preview_interval", "priority", "deadline", "deterministic", "media_type")
    WORKFLOW_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    CONTROL_IMAGES_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    STRICT_PROMPT_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    MEDIA_TYPE_FIELD_NUMBER: _ClassVar[int]
    workflow: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    sampler: str
    seed: int
    images: int
    control_images: _containers.RepeatedCompositeFieldContainer[ControlImage]
    loras: _containers.RepeatedCompositeFieldContainer[Lora]
    idempotency_key: str
    strict_prompt: bool
    preview_interval: int
    priority: int
    deadline: _duration_pb2.Duration
    deterministic: bool
    media_type: str
    def __init__(self, workflow: _Optional[str] = ..., prompt: _Optional[str] = ..., negative_prompt: _Optional[str] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., steps: _Optional[int] = ..., guidance_scale: _Optional[float] = ..., sampler: _Optional[str] = ..., seed: _Optional[int] = ..., images: _Optional[int] = ..., control_images: _Optional[_Iterable[_Union[ControlImage, _Mapping]]] = ..., loras: _Optional[_Iterable[_Union[Lora, _Mapping]]] = ..., idempotency_key: _Optional[str] = ..., strict_prompt: _Optional[bool] = ..., preview_interval: _Optional[int] = ..., priority: _Optional[int] = ..., deadline: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., deterministic: _Optional[bool] = ..., media_type: _Optional[str] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("request_id", "queue_position", "seed", "workflow")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    QUEUE_POSITION_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    WORKFLOW_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    queue_position: int
    seed: int
    workflow: str
    def __init__(self, request_id: _Optional[str] = ..., queue_position: _Optional[int] = ..., seed: _Optional[int] = ..., workflow: _Optional[str] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("image", "step", "total", "preview")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_FIELD_NUMBER: _ClassVar[int]
    image: int
    step: int
    total: int
    preview: _images_pb2.EncodedImage
    def __init__(self, image: _Optional[int] = ..., step: _Optional[int] = ..., total: _Optional[int] = ..., preview: _Optional[_Union[_images_pb2.EncodedImage, _Mapping]] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("image", "content", "seed", "steps_without_loras")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STEPS_WITHOUT_LORAS_FIELD_NUMBER: _ClassVar[int]
    image: int
    content: _images_pb2.EncodedImage
    seed: int
    steps_without_loras: int
    def __init__(self, image: _Optional[int] = ..., content: _Optional[_Union[_images_pb2.EncodedImage, _Mapping]] = ..., seed: _Optional[int] = ..., steps_without_loras: _Optional[int] = ...) -> None: ...

class StageTiming(_message.Message):
    __slots__ = ("stage", "image", "replica", "wall", "forward", "wait", "attempts")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    WALL_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    stage: str
    image: int
    replica: str
    wall: _duration_pb2.Duration
    forward: _duration_pb2.Duration
    wait: _duration_pb2.Duration
    attempts: int
    def __init__(self, stage: _Optional[str] = ..., image: _Optional[int] = ..., replica: _Optional[str] = ..., wall: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., forward: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., wait: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., attempts: _Optional[int] = ...) -> None: ...

class ModelUse(_message.Message):
    __slots__ = ("name", "model", "content_digest")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    model: str
    content_digest: str
    def __init__(self, name: _Optional[str] = ..., model: _Optional[str] = ..., content_digest: _Optional[str] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("total", "queued", "stages", "models", "seed", "truncated", "negative_truncated", "width", "height", "steps", "guidance_scale", "sampler", "requested_steps")
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_FIELD_NUMBER: _ClassVar[int]
    REQUESTED_STEPS_FIELD_NUMBER: _ClassVar[int]
    total: _duration_pb2.Duration
    queued: _duration_pb2.Duration
    stages: _containers.RepeatedCompositeFieldContainer[StageTiming]
    models: _containers.RepeatedCompositeFieldContainer[ModelUse]
    seed: int
    truncated: str
    negative_truncated: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    sampler: str
    requested_steps: int
    def __init__(self, total: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., queued: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., stages: _Optional[_Iterable[_Union[StageTiming, _Mapping]]] = ..., models: _Optional[_Iterable[_Union[ModelUse, _Mapping]]] = ..., seed: _Optional[int] = ..., truncated: _Optional[str] = ..., negative_truncated: _Optional[str] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., steps: _Optional[int] = ..., guidance_scale: _Optional[float] = ..., sampler: _Optional[str] = ..., requested_steps: _Optional[int] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("accepted", "progress", "image", "done")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    accepted: Accepted
    progress: Progress
    image: Image
    done: Done
    def __init__(self, accepted: _Optional[_Union[Accepted, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., image: _Optional[_Union[Image, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ...) -> None: ...

class DescribeWorkflowRequest(_message.Message):
    __slots__ = ("workflow",)
    WORKFLOW_FIELD_NUMBER: _ClassVar[int]
    workflow: str
    def __init__(self, workflow: _Optional[str] = ...) -> None: ...

class UnusableAdapter(_message.Message):
    __slots__ = ("name", "problem")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    name: str
    problem: str
    def __init__(self, name: _Optional[str] = ..., problem: _Optional[str] = ...) -> None: ...

class WorkflowModel(_message.Message):
    __slots__ = ("name", "role", "model", "content_digest", "ready_replicas", "adapters", "nets", "unusable_adapters")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    READY_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    NETS_FIELD_NUMBER: _ClassVar[int]
    UNUSABLE_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    role: str
    model: str
    content_digest: str
    ready_replicas: int
    adapters: _containers.RepeatedScalarFieldContainer[str]
    nets: _containers.RepeatedScalarFieldContainer[str]
    unusable_adapters: _containers.RepeatedCompositeFieldContainer[UnusableAdapter]
    def __init__(self, name: _Optional[str] = ..., role: _Optional[str] = ..., model: _Optional[str] = ..., content_digest: _Optional[str] = ..., ready_replicas: _Optional[int] = ..., adapters: _Optional[_Iterable[str]] = ..., nets: _Optional[_Iterable[str]] = ..., unusable_adapters: _Optional[_Iterable[_Union[UnusableAdapter, _Mapping]]] = ...) -> None: ...

class DescribeWorkflowResponse(_message.Message):
    __slots__ = ("workflow", "task", "family", "models", "default_width", "default_height", "default_steps", "default_guidance_scale", "samplers", "size_multiple", "max_pixels", "max_steps", "max_images", "max_control_image_bytes", "max_prompt_tokens", "ready")
    WORKFLOW_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_WIDTH_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_HEIGHT_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_STEPS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    SAMPLERS_FIELD_NUMBER: _ClassVar[int]
    SIZE_MULTIPLE_FIELD_NUMBER: _ClassVar[int]
    MAX_PIXELS_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGES_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTROL_IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    workflow: str
    task: str
    family: str
    models: _containers.RepeatedCompositeFieldContainer[WorkflowModel]
    default_width: int
    default_height: int
    default_steps: int
    default_guidance_scale: float
    samplers: _containers.RepeatedScalarFieldContainer[str]
    size_multiple: int
    max_pixels: int
    max_steps: int
    max_images: int
    max_control_image_bytes: int
    max_prompt_tokens: int
    ready: bool
    def __init__(self, workflow: _Optional[str] = ..., task: _Optional[str] = ..., family: _Optional[str] = ..., models: _Optional[_Iterable[_Union[WorkflowModel, _Mapping]]] = ..., default_width: _Optional[int] = ..., default_height: _Optional[int] = ..., default_steps: _Optional[int] = ..., default_guidance_scale: _Optional[float] = ..., samplers: _Optional[_Iterable[str]] = ..., size_multiple: _Optional[int] = ..., max_pixels: _Optional[int] = ..., max_steps: _Optional[int] = ..., max_images: _Optional[int] = ..., max_control_image_bytes: _Optional[int] = ..., max_prompt_tokens: _Optional[int] = ..., ready: _Optional[bool] = ...) -> None: ...

class ListWorkflowsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListWorkflowsResponse(_message.Message):
    __slots__ = ("workflows",)
    WORKFLOWS_FIELD_NUMBER: _ClassVar[int]
    workflows: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, workflows: _Optional[_Iterable[str]] = ...) -> None: ...
