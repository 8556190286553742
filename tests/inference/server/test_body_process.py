"""Large bodies parsed by a child process: the same requests, the same errors."""

import base64
import io
import json
import threading

import numpy as np
import pytest
from PIL import Image

from dalle.errors import PlatformError, UserError
from dalle.preprocess.images import decode_image, to_square
from inference.api.parsing import BodyKind, parse_request
from inference.api.schema import ClassifyRequest, GenerateRequest, Limits
from inference.server.body_process import BodyProcess, scale_images

LIMITS = Limits(max_candidates=7)


def image_file(width: int = 300, height: int = 200, format: str = "PNG") -> str:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format=format)
    return base64.b64encode(file.getvalue()).decode()


def pixels_of(text: str | None, size: int) -> np.ndarray:
    assert text is not None
    return to_square(decode_image(base64.b64decode(text), what="x", min_side=size), size)


@pytest.fixture(scope="module")
def body_process():
    body_process = BodyProcess()
    yield body_process
    body_process.close()


def parse(body_process: BodyProcess, body: object, kind: BodyKind = BodyKind.JSON):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return body_process.parse(data, kind, limits=LIMITS, prime_size=16, clip_size=24)


def test_scaled_images_give_the_model_the_same_pixels(body_process):
    images = [image_file(), image_file(50, 70, "JPEG")]
    large = {"images": images, "classes": ["a", "b"], "top": 1}
    request = parse(body_process, large)
    assert isinstance(request, ClassifyRequest)
    assert (request.classes, request.top) == (["a", "b"], 1)
    for given, small in zip(images, request.images, strict=True):
        assert len(small) < len(given)
        assert (pixels_of(small, 24) == pixels_of(given, 24)).all()
    prime = image_file()
    fields = {"caption": "a star", "seed": 3, "prime_image": prime, "prime_rows": 1}
    request = parse(body_process, fields)
    assert isinstance(request, GenerateRequest)
    assert (pixels_of(request.prime_image, 16) == pixels_of(prime, 16)).all()
    plain = parse_request(json.dumps(fields).encode(), limits=LIMITS)
    same = {"prime_image": request.prime_image}
    assert request == plain.model_copy(update=same), "everything else is as it was"


@pytest.mark.parametrize(
    "body",
    [
        b"{" + b" " * 2000,
        b"\xff" * 2000,
        {"caption": "a" * 3000},
        {"caption": "a", "num_candidates": 8, "prime_image": "x" * 2000, "prime_rows": 1},
        {"images": [image_file()], "classes": ["a"], "topp": 1},
        {"images": [image_file()], "classes": [""]},
    ],
)
def test_errors_are_those_of_a_small_body(body_process, body):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(UserError) as here:
        parse_request(data, limits=LIMITS)
    with pytest.raises(UserError) as there:
        parse(body_process, data)
    for name in ("status", "code", "field"):
        assert getattr(there.value, name) == getattr(here.value, name)
    assert str(there.value) == str(here.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("####" * 500, r"images\[1\] is not base64"),
        (base64.b64encode(b"hello" * 500).decode(), r"images\[1\] is not an image"),
        (image_file()[:2000], r"images\[1\] is truncated or damaged"),
        ("https://example.com/" + "a" * 2000, "addresses are not fetched"),
    ],
)
def test_an_image_that_cannot_be_used_is_named(body_process, text, says):
    with pytest.raises(UserError, match=says) as caught:
        parse(body_process, {"images": [image_file(), text], "classes": ["a"]})
    assert (caught.value.status, caught.value.field) == (400, "images[1]")


def test_plain_text_has_its_limit_too(body_process):
    with pytest.raises(UserError, match="must have at most 2000 characters"):
        parse(body_process, b"a " * 2000, BodyKind.TEXT)


def test_a_child_that_has_died_is_replaced(body_process):
    body = {"images": [image_file()], "classes": ["a"]}
    parse(body_process, body)
    child = body_process._child
    child.kill()
    child.wait()
    assert isinstance(parse(body_process, body), ClassifyRequest)
    assert body_process._child is not child


def test_a_body_that_kills_each_child_is_refused(monkeypatch, tmp_path):
    broken = BodyProcess()
    monkeypatch.setattr("sys.executable", "/bin/true")
    with pytest.raises(PlatformError, match="died of this one") as caught:
        parse(broken, {"images": [image_file()], "classes": ["a"]})
    assert caught.value.status == 503


def test_concurrent_threads_get_their_own_requests(body_process):
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        body = {"images": [image_file()], "classes": [f"class {number}"]}
        found[number] = parse(body_process, body).classes[0]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {number: f"class {number}" for number in range(6)}


def test_scale_images_returns_json_for_text_too():
    assert json.loads(
        scale_images(b"a star", BodyKind.TEXT, limits=LIMITS, prime_size=1, clip_size=1)
    ) == {"caption": "a star", "num_candidates": 7, "num_images": 4}
