"""Events about objects, as Kubernetes has them: what changed and why, for `kubectl describe`. Pure; the cluster creates them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

Body = dict[str, Any]


def event(body: Body, *, reason: str, note: str, warning: bool, action: str, now: datetime) -> Body:
    """An Event about an object.

    Args:
        action: What was done: Reconcile or Scale.
    """
    metadata = body["metadata"]
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        # Named after the change itself, so that telling it twice makes one Event.
        "metadata": {
            "name": f"{metadata['name']}.{metadata['uid'][:8]}-{action.lower()}-{metadata['resourceVersion']}",
            "namespace": metadata["namespace"],
        },
        "eventTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "reportingController": "latentflow.io/operator",
        "reportingInstance": "latentflow-operator",
        "action": action,
        "type": "Warning" if warning else "Normal",
        "reason": reason,
        "note": note[:1024],
        "regarding": {
            "apiVersion": body["apiVersion"],
            "kind": body["kind"],
            "name": metadata["name"],
            "namespace": metadata["namespace"],
            "uid": metadata["uid"],
        },
    }
