"""What the tests of OpenAI's routes share: a request by Flask's test client, and events read."""

import json
from typing import Any

from flask.testing import FlaskClient


def post(client: FlaskClient, route: str, body: object, **headers: str) -> Any:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post(
        route, data=data, headers={"Content-Type": "application/json"} | names, buffered=True
    )


def events(body: bytes) -> list[tuple[str, Any]]:
    """Name and data of each server-sent event. Its data may be a word, as in [DONE]."""
    found = []
    for event in body.decode().removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in event.split("\n"))
        data = fields["data"]
        found.append((fields.get("event", ""), json.loads(data) if data[0] == "{" else data))
    return found
