"""Every metric of the project, written once: name, kind, labels, unit and meaning.

A component makes the instruments of its table with `Instruments(TABLE)` and serves them with `serve`; `docs/metrics.md`
is generated from the same tables. Names follow Prometheus' conventions: base units, `_total` for counters.
"""

from __future__ import annotations

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


# Model servers. `model` and `role` stand on every sample, as constant labels.
NODE: tuple[Metric, ...] = (
    Metric(
        name="latentflow_requests_started_total",
        kind="counter",
        labels=("call",),
        help="Calls that were taken, by call (Encode, Denoise, ...), whether or not they have ended.",
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
        help="Time from a call's arrival to its end, the queue inside the server included.",
    ),
    Metric(
        name="latentflow_queue_depth",
        kind="gauge",
        help="Requests that have arrived and wait for their first forward pass, inside the model server.",
    ),
    Metric(name="latentflow_in_flight", kind="gauge", help="Requests that run."),
    Metric(
        name="latentflow_step_seconds",
        kind="histogram",
        buckets=_FAST,
        help="Time of one forward pass with what belongs to it: a denoising step, an encoding, a decoding.",
    ),
    Metric(
        name="latentflow_batch_size",
        kind="histogram",
        buckets=_BATCH,
        help="Requests that shared a forward pass.",
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
        help="Time spent on those transfers.",
    ),
    Metric(name="latentflow_tensors_held", kind="gauge", help="Tensors held for others under a lease."),
    Metric(name="latentflow_tensor_held_bytes", kind="gauge", help="Their bytes."),
    Metric(
        name="latentflow_loads_total",
        kind="counter",
        labels=("kind",),
        help="Weights loaded: the model at start-up (model), adapters pulled (adapter), adapter sets merged (merge).",
    ),
    Metric(
        name="latentflow_load_seconds_total",
        kind="counter",
        labels=("kind",),
        help="Time spent on those loads.",
    ),
    Metric(
        name="latentflow_download_bytes",
        kind="gauge",
        help="Bytes of the weights' download, at start-up, that are here; 0 where nothing had to be downloaded.",
    ),
    Metric(name="latentflow_download_total_bytes", kind="gauge", help="Bytes that this download comes to."),
    Metric(name="latentflow_ready", kind="gauge", help="1 when the server is warmed up and takes requests."),
)

# Gateways.
GATEWAY: tuple[Metric, ...] = (
    Metric(
        name="latentflow_gateway_requests_total",
        kind="counter",
        labels=("workflow", "code"),
        help="Generate calls that ended, by workflow and gRPC status code.",
    ),
    Metric(
        name="latentflow_gateway_request_seconds",
        kind="histogram",
        labels=("workflow",),
        buckets=_SLOW,
        help="Time from a Generate call's arrival to its end.",
    ),
    Metric(
        name="latentflow_gateway_queue_depth",
        kind="gauge",
        labels=("workflow",),
        help="Requests admitted that wait for their first stage.",
    ),
    Metric(
        name="latentflow_gateway_in_flight",
        kind="gauge",
        labels=("workflow",),
        help="Requests admitted that have not ended, queued ones included.",
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
        help="Time of a stage as the gateway sees it, attempts and hand-offs included.",
    ),
    Metric(
        name="latentflow_gateway_stage_retries_total",
        kind="counter",
        labels=("model", "stage", "reason"),
        help="Stages run again, by the reason of the failure.",
    ),
    Metric(
        name="latentflow_gateway_errors_total",
        kind="counter",
        labels=("workflow", "reason"),
        help="Requests that ended in an error, by its reason.",
    ),
    Metric(
        name="latentflow_gateway_authentications_total",
        kind="counter",
        labels=("client",),
        help="Calls by the client whose API key they carried; `?` for those that were refused. Empty without API keys.",
    ),
    Metric(
        name="latentflow_gateway_replicas_ready",
        kind="gauge",
        labels=("model",),
        help="Replicas of a model that this gateway may send requests to.",
    ),
    Metric(
        name="latentflow_gateway_held",
        kind="gauge",
        labels=("model",),
        help="Requests that wait because no replica of a model takes any.",
    ),
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
        table: The metrics to make.
        constant: Labels with one value for the whole process, put before each metric's own.

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
        """The time series of a metric; `labels` are the metric's own. KeyError for a name that no table has."""
        values = self._constant | labels
        return self._families[name].labels(**values) if values else self._families[name]

    def serve(self, *, host: str, port: int) -> int:
        """Serves `/metrics` from a thread of its own. Returns the port, which `port=0` leaves to the system."""
        self._server, _ = start_http_server(port, host, registry=self.registry)
        return int(self._server.server_port)

    def close(self) -> None:
        """Stops serving."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
