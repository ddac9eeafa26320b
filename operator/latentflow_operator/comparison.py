"""Whether an object already has its desired state, so that no write is needed: pure.

An annotation contains the digest of the manifest that was applied last, which shows changes of the desired state.
Changes by others show as fields that differ from the manifest. Together they find every difference and no false one:
defaults that the API server adds are no difference, and neither is another notation of the same quantity.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from kubernetes.utils.quantity import parse_quantity as _parse

from latentflow_operator.manifests import Manifest

_quantity: Callable[[Any], Decimal] = _parse
DIGEST = "latentflow.io/applied"


def with_digest(manifest: Manifest) -> Manifest:
    """The manifest with its digest as an annotation."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]
    metadata = manifest["metadata"]
    return manifest | {
        "metadata": metadata | {"annotations": metadata.get("annotations", {}) | {DIGEST: digest}},
    }


def covers(live: Any, desired: Any) -> bool:
    """Whether `live` has every field of `desired`. Lists must have the same length and match element by element."""
    if isinstance(desired, dict):
        if live is None:
            return not desired
        return isinstance(live, dict) and all(covers(live.get(key), value) for key, value in desired.items())
    if isinstance(desired, list):
        present = live if isinstance(live, list) else []
        return len(desired) == len(present) and all(map(covers, present, desired))
    if desired == live or (desired in (None, "") and live is None):
        return True
    return _same_quantity(desired, live)


def _same_quantity(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool):
        return False
    try:
        return bool(_quantity(one) == _quantity(other))
    except (ValueError, TypeError):
        return False
