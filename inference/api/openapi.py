"""GET /openapi.json: the OpenAPI 3.1 document, generated from the models of `schema`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema

from dalle.versions import OURS, installed
from inference.api.content_types import IMAGES, JSON, JSON_LINES, TEXT
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
    406: "Accept admits nothing that is offered for this request.",
    408: "The body did not arrive in time, or stopped in the middle.",
    413: "The body is larger than this server reads.",
    415: "The Content-Type is not read.",
    422: "A field is unknown, missing or out of range, a caption is too long, or the artefact "
    "lacks the component that the request needs.",
    429: "The queue is full; Retry-After says when to try again.",
    500: "Something went wrong on the server.",
    503: "The model is loading, stopping, dead or too far behind; Retry-After where it may help.",
    504: "The deadline passed before anything was finished.",
}


def document(limits: Limits) -> dict[str, Any]:
    """The OpenAPI 3.1 document of a server with these limits."""
    _, definitions = models_json_schema(
        [(model, "validation") for model in _MODELS], ref_template="#/components/schemas/{model}"
    )
    schemas: dict[str, Any] = definitions["$defs"]
    schemas["ClassifyReply"] = {
        "description": "For each image: indices of its classes, likeliest first, the classes, and "
        "their probabilities.",
        **TypeAdapter(list[Prediction]).json_schema(ref_template="#/components/schemas/{model}"),
    }
    drawing = schemas["GenerateRequest"]["properties"]
    drawing["num_candidates"]["maximum"] = limits.max_candidates
    drawing["num_images"]["maximum"] = limits.max_images
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "dalle-sagemaker",
            "version": installed(OURS) or "0",  # 0: run from a checkout
            "description": "Draws pictures for a caption, ranks them by CLIP, returns the best.",
        },
        "paths": {
            "/invocations": {"post": _invocations(limits)},
            "/ping": {"get": _ping()},
            "/execution-parameters": {"get": _execution_parameters()},
            "/metrics": {
                "get": {
                    "summary": "Prometheus metrics",
                    "operationId": "metrics",
                    "responses": {"200": _body("The text format.", {TEXT: {"type": "string"}})},
                }
            },
            "/openapi.json": {
                "get": {
                    "summary": "This document",
                    "operationId": "openapi",
                    "responses": {"200": _body("OpenAPI 3.1.", {JSON: {"type": "object"}})},
                }
            },
        },
        "components": {"schemas": schemas},
    }


def _invocations(limits: Limits) -> dict[str, Any]:
    requests = _any_of("GenerateRequest", "ClassifyRequest", "CompleteRequest")
    replies = _any_of("GenerateReply", "ClassifyReply", "CompleteReply")
    lines = _any_of(
        "PreviewLine",
        "CandidateLine",
        "RankingLine",
        "ErrorLine",
        "GenerateReply",
        "ClassifyReply",
        "CompleteReply",
        "ErrorReply",
    )
    refusals = {
        str(status): _body(text, {JSON: _ref("ErrorReply")}) for status, text in _REFUSALS.items()
    }
    for status in ("429", "503"):
        refusals[status]["headers"] = {
            "Retry-After": {
                "description": "Seconds, estimated from the speed measured so far.",
                "schema": {"type": "integer", "minimum": 1, "maximum": 3600},
            }
        }
    return {
        "summary": "Draw pictures, classify images, or complete a caption",
        "operationId": "invocations",
        "description": f"Bodies up to {limits.max_request_bytes:,} bytes. As {TEXT} the body is "
        f"the caption and everything else has its default. As {JSON_LINES} each line is a "
        "request, and the reply has exactly one line for each, in order, an error in the place of "
        "the reply it replaces; their deadlines count from the arrival of the whole body. With "
        f"Accept: {JSON_LINES} one drawing request is answered in a stream: PreviewLines of what "
        "is being drawn where preview_rows asks for them, a CandidateLine for each candidate as "
        "soon as it is finished, then one RankingLine; an ErrorLine ends a stream that broke off. "
        "With an image type the best picture is the reply, and X-Dalle-* headers carry its scores. "
        "The header X-Amzn-SageMaker-Custom-Attributes comes back unchanged.",
        "requestBody": {
            "required": True,
            "content": {
                JSON: {"schema": requests},
                JSON_LINES: {"schema": requests},
                TEXT: {"schema": {"type": "string"}},
            },
        },
        "responses": {
            "200": _body(
                "The answer.",
                {
                    JSON: replies,
                    JSON_LINES: lines,
                    **{media_type: {"type": "string"} for media_type in IMAGES},
                },
            ),
            **refusals,
        },
    }


def _ping() -> dict[str, Any]:
    status = {"type": "object", "properties": {"status": {"type": "string"}}}
    return {
        "summary": "Health",
        "operationId": "ping",
        "responses": {
            "200": _body("A self-test has passed and requests are answered.", {JSON: status}),
            "500": _body("The engine is dead.", {JSON: status}),
            "503": _body("Loading or stopping.", {JSON: status}),
        },
    }


def _execution_parameters() -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {
            "MaxConcurrentTransforms": {"type": "integer"},
            "BatchStrategy": {"type": "string"},
            "MaxPayloadInMB": {"type": "integer"},
        },
    }
    return {
        "summary": "Limits of a batch transform job",
        "operationId": "execution_parameters",
        "responses": {"200": _body("The limits.", {JSON: parameters})},
    }


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _any_of(*names: str) -> dict[str, Any]:
    return {"anyOf": [_ref(name) for name in names]}


def _body(description: str, schemas: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "description": description,
        "content": {media_type: {"schema": schema} for media_type, schema in schemas.items()},
    }
