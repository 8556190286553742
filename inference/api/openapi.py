"""OpenAPI 3.1 document, generated from the models of `schema` and `replies`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema

from dalle.versions import OURS, installed
from inference.api.parsing import IMAGES, JSON, JSON_LINES, TEXT
from inference.api.replies import (
    CandidateLine,
    CompleteReply,
    ErrorLine,
    ErrorReply,
    GenerateReply,
    Prediction,
    PreviewLine,
    RankingLine,
)
from inference.api.schema import ClassifyRequest, CompleteRequest, GenerateRequest, Limits

_MODELS: tuple[type[BaseModel], ...] = (
    GenerateRequest,
    ClassifyRequest,
    CompleteRequest,
    GenerateReply,
    PreviewLine,
    CandidateLine,
    RankingLine,
    ErrorLine,
    CompleteReply,
    ErrorReply,
)

_REFUSALS: Mapping[int, str] = {
    400: "The body cannot be read: not UTF-8, not JSON, not an image.",
    406: "Accept admits no media type that this request can be answered in.",
    408: "The body did not arrive in time, or stopped in the middle.",
    413: "The body is larger than the server's limit.",
    415: "The Content-Type or Content-Encoding is not supported.",
    422: "A field is unknown, missing or out of range, a caption is too long, or the artefact "
    "lacks the component that the request needs.",
    429: "The queue is full; Retry-After says when to try again.",
    500: "Something went wrong on the server.",
    503: "The server is loading, stopping, dead or too busy; Retry-After where waiting may help.",
    504: "The deadline passed before anything was finished.",
}


_STRING = {"type": "string"}
_STATUS = {"type": "object", "properties": {"status": _STRING}}
_PING = {
    200: ("A self-test has passed and requests are answered.", JSON, _STATUS),
    500: ("The engine is dead.", JSON, _STATUS),
    503: ("Loading or stopping.", JSON, _STATUS),
}
_PARAMETERS = {
    "type": "object",
    "properties": {
        "MaxConcurrentTransforms": {"type": "integer"},
        "BatchStrategy": _STRING,
        "MaxPayloadInMB": {"type": "integer"},
    },
}


def document(limits: Limits) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of a server with these limits."""
    schemas = model_schemas(_MODELS)
    schemas["ClassifyReply"] = {
        "description": "For each image: indices of its classes, likeliest first, the classes, and "
        "their probabilities.",
        **TypeAdapter(list[Prediction]).json_schema(ref_template="#/components/schemas/{model}"),
    }
    fields = schemas["GenerateRequest"]["properties"]
    fields["num_candidates"]["maximum"] = limits.max_candidates
    fields["num_images"]["maximum"] = limits.max_images
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "dalle-sagemaker",
            "version": installed(OURS) or "0",  # 0: run from a checkout
            "description": "Generates images for a caption, ranks them by CLIP, returns the best.",
        },
        "paths": {
            "/invocations": {"post": _invocations(limits)},
            "/ping": get("ping", "Health", _PING),
            "/execution-parameters": get(
                "execution_parameters",
                "Limits of a batch transform job",
                {200: ("The limits.", JSON, _PARAMETERS)},
            ),
            "/metrics": get(
                "metrics", "Prometheus metrics", {200: ("The text format.", TEXT, _STRING)}
            ),
            "/openapi.json": get(
                "openapi", "This document", {200: ("OpenAPI 3.1.", JSON, {"type": "object"})}
            ),
        },
        "components": {"schemas": schemas},
    }


def model_schemas(models: Iterable[type[BaseModel]]) -> dict[str, Any]:
    """Return the schemas of models by their names, and of those that they refer to."""
    _, definitions = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    schemas: dict[str, Any] = definitions["$defs"]
    return schemas


def _invocations(limits: Limits) -> dict[str, Any]:
    requests = _any_of("GenerateRequest", "ClassifyRequest", "CompleteRequest")
    replies = _any_of("GenerateReply", "ClassifyReply", "CompleteReply")
    lines = _any_of("PreviewLine", "CandidateLine", "RankingLine", "ErrorLine", "ErrorReply")
    lines["anyOf"][4:4] = replies["anyOf"]
    return {
        "summary": "Generate images, classify images, or complete a caption",
        "operationId": "invocations",
        "description": f"Bodies up to {limits.max_request_bytes:,} bytes. As {TEXT} the body is "
        f"the caption and every field has its default. As {JSON_LINES} each line is a request, "
        "and the reply has one line for each, in order, which may be an error; all deadlines count "
        f"from the arrival of the whole body. With Accept: {JSON_LINES} a request with a caption "
        "is answered in a stream: PreviewLines where preview_rows is given, a CandidateLine for "
        "each candidate as soon as it is finished, then one RankingLine; an ErrorLine ends a "
        "stream that failed. With an image type the reply is the best image, and X-Dalle-* "
        "headers carry its scores. The header X-Amzn-SageMaker-Custom-Attributes is returned "
        "unchanged.",
        "requestBody": {
            "required": True,
            "content": content({JSON: requests, JSON_LINES: requests, TEXT: _STRING}),
        },
        "responses": {
            "200": body(
                "The reply.", {JSON: replies, JSON_LINES: lines, **dict.fromkeys(IMAGES, _STRING)}
            ),
            **refusals("ErrorReply"),
        },
    }


def refusals(schema: str) -> dict[str, Any]:
    """Return the responses of all errors by their status. schema: of their bodies."""
    responses = {str(status): body(text, {JSON: ref(schema)}) for status, text in _REFUSALS.items()}
    for status in ("429", "503"):
        responses[status]["headers"] = {
            "Retry-After": {
                "description": "Seconds, estimated from the speed measured so far.",
                "schema": {"type": "integer", "minimum": 1, "maximum": 3600},
            }
        }
    return responses


def get(
    operation: str,
    summary: str,
    responses: Mapping[int, tuple[str, str, dict[str, Any]]],
    parameters: Sequence[str] = (),
) -> dict[str, Any]:
    """Return a route of GET. responses: description, media type and schema; parameters: of its
    path, each a text."""
    bodies = {
        str(status): body(description, {media_type: schema})
        for status, (description, media_type, schema) in responses.items()
    }
    route: dict[str, Any] = {"summary": summary, "operationId": operation, "responses": bodies}
    if parameters:
        route["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": _STRING} for name in parameters
        ]
    return {"get": route}


def ref(name: str) -> dict[str, Any]:
    """Return a reference to a schema."""
    return {"$ref": f"#/components/schemas/{name}"}


def _any_of(*names: str) -> dict[str, Any]:
    return {"anyOf": [ref(name) for name in names]}


def body(description: str, schemas: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return a response. schemas: by media type."""
    return {"description": description, "content": content(schemas)}


def content(schemas: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return schemas by media type, as OpenAPI writes them."""
    return {media_type: {"schema": schema} for media_type, schema in schemas.items()}
