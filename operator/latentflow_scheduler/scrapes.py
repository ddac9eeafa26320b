"""What processes say of themselves at /metrics, without a Prometheus server between: text in, figures out. Pure."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families


def held(text: str) -> dict[str, float]:
    """Requests that a gateway holds, by model as the gateway calls it; of a /metrics page."""
    return {
        sample.labels["model"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "latentflow_gateway_held"
    }
