"""OpenAPI 3.1 document of all routes: those of `api.openapi`, and those in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from dalle.manifest import SamplingSettings
from inference.api import openapi
from inference.api.openapi import body, content, get, model_schemas, ref, refusals
from inference.api.parsing import JSON
from inference.api.schema import GenerateRequest, Limits
from inference.openai.rendering import EVENT_STREAM
from inference.openai.replies import (
    ChatChunk,
    ChatCompletion,
    CompletedEvent,
    ImagesReply,
    ModelInfo,
    ModelList,
    OpenAIErrorEvent,
    OpenAIErrorReply,
    PartialImageEvent,
)
from inference.openai.requests import CHAT, EDITS, GENERATIONS, MODELS, ROUTES
from inference.openai.schema import (
    DEFAULTS,
    PASSED,
    PASSED_BY_CHATS,
    PASSED_BY_EDITS,
    ChatRequest,
    EditRequest,
    ImagesRequest,
)

_MODELS: tuple[type[BaseModel], ...] = (
    ImagesRequest,
    EditRequest,
    ChatRequest,
    ImagesReply,
    PartialImageEvent,
    CompletedEvent,
    ChatCompletion,
    ChatChunk,
    ModelList,
    ModelInfo,
    OpenAIErrorReply,
    OpenAIErrorEvent,
)


def _events(*names: str, last: str | None = None) -> dict[str, Any]:
    """Return the schema of each server-sent event. names: of its data; last: data that is no JSON.

    An event is an object of strings, as OpenAPI 3.2 and schemathesis have it; its data are JSON.
    """
    data: dict[str, Any] = {
        "type": "string",
        "contentMediaType": JSON,
        "contentSchema": {"anyOf": [ref(name) for name in names]},
    }
    if last is not None:
        data = {"anyOf": [{"const": last}, data]}
    return {
        "type": "object",
        "properties": {"event": {"type": "string"}, "data": data},
        "required": ["data"],
    }


_PICTURES = {
    JSON: ref("ImagesReply"),
    EVENT_STREAM: _events("PartialImageEvent", "CompletedEvent", "OpenAIErrorEvent"),
}
_LATE = "Errors after the first event are the last event of a stream."


def document(limits: Limits) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of a server with these limits."""
    whole = openapi.document(limits)
    schemas = whole["components"]["schemas"]
    schemas.update(model_schemas(_MODELS))
    kinds: dict[type[BaseModel], tuple[str, ...]] = {
        ImagesRequest: PASSED,
        EditRequest: PASSED_BY_EDITS,
        ChatRequest: PASSED_BY_CHATS,
    }
    for kind, names in kinds.items():
        _pass_fields(schemas, kind, names)
        schemas[kind.__name__]["properties"]["n"]["maximum"] = limits.max_images
        _allow_null(schemas[kind.__name__])
    whole["paths"] |= {
        GENERATIONS: _post(
            "images_generations",
            "Generate pictures, in the form of OpenAI's API",
            {ROUTES[GENERATIONS]: ref("ImagesRequest")},
            _PICTURES,
        ),
        EDITS: _post(
            "images_edits",
            "Continue an image below its top rows, in the form of OpenAI's API",
            {ROUTES[EDITS]: ref("EditRequest")},
            _PICTURES,
        ),
        CHAT: _post(
            "chat_completions",
            "Answer the last user message with pictures, in the form of OpenAI's API",
            {ROUTES[CHAT]: ref("ChatRequest")},
            {
                JSON: ref("ChatCompletion"),
                EVENT_STREAM: _events("ChatChunk", "OpenAIErrorReply", last="[DONE]"),
            },
        ),
        MODELS: get("models", "The model of this server", _listed("ModelList")),
        f"{MODELS}/{{name}}": get("model", "One model", _listed("ModelInfo", 404), ["name"]),
    }
    return whole


def with_defaults(whole: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the document of a server whose model has these defaults: field -> value."""
    schemas = dict(whole["components"]["schemas"])
    for kind in (GenerateRequest, ImagesRequest, EditRequest, ChatRequest):
        schema = schemas[kind.__name__]
        changed = {
            name: {**schema["properties"][name], "default": defaults[name]}
            for name in SamplingSettings.model_fields
        }
        schemas[kind.__name__] = {**schema, "properties": {**schema["properties"], **changed}}
    return {**whole, "components": {**whole["components"], "schemas": schemas}}


def _post(
    operation: str, summary: str, requests: dict[str, Any], replies: dict[str, Any]
) -> dict[str, Any]:
    """Return a route of POST. requests, replies: schemas by media type."""
    route = {
        "summary": summary,
        "operationId": operation,
        "description": "Also as POST /invocations with the header "
        f"X-Amzn-SageMaker-Custom-Attributes: route=/v1/…. {_LATE}",
        "requestBody": {"required": True, "content": content(requests)},
        "responses": {
            "200": body("The reply, or with stream server-sent events.", replies),
            **{
                status: refusal
                for status, refusal in refusals("OpenAIErrorReply").items()
                if status not in ("406", "422")  # Accept decides nothing; a field's fault is a 400
            },
        },
    }
    return {"post": route}


def _listed(schema: str, *refused: int) -> dict[int, tuple[str, str, dict[str, Any]]]:
    """Return the responses of a route of GET."""
    errors = dict.fromkeys(
        (*refused, 503), ("No such model, or not ready.", JSON, ref("OpenAIErrorReply"))
    )
    return {200: ("The model.", JSON, ref(schema)), **errors}


def _pass_fields(schemas: dict[str, Any], kind: type[BaseModel], names: tuple[str, ...]) -> None:
    """Add the fields of `GenerateRequest` that a request of a kind may have besides its own."""
    of_generation = schemas[GenerateRequest.__name__]["properties"]
    schemas[kind.__name__]["properties"] |= {name: of_generation[name] for name in names}
    for name, default in DEFAULTS.items():
        passed = schemas[kind.__name__]["properties"][name]
        schemas[kind.__name__]["properties"][name] = {**passed, "default": default}


def _allow_null(schema: dict[str, Any]) -> None:
    """Let every field of a request that may be missing be null, which is its default."""
    annotations = ("title", "description", "default")
    for name, field in schema["properties"].items():
        kinds = field.get("anyOf", [])
        kind = {key: value for key, value in field.items() if key not in annotations}
        if name in schema.get("required", ()) or not kind or {"type": "null"} in kinds:
            continue
        outside = {key: field[key] for key in annotations if key in field}
        schema["properties"][name] = {**outside, "anyOf": [*(kinds or [kind]), {"type": "null"}]}
