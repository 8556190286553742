"""What the tests of OpenAI's routes share: a request by Flask's test client, events read, masks."""

import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from flask.testing import FlaskClient
from PIL import Image


def post(client: FlaskClient, route: str, body: object, **headers: str) -> Any:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post(
        route, data=data, headers={"Content-Type": "application/json"} | names, buffered=True
    )


def streaming(client: FlaskClient, route: str, body: object) -> Iterator[bytes]:
    """The parts of a stream, each when it is taken."""
    response = client.post(route, json=body)
    assert response.status_code == 200
    return iter(response.iter_encoded())


def events(body: bytes) -> list[tuple[str, Any]]:
    """Name and data of each server-sent event. Its data may be a word, as in [DONE]."""
    found = []
    for event in body.decode().removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in event.split("\n"))
        data = fields["data"]
        found.append((fields.get("event", ""), json.loads(data) if data[0] == "{" else data))
    return found


def file_of(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def mask(
    rows: int, width: int, height: int | None = None, *, first: int = 0, kept: int = 255
) -> bytes:
    """A mask that keeps the pixels from row `first` to before row `rows`; height: as width."""
    pixels = np.zeros((height or width, width, 4), np.uint8)
    pixels[first:rows, :, 3] = kept
    return file_of(Image.fromarray(pixels))
