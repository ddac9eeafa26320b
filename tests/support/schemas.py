"""JSON schemas for kubeconform, from the OpenAPI v3 documents of an API server: of built-in and of custom kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kubernetes import client as kube
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed

from support.apiserver import SECONDS, ApiServer

LOCATION = "{{ .Group }}_{{ .ResourceAPIVersion }}_{{ .ResourceKind }}.json"


@retry(retry=retry_if_exception_type(LookupError), stop=stop_after_delay(SECONDS), wait=wait_fixed(0.2), reraise=True)
def write(server: ApiServer, folder: Path) -> str:
    """Writes a strict schema for each kind; returns the schema location for kubeconform."""
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
    # An API server serves a definition before it publishes its schema.
    for definition in kube.ApiextensionsV1Api(api).list_custom_resource_definition().items:
        group, kind = definition.spec.group, definition.spec.names.kind.lower()
        for version in definition.spec.versions:
            if version.served and not (folder / f"{group}_{version.name}_{kind}.json").exists():
                raise LookupError(f"the schema of {kind}.{group} is not published yet")
    return str(folder / LOCATION)


def _strict(schema: Any) -> Any:
    """The schema, with unknown fields forbidden."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(part) for key, part in schema.items()}
    if isinstance(strict.get("properties"), dict) and "x-kubernetes-preserve-unknown-fields" not in strict:
        strict.setdefault("additionalProperties", False)
    return strict
