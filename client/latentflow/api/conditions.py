"""The reasons of conditions: the words in the status of workflows and models, each with its meaning and its remedy.

Programs may test these words. `docs/status.md` contains the table that is generated from here. A reason that Kubernetes reports
for a pod and that has no member here is passed on unchanged.
"""

from __future__ import annotations

from latentflow.reasons import Documented

__all__ = ["ConditionReason"]

_WAIT = "Wait."
_NOTHING = "No action is needed."
_FOLLOW_MESSAGE = "Follow the message."


class ConditionReason(Documented):
    """Why a condition has its status."""

    # The expected state.
    ALL_MODELS_READY = ("AllModelsReady", "Every model of the workflow accepts requests.", _NOTHING)
    REPLICAS_READY = ("ReplicasReady", "At least one replica of the model accepts requests.", _NOTHING)
    WEIGHTS_LOADED = ("WeightsLoaded", "A server has loaded the weights.", _NOTHING)
    PODS_SCHEDULED = ("PodsScheduled", "Every pod has a node.", _NOTHING)
    AS_EXPECTED = ("AsExpected", "The condition has nothing to report.", _NOTHING)
    FIELDS_WITHOUT_EFFECT = (
        "FieldsWithoutEffect",
        "The workflow has fields that this version accepts and that have no effect yet. The message names them.",
        _NOTHING,
    )
    SCALED_TO_ZERO = ("ScaledToZero", "The model has no replicas. The next request starts one.", _NOTHING)

    # Progress.
    STARTING = ("Starting", "The pods are being created, or load and warm up their models.", _WAIT)
    REPLICAS_STARTING = ("ReplicasStarting", "Fewer replicas accept requests than the model should have.", _WAIT)
    MODELS_STARTING = ("ModelsStarting", "A model of the workflow does not accept requests yet.", _WAIT)
    DOWNLOADING = (
        "Downloading",
        "A server downloads its weights. The message contains the progress, updated every few seconds.",
        _WAIT,
    )
    ROLLING_OUT = (
        "RollingOut",
        "A changed model is starting. The previous one serves until the changed one is ready.",
        _WAIT,
    )

    # The spec or the cluster has to be corrected.
    MODELS_NOT_READY = (
        "ModelsNotReady",
        "At least one model of the workflow does not accept requests.",
        "Follow the reason and the message of Ready.",
    )
    MODEL_NOT_FOUND = (
        "ModelNotFound",
        "`modelRef` names a DiffusionModel that does not exist in the namespace.",
        "Create it, or give the model a source.",
    )
    SHARED_SETTINGS_CONFLICT = (
        "SharedSettingsConflict",
        "An older workflow that shares the model has another value for a setting. The older workflow's value is used.",
        "Use the same value in both workflows, or change the model so that it is not shared.",
    )
    NO_REPLICAS = (
        "NoReplicas",
        "The model was scaled to no replicas, and no scheduler starts one: it is `External`, or the chart has no "
        "`scaling.prometheus`.",
        "Scale it up with `kubectl scale`.",
    )
    SIGNALS_MISSING = (
        "SignalsMissing",
        "The scheduler does not know the load of the model and does not change its number of replicas.",
        "Check that Prometheus answers and scrapes the pods.",
    )

    # The source of the weights.
    REPOSITORY_NOT_FOUND = (
        "RepositoryNotFound",
        "The hub has no such repository, or does not show it to this account.",
        "Correct the source, or set `operator.hubSecret` and `models.hubSecret` of the chart.",
    )
    REPOSITORY_GATED = (
        "RepositoryGated",
        "The hub grants access to the repository only to accounts that accepted its terms.",
        "Accept the terms, and set `operator.hubSecret` and `models.hubSecret` of the chart.",
    )
    REVISION_NOT_FOUND = (
        "RevisionNotFound",
        "The repository has no such branch, tag or commit.",
        "Correct the source's `revision`.",
    )
    HUB_UNREACHABLE = (
        "HubUnreachable",
        "The hub does not answer the operator, which tries again at least once a minute.",
        "Check the network, set `models.hubEndpoint` of the chart to a mirror, or give a commit as `revision`.",
    )
    CANNOT_LOAD = (
        "CannotLoad",
        "The server cannot download or load the model. The message is the server's: a missing folder or bucket, wrong "
        "credentials, weights that are not in safetensors, a wrong family.",
        "Follow the message. Correct the source or the Secret.",
    )

    # Failures of pods and containers.
    IMAGE_PULL_BACK_OFF = ("ImagePullBackOff", "The image cannot be pulled.", "Check its name and the pull secret.")
    INVALID_IMAGE_NAME = ("InvalidImageName", "The image has an invalid name.", "Correct the name.")
    ERR_IMAGE_NEVER_PULL = (
        "ErrImageNeverPull",
        "The image is not on the node, and the pull policy is Never.",
        "Load the image onto the node, or change the pull policy.",
    )
    IMAGE_INSPECT_ERROR = ("ImageInspectError", "The node cannot inspect the image.", _FOLLOW_MESSAGE)
    SECRET_NOT_FOUND = ("SecretNotFound", "The pod refers to a Secret that does not exist.", "Create it.")
    CONFIG_MAP_NOT_FOUND = ("ConfigMapNotFound", "The pod refers to a ConfigMap that does not exist.", "Create it.")
    CREATE_CONTAINER_CONFIG_ERROR = (
        "CreateContainerConfigError",
        "The node cannot prepare the container's configuration.",
        _FOLLOW_MESSAGE,
    )
    CREATE_CONTAINER_ERROR = ("CreateContainerError", "The node cannot create the container.", _FOLLOW_MESSAGE)
    RUN_CONTAINER_ERROR = ("RunContainerError", "The node cannot start the container.", _FOLLOW_MESSAGE)
    OOM_KILLED = (
        "OOMKilled",
        "A server was killed because it exceeded its memory limit.",
        "Raise the model's `resources.limits.memory`.",
    )
    CRASH_LOOP_BACK_OFF = (
        "CrashLoopBackOff",
        "A server ended with an error and is restarted with backoff. The message contains its last lines.",
        "Read its log with `kubectl logs`.",
    )
    CONTAINER_ENDED = (
        "ContainerEnded",
        "A server ended with an error. The message contains its last lines.",
        "Read its log with `kubectl logs --previous`.",
    )
    EVICTED = ("Evicted", "The node evicted the pod, and no other pod has replaced it yet.", _FOLLOW_MESSAGE)
    POD_FAILED = ("PodFailed", "The pod has failed, and no other pod has replaced it yet.", _FOLLOW_MESSAGE)
    FAILED_CREATE = (
        "FailedCreate",
        "The API server refuses to create the pods, for example because of Pod Security or a quota.",
        _FOLLOW_MESSAGE,
    )
    UNSCHEDULABLE = (
        "Unschedulable",
        "No node can run the pod. The message is the scheduler's.",
        "Check resources, node selectors and nodes.",
    )
    SCHEDULING_GATED = (
        "SchedulingGated",
        "The pod has scheduling gates, so that it gets no node yet.",
        "Wait until their controller removes them.",
    )
    PERSISTENT_VOLUME_CLAIM_NOT_FOUND = (
        "PersistentVolumeClaimNotFound",
        "The pod refers to a PersistentVolumeClaim that does not exist.",
        "Create it.",
    )
