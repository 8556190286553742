"""The OpenAPI document: every field described, the server's limits, no dangling reference."""

from inference.api import openapi
from inference.api.schema import Limits

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
