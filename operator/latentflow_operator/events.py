"""Events of Kubernetes, which `kubectl describe` shows: what changed on an object, and why.

Pure; `cluster` creates them.
"""

from __future__ import annotations

from datetime import datetime

from latentflow_operator.objects import Body, KubeObject


def event(about: KubeObject, *, reason: str, note: str, warning: bool, action: str, now: datetime) -> Body:
    """An Event about an object.

    Args:
        action: The action of the operator: Reconcile or Scale.
    """
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        # The name identifies the change, so that recording it twice makes one Event.
        "metadata": {
            "name": f"{about.name}.{about.uid[:8]}-{action.lower()}-{about.resource_version}",
            "namespace": about.namespace,
        },
        "eventTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "reportingController": "latentflow.io/operator",
        "reportingInstance": "latentflow-operator",
        "action": action,
        "type": "Warning" if warning else "Normal",
        "reason": reason,
        "note": note[:1024],
        "regarding": {
            "apiVersion": about.api_version,
            "kind": about.kind,
            "name": about.name,
            "namespace": about.namespace,
            "uid": about.uid,
        },
    }
