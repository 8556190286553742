"""Hostile bodies for the routes of OpenAI's clients, from a seed."""

import base64
import io
import json
import random
from typing import Any

from PIL import Image

from inference.openai.requests import CHAT, EDITS, GENERATIONS, MODELS
from inference.openai.schema import PASSED, ChatRequest, EditRequest, ImagesRequest

BOUNDARY = "cut-here"
_ROUTES = (GENERATIONS, GENERATIONS, EDITS, CHAT, CHAT)
_ALSO = (
    MODELS,
    f"{MODELS}/x",
    "/v1/",
    "/v1/audio/speech",
    "/v1/images/generations/",
    "/invocations",
)
_TEXTS = (
    "",
    " ",
    "a red square",
    "\0",
    "\ud800",
    "auto",
    "png",
    "url",
    "16x16",
    "é" * 50,
    "a" * 3000,
)
_NUMBERS = (0, 1, -1, 2, 0.5, 1e308, 2**63, True, False, None)
_OTHERS: tuple[Any, ...] = ([], {}, ["text"], {"type": "text"}, [[[]]], {"include_usage": True})
_CONTENTS: tuple[Any, ...] = (
    *("a red square",) * 4,
    *("", None, 3, [], {}, ["a"], [{}], [{"type": "text"}], [{"type": "text", "text": 3}]),
    [{"type": "text", "text": "a red square"}],
    [{"type": "image_url", "image_url": {"url": "https://localhost/x.png"}}],
)
_ROLES = (*("user",) * 4, "system", "assistant", "", None, 3)


def openai_request(chance: random.Random, files: list[str]) -> tuple[str, str, bytes]:
    """Return route, Content-Type and body of a request. files: base64 texts of image files."""
    route = chance.choice(_ROUTES)
    if route == EDITS:
        form = f"multipart/form-data; boundary={BOUNDARY}"
        return route, chance.choice((form,) * 9 + ("multipart/form-data",)), _form(chance, files)
    fields = _fields(chance, ChatRequest if route == CHAT else ImagesRequest)
    if route == CHAT:
        messages: list[Any] = [
            {"role": chance.choice(_ROLES), "content": chance.choice(_CONTENTS)}
            for _ in range(chance.randint(0, 3))
        ]
        fields["messages"] = messages + chance.choice(
            ([{"role": "user", "content": "red"}], [3], [])
        )
    else:
        fields["prompt"] = chance.choice(("a red square",) * 6 + _TEXTS)
    body = json.dumps(fields).encode()
    if chance.random() < 0.05:
        body = b" " * 300_000 + body
    return chance.choice((route,) * 12 + _ALSO), "application/json", body


def _fields(chance: random.Random, kind: Any) -> dict[str, Any]:
    names = chance.sample([*kind.model_fields, *PASSED], k=chance.choice((0, 0, 1, 2, 4)))
    values = (*_NUMBERS, *_TEXTS, *_OTHERS)
    return {"num_candidates": 1} | {name: chance.choice(values) for name in names}


def _form(chance: random.Random, files: list[str]) -> bytes:
    """Return parts of a form, whose mask is sound for sound images of 16 x 16 pixels at times."""
    parts: list[tuple[str, str, bytes]] = []
    texts = _fields(chance, EditRequest) | {"prompt": "a red square"}
    for name, value in texts.items():
        text = value if isinstance(value, str) else json.dumps(value)
        parts.append((f'name="{name}"', "", text.encode("utf-8", "surrogatepass")))
    image = base64.b64decode(chance.choice(files))
    for name, content in (("image", image), ("mask", chance.choice((_mask(chance), image)))):
        if chance.random() < 0.9:
            place = chance.choice((name, name, name, f"{name}[]"))
            parts.append((f'name="{place}"; filename="a.png"', "image/png", content))
    body = b""
    for disposition, kind, content in parts:
        body += f"--{BOUNDARY}\r\nContent-Disposition: form-data; {disposition}\r\n".encode()
        body += f"Content-Type: {kind}\r\n".encode() if kind else b""
        body += b"\r\n" + content + b"\r\n"
    return body + f"--{BOUNDARY}--\r\n".encode()


def _mask(chance: random.Random) -> bytes:
    width, height = chance.choice(((16, 16), (16, 16), (8, 8), (1, 16)))
    mask = Image.new("RGBA", (width, height))
    mask.paste((255, 0, 0, 255), (0, 0, width, chance.choice((4, 8, 12, 5, 16, 0))))
    mask = mask.convert(chance.choice(("RGBA", "RGBA", "LA", "RGB", "P")))
    file = io.BytesIO()
    mask.save(file, chance.choice(("PNG", "PNG", "WEBP", "GIF")))
    return file.getvalue()
