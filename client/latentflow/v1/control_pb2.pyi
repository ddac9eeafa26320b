import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_TEXT_ENCODER: _ClassVar[Role]
    ROLE_DENOISER: _ClassVar[Role]
    ROLE_CONTROL_NET: _ClassVar[Role]
    ROLE_LORA_STORE: _ClassVar[Role]
    ROLE_VAE: _ClassVar[Role]
ROLE_UNSPECIFIED: Role
ROLE_TEXT_ENCODER: Role
ROLE_DENOISER: Role
ROLE_CONTROL_NET: Role
ROLE_LORA_STORE: Role
ROLE_VAE: Role

class DescribeRequest(_message.Message):
    __slots__ = ("protocol_version",)
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    def __init__(self, protocol_version: _Optional[int] = ...) -> None: ...

class NamedShape(_message.Message):
    __slots__ = ("name", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class TokenizerDescription(_message.Message):
    __slots__ = ("max_tokens",)
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    def __init__(self, max_tokens: _Optional[int] = ...) -> None: ...

class TextEncoderDescription(_message.Message):
    __slots__ = ("tokenizers", "conditioning", "adapter_components")
    TOKENIZERS_FIELD_NUMBER: _ClassVar[int]
    CONDITIONING_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    tokenizers: _containers.RepeatedCompositeFieldContainer[TokenizerDescription]
    conditioning: _containers.RepeatedCompositeFieldContainer[NamedShape]
    adapter_components: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, tokenizers: _Optional[_Iterable[_Union[TokenizerDescription, _Mapping]]] = ..., conditioning: _Optional[_Iterable[_Union[NamedShape, _Mapping]]] = ..., adapter_components: _Optional[_Iterable[str]] = ...) -> None: ...

class DenoiserDescription(_message.Message):
    __slots__ = ("latent_channels", "conditioning", "samplers", "classifier_free_guidance", "adapter_components", "guidance_peers")
    LATENT_CHANNELS_FIELD_NUMBER: _ClassVar[int]
    CONDITIONING_FIELD_NUMBER: _ClassVar[int]
    SAMPLERS_FIELD_NUMBER: _ClassVar[int]
    CLASSIFIER_FREE_GUIDANCE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_PEERS_FIELD_NUMBER: _ClassVar[int]
    latent_channels: int
    conditioning: _containers.RepeatedCompositeFieldContainer[NamedShape]
    samplers: _containers.RepeatedScalarFieldContainer[str]
    classifier_free_guidance: bool
    adapter_components: _containers.RepeatedScalarFieldContainer[str]
    guidance_peers: bool
    def __init__(self, latent_channels: _Optional[int] = ..., conditioning: _Optional[_Iterable[_Union[NamedShape, _Mapping]]] = ..., samplers: _Optional[_Iterable[str]] = ..., classifier_free_guidance: _Optional[bool] = ..., adapter_components: _Optional[_Iterable[str]] = ..., guidance_peers: _Optional[bool] = ...) -> None: ...

class NetDescription(_message.Message):
    __slots__ = ("name", "content_digest", "problem")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    name: str
    content_digest: str
    problem: str
    def __init__(self, name: _Optional[str] = ..., content_digest: _Optional[str] = ..., problem: _Optional[str] = ...) -> None: ...

class ControlNetDescription(_message.Message):
    __slots__ = ("latent_channels", "conditioning", "nets")
    LATENT_CHANNELS_FIELD_NUMBER: _ClassVar[int]
    CONDITIONING_FIELD_NUMBER: _ClassVar[int]
    NETS_FIELD_NUMBER: _ClassVar[int]
    latent_channels: int
    conditioning: _containers.RepeatedCompositeFieldContainer[NamedShape]
    nets: _containers.RepeatedCompositeFieldContainer[NetDescription]
    def __init__(self, latent_channels: _Optional[int] = ..., conditioning: _Optional[_Iterable[_Union[NamedShape, _Mapping]]] = ..., nets: _Optional[_Iterable[_Union[NetDescription, _Mapping]]] = ...) -> None: ...

class AdapterDescription(_message.Message):
    __slots__ = ("name", "components", "digest", "rank", "problem")
    NAME_FIELD_NUMBER: _ClassVar[int]
    COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    name: str
    components: _containers.RepeatedScalarFieldContainer[str]
    digest: str
    rank: int
    problem: str
    def __init__(self, name: _Optional[str] = ..., components: _Optional[_Iterable[str]] = ..., digest: _Optional[str] = ..., rank: _Optional[int] = ..., problem: _Optional[str] = ...) -> None: ...

class LoRAStoreDescription(_message.Message):
    __slots__ = ("adapters",)
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[AdapterDescription]
    def __init__(self, adapters: _Optional[_Iterable[_Union[AdapterDescription, _Mapping]]] = ...) -> None: ...

class VAEDescription(_message.Message):
    __slots__ = ("scale_factor", "latent_channels")
    SCALE_FACTOR_FIELD_NUMBER: _ClassVar[int]
    LATENT_CHANNELS_FIELD_NUMBER: _ClassVar[int]
    scale_factor: int
    latent_channels: int
    def __init__(self, scale_factor: _Optional[int] = ..., latent_channels: _Optional[int] = ...) -> None: ...

class Device(_message.Message):
    __slots__ = ("kind", "uuid", "name", "total_bytes", "free_bytes", "used_bytes", "weights_bytes", "awake_peak_bytes", "asleep_bytes")
    KIND_FIELD_NUMBER: _ClassVar[int]
    UUID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    AWAKE_PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    ASLEEP_BYTES_FIELD_NUMBER: _ClassVar[int]
    kind: str
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    used_bytes: int
    weights_bytes: int
    awake_peak_bytes: int
    asleep_bytes: int
    def __init__(self, kind: _Optional[str] = ..., uuid: _Optional[str] = ..., name: _Optional[str] = ..., total_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., weights_bytes: _Optional[int] = ..., awake_peak_bytes: _Optional[int] = ..., asleep_bytes: _Optional[int] = ...) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("protocol_version", "role", "family", "content_digest", "boot_id", "model", "version", "max_running", "max_queued", "dtype", "devices", "text_encoder", "denoiser", "control_net", "lora_store", "vae")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    TEXT_ENCODER_FIELD_NUMBER: _ClassVar[int]
    DENOISER_FIELD_NUMBER: _ClassVar[int]
    CONTROL_NET_FIELD_NUMBER: _ClassVar[int]
    LORA_STORE_FIELD_NUMBER: _ClassVar[int]
    VAE_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    role: Role
    family: str
    content_digest: str
    boot_id: str
    model: str
    version: str
    max_running: int
    max_queued: int
    dtype: str
    devices: _containers.RepeatedCompositeFieldContainer[Device]
    text_encoder: TextEncoderDescription
    denoiser: DenoiserDescription
    control_net: ControlNetDescription
    lora_store: LoRAStoreDescription
    vae: VAEDescription
    def __init__(self, protocol_version: _Optional[int] = ..., role: _Optional[_Union[Role, str]] = ..., family: _Optional[str] = ..., content_digest: _Optional[str] = ..., boot_id: _Optional[str] = ..., model: _Optional[str] = ..., version: _Optional[str] = ..., max_running: _Optional[int] = ..., max_queued: _Optional[int] = ..., dtype: _Optional[str] = ..., devices: _Optional[_Iterable[_Union[Device, _Mapping]]] = ..., text_encoder: _Optional[_Union[TextEncoderDescription, _Mapping]] = ..., denoiser: _Optional[_Union[DenoiserDescription, _Mapping]] = ..., control_net: _Optional[_Union[ControlNetDescription, _Mapping]] = ..., lora_store: _Optional[_Union[LoRAStoreDescription, _Mapping]] = ..., vae: _Optional[_Union[VAEDescription, _Mapping]] = ...) -> None: ...

class WatchLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PassTime(_message.Message):
    __slots__ = ("rows", "height", "width", "seconds")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    rows: int
    height: int
    width: int
    seconds: float
    def __init__(self, rows: _Optional[int] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class WatchLoadResponse(_message.Message):
    __slots__ = ("running", "queued", "pass_times", "awake", "epoch", "draining", "adapters", "nets", "devices")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    PASS_TIMES_FIELD_NUMBER: _ClassVar[int]
    AWAKE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    NETS_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    running: int
    queued: int
    pass_times: _containers.RepeatedCompositeFieldContainer[PassTime]
    awake: bool
    epoch: int
    draining: bool
    adapters: _containers.RepeatedScalarFieldContainer[str]
    nets: _containers.RepeatedScalarFieldContainer[str]
    devices: _containers.RepeatedCompositeFieldContainer[Device]
    def __init__(self, running: _Optional[int] = ..., queued: _Optional[int] = ..., pass_times: _Optional[_Iterable[_Union[PassTime, _Mapping]]] = ..., awake: _Optional[bool] = ..., epoch: _Optional[int] = ..., draining: _Optional[bool] = ..., adapters: _Optional[_Iterable[str]] = ..., nets: _Optional[_Iterable[str]] = ..., devices: _Optional[_Iterable[_Union[Device, _Mapping]]] = ...) -> None: ...

class SleepRequest(_message.Message):
    __slots__ = ("epoch", "grace")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GRACE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    grace: _duration_pb2.Duration
    def __init__(self, epoch: _Optional[int] = ..., grace: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class SleepResponse(_message.Message):
    __slots__ = ("devices", "duration")
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    DURATION_FIELD_NUMBER: _ClassVar[int]
    devices: _containers.RepeatedCompositeFieldContainer[Device]
    duration: _duration_pb2.Duration
    def __init__(self, devices: _Optional[_Iterable[_Union[Device, _Mapping]]] = ..., duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class WakeRequest(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class WakeResponse(_message.Message):
    __slots__ = ("devices", "duration")
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    DURATION_FIELD_NUMBER: _ClassVar[int]
    devices: _containers.RepeatedCompositeFieldContainer[Device]
    duration: _duration_pb2.Duration
    def __init__(self, devices: _Optional[_Iterable[_Union[Device, _Mapping]]] = ..., duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("grace",)
    GRACE_FIELD_NUMBER: _ClassVar[int]
    grace: _duration_pb2.Duration
    def __init__(self, grace: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
