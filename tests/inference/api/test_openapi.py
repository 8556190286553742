"""The OpenAPI document: every field described, the server's limits, no dangling reference."""

import pytest

from inference.api.schema import Limits
from inference.openai import openapi

LIMITS = Limits(max_candidates=8, max_images=4, max_request_bytes=10_000)


def test_every_field_in_the_openapi_document_is_described():
    for name, schema in openapi.document(LIMITS)["components"]["schemas"].items():
        assert schema.get("description"), name
        for field, properties in schema.get("properties", {}).items():
            assert properties.get("description"), f"{name}.{field}"


def test_the_openapi_document_states_this_servers_limits():
    document = openapi.document(LIMITS)
    fields = document["components"]["schemas"]["GenerateRequest"]["properties"]
    assert document["openapi"] == "3.1.0"
    assert (fields["num_candidates"]["maximum"], fields["num_images"]["maximum"]) == (8, 4)
    assert fields["top_p"]["anyOf"][0] == {
        "type": "number",
        "exclusiveMinimum": 0.0,
        "maximum": 1.0,
    }


def test_every_reference_in_the_openapi_document_leads_somewhere():
    document = openapi.document(LIMITS)

    def references(node: object) -> list[str]:
        if isinstance(node, dict):
            inner = [each for value in node.values() for each in references(value)]
            return [*inner, node["$ref"]] if "$ref" in node else inner
        return (
            [each for value in node for each in references(value)] if isinstance(node, list) else []
        )

    found = references(document)
    assert found
    for reference in found:
        assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"]


def test_the_images_request_has_its_own_fields_and_those_that_pass_through():
    schema = openapi.document(LIMITS)["components"]["schemas"]["ImagesRequest"]
    assert {"prompt", "n", "guidance_scale", "num_candidates"} <= set(schema["properties"])
    assert schema["properties"]["n"]["anyOf"][0]["maximum"] == 4
    assert not {"caption", "num_images", "format", "preview_rows"} & set(schema["properties"])
    assert schema["required"] == ["prompt"]


@pytest.mark.parametrize("kind", ["ImagesRequest", "EditRequest", "ChatRequest"])
def test_alike_pictures_are_returned_by_default_in_openais_form_alone(kind):
    schemas = openapi.document(LIMITS)["components"]["schemas"]
    assert schemas[kind]["properties"]["distinct"]["default"] is False
    assert schemas["GenerateRequest"]["properties"]["distinct"]["default"] is True


@pytest.mark.parametrize("kind", ["ImagesRequest", "EditRequest", "ChatRequest"])
def test_null_is_allowed_for_every_field_in_openais_form_that_may_be_missing(kind):
    schema = openapi.document(LIMITS)["components"]["schemas"][kind]
    anything = {"title", "description", "default"}
    without_null = {
        name
        for name, field in schema["properties"].items()
        if {"type": "null"} not in field.get("anyOf", []) and not field.keys() <= anything
    }
    assert without_null == set(schema["required"])


def test_server_sent_events_are_documented_as_events_with_json_as_their_data():
    paths = openapi.document(LIMITS)["paths"]
    for path, last in (("/v1/images/generations", []), ("/v1/chat/completions", ["[DONE]"])):
        media = paths[path]["post"]["responses"]["200"]["content"]["text/event-stream"]
        assert media["schema"]["required"] == ["data"]
        data = media["schema"]["properties"]["data"]
        kinds = data.get("anyOf", [data])
        assert [kind["const"] for kind in kinds if "const" in kind] == last
        assert kinds[-1]["contentMediaType"] == "application/json"


def test_errors_below_v1_are_documented_in_openais_form():
    paths = openapi.document(LIMITS)["paths"]
    for path, methods in paths.items():
        for method in methods.values():
            errors = {
                media["schema"].get("$ref", "").rpartition("/")[2]
                for status, response in method["responses"].items()
                for media in response["content"].values()
                if int(status) >= 400 and path not in ("/ping",)
            }
            assert errors <= {"OpenAIErrorReply" if path.startswith("/v1/") else "ErrorReply"}
            assert "422" not in method["responses"] or path == "/invocations"
