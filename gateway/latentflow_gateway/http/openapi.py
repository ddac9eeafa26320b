"""The OpenAPI document of the HTTP API, made from the types of its bodies. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from latentflow_gateway.http import errors, requests, responses

_SCHEMAS = "#/components/schemas/"
_ERRORS = {
    400: "The request is wrong: the code and the message name what.",
    401: "The API key is missing or unknown.",
    404: "The gateway has no such workflow, ControlNet or LoRA.",
    409: "The idempotency key belongs to another request.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "The gateway's queue is full; Retry-After is when to send the request again.",
    500: "The gateway or a model server failed in a way that it should not.",
    501: "This version does not serve the request.",
    503: "A model has no ready server, or the gateway is draining; send the request again.",
    504: "The request took longer than the gateway's limit.",
}


def document(*, keyed: bool) -> dict[str, Any]:
    """The document.

    Args:
        keyed: Whether the gateway requires API keys.
    """
    types: list[tuple[type[BaseModel], Any]] = [(requests.ImageRequest, "validation")]
    types += [
        (kind, "serialization")
        for kind in (responses.Images, responses.Model, responses.ModelList, responses.Health, errors.ErrorBody)
    ]
    _, schemas = models_json_schema(types, ref_template=_SCHEMAS + "{model}")
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "latentflow",
            "version": version("latentflow"),
            "description": "Text-to-image workflows by OpenAI's images API.",
        },
        "paths": {
            "/v1/images/generations": {
                "post": {
                    "operationId": "createImage",
                    "summary": "Make images from a prompt",
                    "parameters": [
                        {
                            "name": "Idempotency-Key",
                            "in": "header",
                            "required": False,
                            "description": "A request that is sent again with its key, at most two minutes after it has "
                            "ended, gets the images of the first and runs nothing.",
                            "schema": {"type": "string", "maxLength": 128},
                        }
                    ],
                    "requestBody": {"required": True, "content": _json("ImageRequest")},
                    "responses": _responses("Images", 400, 401, 404, 409, 413, 415, 429, 500, 501, 503, 504),
                }
            },
            "/v1/models": {
                "get": {
                    "operationId": "listModels",
                    "summary": "List the workflows",
                    "responses": _responses("ModelList", 401),
                }
            },
            "/v1/models/{model}": {
                "get": {
                    "operationId": "retrieveModel",
                    "summary": "Describe a workflow",
                    "parameters": [
                        {
                            "name": "model",
                            "in": "path",
                            "required": True,
                            "description": "NAMESPACE/NAME, with or without an encoded slash; or NAME.",
                            "schema": {"type": "string"},
                        }
                    ],
                    "responses": _responses("Model", 401, 404),
                }
            },
            "/healthz": {
                "get": {
                    "operationId": "health",
                    "summary": "Whether the gateway admits requests",
                    "security": [],
                    "responses": {
                        "200": {"description": "It does.", "content": _json("Health")},
                        "503": {"description": "It is draining.", "content": _json("Health")},
                    },
                }
            },
            "/openapi.json": {
                "get": {
                    "operationId": "openapi",
                    "summary": "This document",
                    "security": [],
                    "responses": {
                        "200": {
                            "description": "The document.",
                            "content": {"application/json": {"schema": {"type": "object"}}},
                        }
                    },
                }
            },
        },
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"apiKey": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"apiKey": []}] if keyed else [],
    }
    return described


def _json(schema: str) -> Mapping[str, Any]:
    return {"application/json": {"schema": {"$ref": f"{_SCHEMAS}{schema}"}}}


def _responses(schema: str, *statuses: int) -> Mapping[str, Any]:
    found: dict[str, Any] = {"200": {"description": "Done.", "content": _json(schema)}}
    for status in statuses:
        found[str(status)] = {"description": _ERRORS[status], "content": _json("ErrorBody")}
    return found
