"""Whether an object already is as it is wished to be, so that nothing needs to be written: pure.

What we last wished is known by its digest, in an annotation; what others have changed since shows where the object lacks
something that is wished. Together they find every difference and no false one: defaults that the server filled in are no
difference, nor is another spelling of the same quantity.
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


def sealed(manifest: Manifest) -> Manifest:
    """The manifest with its own digest as an annotation."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]
    metadata = manifest["metadata"]
    return manifest | {
        "metadata": metadata | {"annotations": metadata.get("annotations", {}) | {DIGEST: digest}},
    }


def covered(wished: Any, live: Any) -> bool:
    """Whether `live` has everything that `wished` has. Lists are compared whole, except ownerReferences' order."""
    if isinstance(wished, dict):
        if live is None:
            return not wished
        return isinstance(live, dict) and all(covered(value, live.get(key)) for key, value in wished.items())
    if isinstance(wished, list):
        present = live if isinstance(live, list) else []
        return len(wished) == len(present) and all(map(covered, wished, present))
    if wished == live or (wished in (None, "") and live is None):
        return True
    return _same_quantity(wished, live)


def _same_quantity(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool):
        return False
    try:
        return bool(_quantity(one) == _quantity(other))
    except (ValueError, TypeError):
        return False
