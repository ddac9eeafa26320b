"""JSON schemas for kubeconform, from what an API server says of itself (OpenAPI v3): the built-in kinds and our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.apiserver import ApiServer

LOCATION = "{{ .Group }}_{{ .ResourceAPIVersion }}_{{ .ResourceKind }}.json"


def write(server: ApiServer, folder: Path) -> str:
    """Writes a strict schema for each kind; the schema location to hand to kubeconform."""
    api = server.client()

    def read(path: str) -> dict[str, Any]:
        request = api.param_serialize(method="GET", resource_path=path, auth_settings=["BearerToken"])
        return dict(json.loads(api.call_api(*request).read()))

    for path in read("/openapi/v3")["paths"]:
        if not path.startswith(("api/v", "apis/")):
            continue
        schemas = read(f"/openapi/v3/{path}").get("components", {}).get("schemas", {})
        strict = {name: _strict(schema) for name, schema in schemas.items()}
        for name, schema in strict.items():
            for kind in schema.get("x-kubernetes-group-version-kind", ()):
                whole = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": strict}}
                # kubeconform calls the core group by its version.
                file = f"{kind['group'] or kind['version']}_{kind['version']}_{kind['kind'].lower()}.json"
                (folder / file).write_text(json.dumps(whole))
    return str(folder / LOCATION)


def _strict(schema: Any) -> Any:
    """No field may be there that the schema does not name."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(part) for key, part in schema.items()}
    if isinstance(strict.get("properties"), dict) and "x-kubernetes-preserve-unknown-fields" not in strict:
        strict.setdefault("additionalProperties", False)
    return strict
