"""The reasons of errors: constant words that programs test and people look up, each with its meaning and its remedy.

The class of an error determines how a program handles it; its reason names the cause. `docs/errors.md` is generated from
this module.
"""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Documented", "Reason"]


class Documented(StrEnum):
    """Base of enums of reasons. A member is the word itself; its `meaning` and `remedy` are whole sentences."""

    meaning: str
    remedy: str

    def __new__(cls, value: str, meaning: str, remedy: str) -> Documented:
        member = str.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        member.remedy = remedy
        return member


class Reason(Documented):
    """Why a call, or the start of a process, failed. The value of a member is its name."""

    # What the caller has to change.
    INVALID_REQUEST = (
        "INVALID_REQUEST",
        "An argument of the request is impossible: of the wrong type, out of range, or unreadable.",
        "Correct the argument that the message names. The same request fails again.",
    )
    INVALID_WORKFLOW = (
        "INVALID_WORKFLOW",
        "A DiffusionWorkflow file does not follow the workflow API.",
        "Correct the fields that the message lists. `latentflow validate FILE` checks a file without starting anything.",
    )
    PROMPT_TOO_LONG = (
        "PROMPT_TOO_LONG",
        "The prompt has more tokens than the model's text encoder reads, and the request forbids cutting it.",
        "Shorten the prompt, or send the request without `strict_prompt`.",
    )
    NOT_FOUND = (
        "NOT_FOUND",
        "Something that the request or the command names does not exist.",
        "Choose one of the names that the message lists.",
    )
    UNKNOWN_WORKFLOW = (
        "UNKNOWN_WORKFLOW",
        "The gateway serves no workflow of this name, or serves several and the request names none.",
        "Choose one of the workflows that the message lists.",
    )
    UNKNOWN_MODEL = (
        "UNKNOWN_MODEL",
        "The request has a control image for a ControlNet that the workflow does not have, or for a net that the ControlNet "
        "does not have.",
        "Choose one of the ControlNets and nets that the message or `latentflow describe` lists.",
    )
    UNKNOWN_ADAPTER = (
        "UNKNOWN_ADAPTER",
        "The workflow's LoRA store has no LoRA of this name, or the workflow has no LoRA store.",
        "Choose one of the LoRAs that the message or `latentflow describe` lists.",
    )
    UNKNOWN_SAMPLER = (
        "UNKNOWN_SAMPLER",
        "The workflow's denoiser has no sampler of this name.",
        "Choose one of the samplers that the message or `latentflow describe` lists.",
    )
    IDEMPOTENCY_CONFLICT = (
        "IDEMPOTENCY_CONFLICT",
        "The request's idempotency key belongs to an earlier request with other arguments.",
        "Use a new key for every request, and an old one only to send the same request again.",
    )
    API_KEY_MISSING = (
        "API_KEY_MISSING",
        "The gateway requires an API key, and the call carries none, or not in the form `Bearer KEY`.",
        "Pass `api_key` to the client or `--api-key` to the command, set LATENTFLOW_API_KEY, or over HTTP send the header "
        "`Authorization: Bearer KEY`.",
    )
    API_KEY_UNKNOWN = (
        "API_KEY_UNKNOWN",
        "The call carries an API key that the gateway does not accept, perhaps because it has been replaced.",
        "Ask the administrator of the gateway for the current key.",
    )
    UNAUTHENTICATED = (
        "UNAUTHENTICATED",
        "A model server was called without the token that the servers share.",
        "Set LATENTFLOW_TOKEN to the same value for every gateway and model server. Clients call the gateway only.",
    )
    DEADLINE_EXCEEDED = (
        "DEADLINE_EXCEEDED",
        "The request was not finished by its deadline: the client's timeout, or the gateway's longest time for a request.",
        "Use a longer timeout, fewer steps or a smaller image, or add replicas to the models that are the bottleneck.",
    )
    CANCELLED = (
        "CANCELLED",
        "The caller cancelled the request or closed its connection.",
        "Nothing has to be done.",
    )

    # What passes, so that the same request may be sent again.
    QUEUE_FULL = (
        "QUEUE_FULL",
        "The bounded queue of the gateway or of a model server is full.",
        "Send the request again after the delay that the error carries; the client does. If it persists, add replicas.",
    )
    UNAVAILABLE = (
        "UNAVAILABLE",
        "A server is not reachable, or it cannot serve the call now.",
        "Send the request again; the client does. If it persists, see whether the servers run, and their logs.",
    )
    DRAINING = (
        "DRAINING",
        "The server is ending: it finishes its running calls and admits no new ones.",
        "Send the request again; the client does, and another replica serves it.",
    )
    ASLEEP = (
        "ASLEEP",
        "The weights of the model server are not on its device, or are about to leave it.",
        "Send the request again; the client does. Another replica serves it, or this one after its Wake.",
    )
    DEVICE_FULL = (
        "DEVICE_FULL",
        "The device of a sleeping model server has too little free memory for its weights and the first forward pass.",
        "Put another server on the device to sleep, then repeat the Wake. Until then the server stays asleep.",
    )
    GATEWAY_UNREACHABLE = (
        "GATEWAY_UNREACHABLE",
        "No gateway responds at the client's target.",
        "Start one with `latentflow up FILE`, or correct the target. Behind TLS, pass the CA certificate.",
    )
    MODEL_NOT_READY = (
        "MODEL_NOT_READY",
        "A model that the request uses had no ready replica for as long as the gateway waits for one.",
        "Send the request again if the model is starting. If it persists, read the model's status and its servers' logs.",
    )
    PEER_UNAVAILABLE = (
        "PEER_UNAVAILABLE",
        "A model server could not use a peer that the request needs, such as a ControlNet or the LoRA store.",
        "The gateway tries other replicas. If it persists, see whether the peer runs and whether a NetworkPolicy separates "
        "the two.",
    )
    STAGE_BROKEN_OFF = (
        "STAGE_BROKEN_OFF",
        "A model server ended while it ran a stage of the request.",
        "The gateway runs the stage again. If it persists, the servers restart repeatedly: read their logs.",
    )
    OWNER_LOST = (
        "OWNER_LOST",
        "The server that held a tensor of the request has restarted or is gone.",
        "The gateway runs the stage that made the tensor again. If it persists, the servers restart repeatedly: read their "
        "logs.",
    )

    # What has to be corrected in a workflow, its weights or an installation.
    FAILED_PRECONDITION = (
        "FAILED_PRECONDITION",
        "The server, or a file that it needs, is not in the state that the call requires.",
        "Correct what the message names.",
    )
    WEIGHTS_UNAVAILABLE = (
        "WEIGHTS_UNAVAILABLE",
        "A model's weights cannot be fetched or loaded: the source is wrong, incomplete, or needs credentials.",
        "Correct the source in the workflow. docs/weights.md lists the kinds of sources and their credentials.",
    )
    WEIGHTS_MISMATCH = (
        "WEIGHTS_MISMATCH",
        "A file of weights has other tensors than its configuration describes: some are missing, unexpected or of another "
        "shape. Or two replicas of one model have different weights.",
        "Fetch the folder again, or convert the weights, for instance with diffusers' `save_pretrained`.",
    )
    PICKLE_REFUSED = (
        "PICKLE_REFUSED",
        "A model's weights are a pickle, which can run code when it is loaded.",
        "Convert them to safetensors; docs/weights.md has a program for it.",
    )
    DATA_LOSS = (
        "DATA_LOSS",
        "A file or a message is damaged or incomplete.",
        "Fetch the file again, or send the request again.",
    )
    UNSUPPORTED_FAMILY = (
        "UNSUPPORTED_FAMILY",
        "The source is a pipeline of a family that this version does not serve.",
        "Use a model of one of the families that the message lists.",
    )
    NOT_FINITE = (
        "NOT_FINITE",
        "The values of a request overflowed: its embeddings, latents or image contain infinity or NaN.",
        "Lower the weights of LoRAs, the scales of ControlNets or the guidance, or give the models `dtype: bfloat16` or "
        "`float32`.",
    )
    OUT_OF_MEMORY = (
        "OUT_OF_MEMORY",
        "The memory of the server's device does not suffice for the request, even without other requests beside it.",
        "Request a smaller image, or give the model a device with more memory or a half-precision dtype.",
    )
    FAMILY_MISMATCH = (
        "FAMILY_MISMATCH",
        "Models of one workflow belong to different families.",
        "Correct the sources in the workflow, so that all its models belong to the denoiser's family.",
    )
    TEXT_ENCODER_MISMATCH = (
        "TEXT_ENCODER_MISMATCH",
        "The text encoder's embeddings have another width than the denoiser takes.",
        "Correct the source of the TextEncoder or of the Denoiser; take both from one pipeline.",
    )
    CONTROLNET_MISMATCH = (
        "CONTROLNET_MISMATCH",
        "The ControlNet was trained for another base model than the workflow's denoiser.",
        "Use a ControlNet for this base model.",
    )
    GUIDANCE_EMBEDDED = (
        "GUIDANCE_EMBEDDED",
        "The model takes the guidance scale as an input, so its steps have no two halves that two replicas could compute.",
        "Set `parallelism.latent: 1` for the model.",
    )
    ADAPTER_MISMATCH = (
        "ADAPTER_MISMATCH",
        "The LoRA changes layers that the model does not have, or that have another shape there.",
        "Use a LoRA that was trained for this base model.",
    )
    ADAPTER_UNREADABLE = (
        "ADAPTER_UNREADABLE",
        "A file of the LoRA store is damaged, or is no LoRA of a format that the store supports.",
        "Replace or convert the file that the message names.",
    )
    ADAPTER_CHANGED = (
        "ADAPTER_CHANGED",
        "The LoRA's file was replaced or removed during the request, and the LoRA store no longer holds the earlier version.",
        "Send the request again; it then uses the new file.",
    )
    PROTOCOL_MISMATCH = (
        "PROTOCOL_MISMATCH",
        "Two servers have versions of the wire protocol that are more than one apart.",
        "Upgrade the older of the two.",
    )
    STALE_EPOCH = (
        "STALE_EPOCH",
        "A Sleep or Wake is older than another decision about the same model server.",
        "Make a decision with a greater epoch; WatchLoad reports the epoch in effect. Only one scheduler may decide.",
    )
    SHARED_MEMORY_UNUSABLE = (
        "SHARED_MEMORY_UNUSABLE",
        "A model server cannot use its folder of shared memory.",
        "Mount a folder that all servers of the pod may write to as one user, or leave `--shared-memory` out.",
    )
    DEVICE_UNAVAILABLE = (
        "DEVICE_UNAVAILABLE",
        "A model server cannot use the device of its model.",
        "Check the driver and the number of the GPU, or give the model another device.",
    )
    TENSOR_DEGREE = (
        "TENSOR_DEGREE",
        "A model's weights cannot be divided among as many ranks as `parallelism.tensor` requires: its attention heads, groups "
        "or features are no multiple of it.",
        "Set `parallelism.tensor` to one of the degrees that the message lists.",
    )
    RANK_FAILED = (
        "RANK_FAILED",
        "A process that holds a part of a model's weights (`parallelism.tensor`) ended, or was not ready in time.",
        "Read the log of the rank that the message names.",
    )
    PORT_TAKEN = (
        "PORT_TAKEN",
        "A server cannot listen on its address.",
        "Stop the process that uses the port, or choose another address.",
    )
    NOT_READY = (
        "NOT_READY",
        "`latentflow up` gave up because a process was not ready in time.",
        "Read the log of the process that the message names.",
    )
    PROCESS_FAILED = (
        "PROCESS_FAILED",
        "A process of `latentflow up` cannot serve its model, and starting it again would change nothing.",
        "Correct what the last line that the process printed names.",
    )
    UNIMPLEMENTED = (
        "UNIMPLEMENTED",
        "This server or this version does not serve the call.",
        "Use a version that does. A model server that is called for another role has a wrong entry in the directory.",
    )

    # Defects.
    INTERNAL = (
        "INTERNAL",
        "The server failed in a way that it should not.",
        "Read the server's log, which has the traceback, and report the defect.",
    )
    UNKNOWN = (
        "UNKNOWN",
        "The error belongs to none of the classes of this project.",
        "Read the message.",
    )
