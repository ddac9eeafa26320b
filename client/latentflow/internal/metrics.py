"""All metrics of the project in tables: name, kind, labels and help text.

A component creates the instruments of its table with `Instruments(TABLE)`; `docs/metrics.md` is generated from the same
tables. Names follow the conventions of Prometheus: base units, `_total` for counters.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from dataclasses import dataclass
from typing import Any, Literal
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_SLOW = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_BATCH = (1, 2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric family."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


# Model servers. Every sample has the constant labels `model` and `role`.
NODE: tuple[Metric, ...] = (
    Metric(
        name="latentflow_requests_started_total",
        kind="counter",
        labels=("call",),
        help="Calls admitted, by call (Encode, Denoise, ...), whether or not they have ended.",
    ),
    Metric(
        name="latentflow_requests_total",
        kind="counter",
        labels=("call", "code"),
        help="Calls that ended, by call and gRPC status code.",
    ),
    Metric(
        name="latentflow_service_seconds",
        kind="histogram",
        labels=("call",),
        buckets=_SLOW,
        help="Time from a call's arrival to its end, including its time in the server's queue.",
    ),
    Metric(
        name="latentflow_queue_depth",
        kind="gauge",
        help="Requests in the model server's queue: admitted, and without a forward pass yet.",
    ),
    Metric(name="latentflow_in_flight", kind="gauge", help="Running requests: admitted and no longer in the queue."),
    Metric(
        name="latentflow_step_seconds",
        kind="histogram",
        buckets=_FAST,
        help="Time of one forward pass with the work around it: a denoising step, an encoding, a decoding.",
    ),
    Metric(
        name="latentflow_batch_size",
        kind="histogram",
        buckets=_BATCH,
        help="Requests that share a forward pass.",
    ),
    Metric(
        name="latentflow_tensor_bytes_total",
        kind="counter",
        labels=("transport", "direction"),
        help="Bytes of tensors sent to and received from peers, by transport (grpc, shared-memory).",
    ),
    Metric(
        name="latentflow_tensor_seconds_total",
        kind="counter",
        labels=("transport", "direction"),
        help="Time of the transfers that latentflow_tensor_bytes_total counts.",
    ),
    Metric(name="latentflow_tensors_held", kind="gauge", help="Tensors held for other servers under a lease."),
    Metric(name="latentflow_tensor_held_bytes", kind="gauge", help="Bytes of the tensors held for other servers."),
    Metric(
        name="latentflow_late_residuals_total",
        kind="counter",
        help="Steps of requests that were put off because the residuals of a ControlNet were not there in time.",
    ),
    Metric(
        name="latentflow_guidance_peers_lost_total",
        kind="counter",
        labels=("reason",),
        help="Guidance peers that this denoiser has lost during a request or could not use; it then computes both halves "
        "itself.",
    ),
    Metric(
        name="latentflow_loads_total",
        kind="counter",
        labels=("kind",),
        help="Weights loaded: the model at start-up (model) and after a sleep (wake), LoRAs pulled (adapter), sets of LoRAs "
        "merged (merge), nets of a ControlNet that has several, moved to the device (net).",
    ),
    Metric(
        name="latentflow_load_seconds_total",
        kind="counter",
        labels=("kind",),
        help="Time of the loads that latentflow_loads_total counts.",
    ),
    Metric(name="latentflow_nets_resident", kind="gauge", help="Nets of a ControlNet that are on the device."),
    Metric(
        name="latentflow_net_evictions_total",
        kind="counter",
        help="Nets of a ControlNet that left the device because another one needed the memory.",
    ),
    Metric(
        name="latentflow_download_bytes",
        kind="gauge",
        help="Bytes of the weights downloaded so far at start-up; 0 where nothing has to be downloaded.",
    ),
    Metric(
        name="latentflow_download_total_bytes",
        kind="gauge",
        help="Bytes of the weights to download at start-up in all.",
    ),
    Metric(name="latentflow_ready", kind="gauge", help="1 when the server has loaded its model and is warmed up."),
    Metric(
        name="latentflow_awake",
        kind="gauge",
        help="1 while the weights are on the device; 0 from a Sleep until the end of the next Wake.",
    ),
    Metric(
        name="latentflow_weights_bytes",
        kind="gauge",
        help="Size of the model's weights on its device while it is awake.",
    ),
    Metric(
        name="latentflow_asleep_bytes",
        kind="gauge",
        help="Memory of the device that the server used when it last fell asleep.",
    ),
    Metric(name="latentflow_sleeps_total", kind="counter", help="How often the weights have left the device."),
    Metric(
        name="latentflow_sleep_seconds_total",
        kind="counter",
        help="Time from the arrival of a Sleep until the weights have left, for all that latentflow_sleeps_total counts.",
    ),
)

# Gateways.
GATEWAY: tuple[Metric, ...] = (
    Metric(
        name="latentflow_gateway_requests_total",
        kind="counter",
        labels=("workflow", "code"),
        help="Requests for images that ended, by workflow (`?` for unknown ones) and gRPC status code.",
    ),
    Metric(
        name="latentflow_gateway_request_seconds",
        kind="histogram",
        labels=("workflow",),
        buckets=_SLOW,
        help="Time from the arrival of a request for images to its end.",
    ),
    Metric(
        name="latentflow_gateway_queue_depth",
        kind="gauge",
        labels=("workflow",),
        help="Admitted requests that wait for a running slot.",
    ),
    Metric(
        name="latentflow_gateway_in_flight",
        kind="gauge",
        labels=("workflow",),
        help="Admitted requests that have not ended, including queued ones.",
    ),
    Metric(
        name="latentflow_gateway_images_total",
        kind="counter",
        labels=("workflow",),
        help="Images delivered.",
    ),
    Metric(
        name="latentflow_gateway_stage_seconds",
        kind="histogram",
        labels=("model", "stage"),
        buckets=_SLOW,
        help="Time of a stage as the gateway measures it, including repeated attempts.",
    ),
    Metric(
        name="latentflow_gateway_stage_retries_total",
        kind="counter",
        labels=("model", "stage", "reason"),
        help="Repeated attempts at a stage, by the reason of the failure.",
    ),
    Metric(
        name="latentflow_gateway_errors_total",
        kind="counter",
        labels=("workflow", "reason"),
        help="Requests that ended with an error, by its reason.",
    ),
    Metric(
        name="latentflow_gateway_authentications_total",
        kind="counter",
        labels=("client",),
        help="Calls by the client whose API key they carry; `?` for refused ones. Absent where no API keys are required.",
    ),
    Metric(
        name="latentflow_gateway_http_responses_total",
        kind="counter",
        labels=("route", "status"),
        help="Responses of the HTTP API, by route (`?` for unknown paths) and status; 499: the client had disconnected.",
    ),
    Metric(
        name="latentflow_gateway_replicas_ready",
        kind="gauge",
        labels=("model",),
        help="Ready replicas of a model, as this gateway sees them.",
    ),
    Metric(
        name="latentflow_gateway_held",
        kind="gauge",
        labels=("model",),
        help="Requests that wait because a model has no ready replica.",
    ),
    Metric(name="latentflow_gateway_ready", kind="gauge", help="1 when the gateway accepts requests."),
)

# The scheduler, which the operator and the embedded runtime run.
SCHEDULER: tuple[Metric, ...] = (
    Metric(
        name="latentflow_scheduler_demand",
        kind="gauge",
        labels=("namespace", "model"),
        help="Demand for a model, in fully busy replicas.",
    ),
    Metric(
        name="latentflow_scheduler_replicas",
        kind="gauge",
        labels=("namespace", "model"),
        help="Replicas that the scheduler decided on.",
    ),
    Metric(
        name="latentflow_scheduler_decisions_total",
        kind="counter",
        labels=("namespace", "model", "direction"),
        help="Decisions that changed the number of replicas, by direction (up, down).",
    ),
)

# The embedded runtime, beside SCHEDULER.
LOCAL: tuple[Metric, ...] = (
    Metric(
        name="latentflow_local_restarts_total",
        kind="counter",
        labels=("process",),
        help="Restarts of processes that ended by themselves.",
    ),
    Metric(
        name="latentflow_local_ready",
        kind="gauge",
        labels=("process",),
        help="1 if the process accepts requests.",
    ),
)

TABLES: dict[str, tuple[Metric, ...]] = {
    "Model servers": NODE,
    "Gateways": GATEWAY,
    "Scheduler, in the operator and in `latentflow up`": SCHEDULER,
    "Embedded runtime": LOCAL,
}


class Instruments:
    """The instruments of a table, in a registry of their own.

    Args:
        table: The metrics.
        constant: Labels with one value for the whole process, which precede each metric's own.

    `instruments.of("latentflow_requests_total", call="Encode", code="OK")` is one time series, to `inc`, `set` or
    `observe`.
    """

    def __init__(self, table: tuple[Metric, ...], **constant: str) -> None:
        self.registry = CollectorRegistry()
        self._constant = constant
        self._server: WSGIServer | None = None
        self._families: dict[str, Any] = {}
        for metric in table:
            kinds: dict[str, Any] = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
            extra = {"buckets": metric.buckets} if metric.kind == "histogram" else {}
            names = (*constant, *metric.labels)
            self._families[metric.name] = kinds[metric.kind](
                metric.name, metric.help, names, registry=self.registry, **extra
            )

    def of(self, name: str, **labels: str) -> Any:
        """The time series of a metric; `labels` are the metric's own. KeyError for a name that is not in the table."""
        values = self._constant | labels
        return self._families[name].labels(**values) if values else self._families[name]

    def serve(self, *, host: str, port: int) -> int:
        """Serves `/metrics` in a separate thread. Returns the port; `port=0` takes a free one."""
        self._server, _ = start_http_server(port, host, registry=self.registry)
        return int(self._server.server_port)

    def close(self) -> None:
        """Ends serving."""
        if self._server is not None:
            ending = threading.Thread(target=self._server.shutdown)
            ending.start()
            # The server looks whether it has to end when a connection arrives, otherwise only every half second.
            with (
                contextlib.suppress(OSError),
                socket.create_connection(self._server.socket.getsockname()[:2], timeout=1.0),
            ):
                pass
            ending.join()
            self._server.server_close()
