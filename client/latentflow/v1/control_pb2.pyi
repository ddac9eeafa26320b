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

class TokenizerDescription(_message.Message):
    __slots__ = ("max_tokens",)
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    def __init__(self, max_tokens: _Optional[int] = ...) -> None: ...

class TextEncoderDescription(_message.Message):
    __slots__ = ("tokenizers",)
    TOKENIZERS_FIELD_NUMBER: _ClassVar[int]
    tokenizers: _containers.RepeatedCompositeFieldContainer[TokenizerDescription]
    def __init__(self, tokenizers: _Optional[_Iterable[_Union[TokenizerDescription, _Mapping]]] = ...) -> None: ...

class DenoiserDescription(_message.Message):
    __slots__ = ("latent_channels", "cross_attention_dim", "prediction_type", "samplers", "classifier_free_guidance")
    LATENT_CHANNELS_FIELD_NUMBER: _ClassVar[int]
    CROSS_ATTENTION_DIM_FIELD_NUMBER: _ClassVar[int]
    PREDICTION_TYPE_FIELD_NUMBER: _ClassVar[int]
    SAMPLERS_FIELD_NUMBER: _ClassVar[int]
    CLASSIFIER_FREE_GUIDANCE_FIELD_NUMBER: _ClassVar[int]
    latent_channels: int
    cross_attention_dim: int
    prediction_type: str
    samplers: _containers.RepeatedScalarFieldContainer[str]
    classifier_free_guidance: bool
    def __init__(self, latent_channels: _Optional[int] = ..., cross_attention_dim: _Optional[int] = ..., prediction_type: _Optional[str] = ..., samplers: _Optional[_Iterable[str]] = ..., classifier_free_guidance: _Optional[bool] = ...) -> None: ...

class ControlNetDescription(_message.Message):
    __slots__ = ("cross_attention_dim", "latent_channels", "residual_channels")
    CROSS_ATTENTION_DIM_FIELD_NUMBER: _ClassVar[int]
    LATENT_CHANNELS_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_CHANNELS_FIELD_NUMBER: _ClassVar[int]
    cross_attention_dim: int
    latent_channels: int
    residual_channels: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, cross_attention_dim: _Optional[int] = ..., latent_channels: _Optional[int] = ..., residual_channels: _Optional[_Iterable[int]] = ...) -> None: ...

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

class DescribeResponse(_message.Message):
    __slots__ = ("protocol_version", "role", "family", "content_digest", "boot_id", "model", "version", "max_running", "max_waiting", "dtype", "device", "text_encoder", "denoiser", "control_net", "lora_store", "vae")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    MAX_WAITING_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
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
    max_waiting: int
    dtype: str
    device: str
    text_encoder: TextEncoderDescription
    denoiser: DenoiserDescription
    control_net: ControlNetDescription
    lora_store: LoRAStoreDescription
    vae: VAEDescription
    def __init__(self, protocol_version: _Optional[int] = ..., role: _Optional[_Union[Role, str]] = ..., family: _Optional[str] = ..., content_digest: _Optional[str] = ..., boot_id: _Optional[str] = ..., model: _Optional[str] = ..., version: _Optional[str] = ..., max_running: _Optional[int] = ..., max_waiting: _Optional[int] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., text_encoder: _Optional[_Union[TextEncoderDescription, _Mapping]] = ..., denoiser: _Optional[_Union[DenoiserDescription, _Mapping]] = ..., control_net: _Optional[_Union[ControlNetDescription, _Mapping]] = ..., lora_store: _Optional[_Union[LoRAStoreDescription, _Mapping]] = ..., vae: _Optional[_Union[VAEDescription, _Mapping]] = ...) -> None: ...

class SleepRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SleepResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WakeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WakeResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("grace",)
    GRACE_FIELD_NUMBER: _ClassVar[int]
    grace: _duration_pb2.Duration
    def __init__(self, grace: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
