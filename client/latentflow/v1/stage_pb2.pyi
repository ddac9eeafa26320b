import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from latentflow.v1 import images_pb2 as _images_pb2
from latentflow.v1 import tensors_pb2 as _tensors_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GuidanceHalf(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GUIDANCE_HALF_UNSPECIFIED: _ClassVar[GuidanceHalf]
    GUIDANCE_HALF_POSITIVE: _ClassVar[GuidanceHalf]
    GUIDANCE_HALF_NEGATIVE: _ClassVar[GuidanceHalf]
    GUIDANCE_HALF_BOTH: _ClassVar[GuidanceHalf]
GUIDANCE_HALF_UNSPECIFIED: GuidanceHalf
GUIDANCE_HALF_POSITIVE: GuidanceHalf
GUIDANCE_HALF_NEGATIVE: GuidanceHalf
GUIDANCE_HALF_BOTH: GuidanceHalf

class Peer(_message.Message):
    __slots__ = ("address", "model", "content_digest")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    address: str
    model: str
    content_digest: str
    def __init__(self, address: _Optional[str] = ..., model: _Optional[str] = ..., content_digest: _Optional[str] = ...) -> None: ...

class Scheduling(_message.Message):
    __slots__ = ("priority", "time_left", "deterministic")
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TIME_LEFT_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    priority: int
    time_left: _duration_pb2.Duration
    deterministic: bool
    def __init__(self, priority: _Optional[int] = ..., time_left: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., deterministic: _Optional[bool] = ...) -> None: ...

class AdapterRef(_message.Message):
    __slots__ = ("name", "weight", "store", "digest", "async_steps")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ASYNC_STEPS_FIELD_NUMBER: _ClassVar[int]
    name: str
    weight: float
    store: Peer
    digest: str
    async_steps: int
    def __init__(self, name: _Optional[str] = ..., weight: _Optional[float] = ..., store: _Optional[_Union[Peer, _Mapping]] = ..., digest: _Optional[str] = ..., async_steps: _Optional[int] = ...) -> None: ...

class ControlNetRef(_message.Message):
    __slots__ = ("peer", "image", "scale", "start", "end", "net", "guess_mode", "stale")
    PEER_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    NET_FIELD_NUMBER: _ClassVar[int]
    GUESS_MODE_FIELD_NUMBER: _ClassVar[int]
    STALE_FIELD_NUMBER: _ClassVar[int]
    peer: Peer
    image: _images_pb2.EncodedImage
    scale: float
    start: float
    end: float
    net: str
    guess_mode: bool
    stale: bool
    def __init__(self, peer: _Optional[_Union[Peer, _Mapping]] = ..., image: _Optional[_Union[_images_pb2.EncodedImage, _Mapping]] = ..., scale: _Optional[float] = ..., start: _Optional[float] = ..., end: _Optional[float] = ..., net: _Optional[str] = ..., guess_mode: _Optional[bool] = ..., stale: _Optional[bool] = ...) -> None: ...

class EncodeRequest(_message.Message):
    __slots__ = ("request_id", "prompt", "negative_prompt", "guidance", "adapters", "strict_prompt", "scheduling")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    STRICT_PROMPT_FIELD_NUMBER: _ClassVar[int]
    SCHEDULING_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt: str
    negative_prompt: str
    guidance: bool
    adapters: _containers.RepeatedCompositeFieldContainer[AdapterRef]
    strict_prompt: bool
    scheduling: Scheduling
    def __init__(self, request_id: _Optional[str] = ..., prompt: _Optional[str] = ..., negative_prompt: _Optional[str] = ..., guidance: _Optional[bool] = ..., adapters: _Optional[_Iterable[_Union[AdapterRef, _Mapping]]] = ..., strict_prompt: _Optional[bool] = ..., scheduling: _Optional[_Union[Scheduling, _Mapping]] = ...) -> None: ...

class EncodeResponse(_message.Message):
    __slots__ = ("conditioning", "truncated", "negative_truncated", "forward_ns")
    class ConditioningEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _tensors_pb2.Tensor
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_tensors_pb2.Tensor, _Mapping]] = ...) -> None: ...
    CONDITIONING_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    FORWARD_NS_FIELD_NUMBER: _ClassVar[int]
    conditioning: _containers.MessageMap[str, _tensors_pb2.Tensor]
    truncated: str
    negative_truncated: str
    forward_ns: int
    def __init__(self, conditioning: _Optional[_Mapping[str, _tensors_pb2.Tensor]] = ..., truncated: _Optional[str] = ..., negative_truncated: _Optional[str] = ..., forward_ns: _Optional[int] = ...) -> None: ...

class DenoiseOpen(_message.Message):
    __slots__ = ("request_id", "conditioning", "width", "height", "scale_factor", "steps", "guidance_scale", "sampler", "seed", "eta", "control_nets", "adapters", "guidance_peer", "checkpoint", "checkpoint_interval", "preview_interval", "scheduling")
    class ConditioningEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _tensors_pb2.Tensor
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_tensors_pb2.Tensor, _Mapping]] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CONDITIONING_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    SCALE_FACTOR_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    ETA_FIELD_NUMBER: _ClassVar[int]
    CONTROL_NETS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_PEER_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    SCHEDULING_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    conditioning: _containers.MessageMap[str, _tensors_pb2.Tensor]
    width: int
    height: int
    scale_factor: int
    steps: int
    guidance_scale: float
    sampler: str
    seed: int
    eta: float
    control_nets: _containers.RepeatedCompositeFieldContainer[ControlNetRef]
    adapters: _containers.RepeatedCompositeFieldContainer[AdapterRef]
    guidance_peer: Peer
    checkpoint: bytes
    checkpoint_interval: int
    preview_interval: int
    scheduling: Scheduling
    def __init__(self, request_id: _Optional[str] = ..., conditioning: _Optional[_Mapping[str, _tensors_pb2.Tensor]] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., scale_factor: _Optional[int] = ..., steps: _Optional[int] = ..., guidance_scale: _Optional[float] = ..., sampler: _Optional[str] = ..., seed: _Optional[int] = ..., eta: _Optional[float] = ..., control_nets: _Optional[_Iterable[_Union[ControlNetRef, _Mapping]]] = ..., adapters: _Optional[_Iterable[_Union[AdapterRef, _Mapping]]] = ..., guidance_peer: _Optional[_Union[Peer, _Mapping]] = ..., checkpoint: _Optional[bytes] = ..., checkpoint_interval: _Optional[int] = ..., preview_interval: _Optional[int] = ..., scheduling: _Optional[_Union[Scheduling, _Mapping]] = ...) -> None: ...

class DenoiseGuidance(_message.Message):
    __slots__ = ("peer",)
    PEER_FIELD_NUMBER: _ClassVar[int]
    peer: Peer
    def __init__(self, peer: _Optional[_Union[Peer, _Mapping]] = ...) -> None: ...

class DenoiseStop(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DenoiseRequest(_message.Message):
    __slots__ = ("open", "guidance", "stop")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    open: DenoiseOpen
    guidance: DenoiseGuidance
    stop: DenoiseStop
    def __init__(self, open: _Optional[_Union[DenoiseOpen, _Mapping]] = ..., guidance: _Optional[_Union[DenoiseGuidance, _Mapping]] = ..., stop: _Optional[_Union[DenoiseStop, _Mapping]] = ...) -> None: ...

class Checkpoint(_message.Message):
    __slots__ = ("state", "step")
    STATE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    state: bytes
    step: int
    def __init__(self, state: _Optional[bytes] = ..., step: _Optional[int] = ...) -> None: ...

class DenoiseProgress(_message.Message):
    __slots__ = ("step", "total", "preview", "checkpoint")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    step: int
    total: int
    preview: _images_pb2.EncodedImage
    checkpoint: Checkpoint
    def __init__(self, step: _Optional[int] = ..., total: _Optional[int] = ..., preview: _Optional[_Union[_images_pb2.EncodedImage, _Mapping]] = ..., checkpoint: _Optional[_Union[Checkpoint, _Mapping]] = ...) -> None: ...

class DenoiseGuidanceChanged(_message.Message):
    __slots__ = ("address", "reason")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    address: str
    reason: str
    def __init__(self, address: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class DenoiseResult(_message.Message):
    __slots__ = ("latents", "forward_ns", "wait_ns", "residuals_wait_ns", "steps_without_adapters")
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    FORWARD_NS_FIELD_NUMBER: _ClassVar[int]
    WAIT_NS_FIELD_NUMBER: _ClassVar[int]
    RESIDUALS_WAIT_NS_FIELD_NUMBER: _ClassVar[int]
    STEPS_WITHOUT_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    latents: _tensors_pb2.Tensor
    forward_ns: int
    wait_ns: int
    residuals_wait_ns: int
    steps_without_adapters: int
    def __init__(self, latents: _Optional[_Union[_tensors_pb2.Tensor, _Mapping]] = ..., forward_ns: _Optional[int] = ..., wait_ns: _Optional[int] = ..., residuals_wait_ns: _Optional[int] = ..., steps_without_adapters: _Optional[int] = ...) -> None: ...

class DenoiseStopped(_message.Message):
    __slots__ = ("checkpoint", "forward_ns", "wait_ns", "residuals_wait_ns")
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    FORWARD_NS_FIELD_NUMBER: _ClassVar[int]
    WAIT_NS_FIELD_NUMBER: _ClassVar[int]
    RESIDUALS_WAIT_NS_FIELD_NUMBER: _ClassVar[int]
    checkpoint: Checkpoint
    forward_ns: int
    wait_ns: int
    residuals_wait_ns: int
    def __init__(self, checkpoint: _Optional[_Union[Checkpoint, _Mapping]] = ..., forward_ns: _Optional[int] = ..., wait_ns: _Optional[int] = ..., residuals_wait_ns: _Optional[int] = ...) -> None: ...

class DenoiseResponse(_message.Message):
    __slots__ = ("progress", "result", "stopped", "guidance")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    STOPPED_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_FIELD_NUMBER: _ClassVar[int]
    progress: DenoiseProgress
    result: DenoiseResult
    stopped: DenoiseStopped
    guidance: DenoiseGuidanceChanged
    def __init__(self, progress: _Optional[_Union[DenoiseProgress, _Mapping]] = ..., result: _Optional[_Union[DenoiseResult, _Mapping]] = ..., stopped: _Optional[_Union[DenoiseStopped, _Mapping]] = ..., guidance: _Optional[_Union[DenoiseGuidanceChanged, _Mapping]] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("request_id", "latents", "scheduling")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    SCHEDULING_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    latents: _tensors_pb2.Tensor
    scheduling: Scheduling
    def __init__(self, request_id: _Optional[str] = ..., latents: _Optional[_Union[_tensors_pb2.Tensor, _Mapping]] = ..., scheduling: _Optional[_Union[Scheduling, _Mapping]] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("image", "forward_ns")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    FORWARD_NS_FIELD_NUMBER: _ClassVar[int]
    image: _images_pb2.EncodedImage
    forward_ns: int
    def __init__(self, image: _Optional[_Union[_images_pb2.EncodedImage, _Mapping]] = ..., forward_ns: _Optional[int] = ...) -> None: ...

class AdapterRequest(_message.Message):
    __slots__ = ("request_id", "name", "component", "digest")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    COMPONENT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    name: str
    component: str
    digest: str
    def __init__(self, request_id: _Optional[str] = ..., name: _Optional[str] = ..., component: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

class AdapterResponse(_message.Message):
    __slots__ = ("chunk",)
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    chunk: _tensors_pb2.TensorChunk
    def __init__(self, chunk: _Optional[_Union[_tensors_pb2.TensorChunk, _Mapping]] = ...) -> None: ...

class ResidualsOpen(_message.Message):
    __slots__ = ("request_id", "conditioning", "half", "image", "width", "height", "net", "guess_mode", "content_digest", "scheduling")
    class ConditioningEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _tensors_pb2.Tensor
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_tensors_pb2.Tensor, _Mapping]] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CONDITIONING_FIELD_NUMBER: _ClassVar[int]
    HALF_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    NET_FIELD_NUMBER: _ClassVar[int]
    GUESS_MODE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SCHEDULING_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    conditioning: _containers.MessageMap[str, _tensors_pb2.Tensor]
    half: GuidanceHalf
    image: _images_pb2.EncodedImage
    width: int
    height: int
    net: str
    guess_mode: bool
    content_digest: str
    scheduling: Scheduling
    def __init__(self, request_id: _Optional[str] = ..., conditioning: _Optional[_Mapping[str, _tensors_pb2.Tensor]] = ..., half: _Optional[_Union[GuidanceHalf, str]] = ..., image: _Optional[_Union[_images_pb2.EncodedImage, _Mapping]] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., net: _Optional[str] = ..., guess_mode: _Optional[bool] = ..., content_digest: _Optional[str] = ..., scheduling: _Optional[_Union[Scheduling, _Mapping]] = ...) -> None: ...

class ResidualsStep(_message.Message):
    __slots__ = ("step", "timestep", "sample", "scale", "shared_memory")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TIMESTEP_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    step: int
    timestep: float
    sample: _tensors_pb2.Tensor
    scale: float
    shared_memory: str
    def __init__(self, step: _Optional[int] = ..., timestep: _Optional[float] = ..., sample: _Optional[_Union[_tensors_pb2.Tensor, _Mapping]] = ..., scale: _Optional[float] = ..., shared_memory: _Optional[str] = ...) -> None: ...

class ResidualsRequest(_message.Message):
    __slots__ = ("open", "step")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    open: ResidualsOpen
    step: ResidualsStep
    def __init__(self, open: _Optional[_Union[ResidualsOpen, _Mapping]] = ..., step: _Optional[_Union[ResidualsStep, _Mapping]] = ...) -> None: ...

class ResidualsResponse(_message.Message):
    __slots__ = ("step", "chunk", "forward_ns", "opened")
    STEP_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    FORWARD_NS_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    step: int
    chunk: _tensors_pb2.TensorChunk
    forward_ns: int
    opened: bool
    def __init__(self, step: _Optional[int] = ..., chunk: _Optional[_Union[_tensors_pb2.TensorChunk, _Mapping]] = ..., forward_ns: _Optional[int] = ..., opened: _Optional[bool] = ...) -> None: ...

class PredictNoiseOpen(_message.Message):
    __slots__ = ("request_id", "conditioning", "width", "height", "half", "control_nets", "adapters", "total", "content_digest", "scheduling")
    class ConditioningEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _tensors_pb2.Tensor
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_tensors_pb2.Tensor, _Mapping]] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CONDITIONING_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    HALF_FIELD_NUMBER: _ClassVar[int]
    CONTROL_NETS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SCHEDULING_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    conditioning: _containers.MessageMap[str, _tensors_pb2.Tensor]
    width: int
    height: int
    half: GuidanceHalf
    control_nets: _containers.RepeatedCompositeFieldContainer[ControlNetRef]
    adapters: _containers.RepeatedCompositeFieldContainer[AdapterRef]
    total: int
    content_digest: str
    scheduling: Scheduling
    def __init__(self, request_id: _Optional[str] = ..., conditioning: _Optional[_Mapping[str, _tensors_pb2.Tensor]] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., half: _Optional[_Union[GuidanceHalf, str]] = ..., control_nets: _Optional[_Iterable[_Union[ControlNetRef, _Mapping]]] = ..., adapters: _Optional[_Iterable[_Union[AdapterRef, _Mapping]]] = ..., total: _Optional[int] = ..., content_digest: _Optional[str] = ..., scheduling: _Optional[_Union[Scheduling, _Mapping]] = ...) -> None: ...

class PredictNoiseStep(_message.Message):
    __slots__ = ("step", "timestep", "sample", "shared_memory", "adapters")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TIMESTEP_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    step: int
    timestep: float
    sample: _tensors_pb2.Tensor
    shared_memory: str
    adapters: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, step: _Optional[int] = ..., timestep: _Optional[float] = ..., sample: _Optional[_Union[_tensors_pb2.Tensor, _Mapping]] = ..., shared_memory: _Optional[str] = ..., adapters: _Optional[_Iterable[int]] = ...) -> None: ...

class PredictNoiseRequest(_message.Message):
    __slots__ = ("open", "step")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    open: PredictNoiseOpen
    step: PredictNoiseStep
    def __init__(self, open: _Optional[_Union[PredictNoiseOpen, _Mapping]] = ..., step: _Optional[_Union[PredictNoiseStep, _Mapping]] = ...) -> None: ...

class PredictNoiseResponse(_message.Message):
    __slots__ = ("step", "chunk", "forward_ns", "opened")
    STEP_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    FORWARD_NS_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    step: int
    chunk: _tensors_pb2.TensorChunk
    forward_ns: int
    opened: bool
    def __init__(self, step: _Optional[int] = ..., chunk: _Optional[_Union[_tensors_pb2.TensorChunk, _Mapping]] = ..., forward_ns: _Optional[int] = ..., opened: _Optional[bool] = ...) -> None: ...
