"""Bodies read with child processes: the same requests, the same errors, and nobody else waits."""

import base64
import io
import json
import os
import signal
import threading
import time

import numpy as np
import pytest
from PIL import Image

from dalle.errors import PlatformError, UserError
from dalle.preprocess.images import decode_image, to_square
from dalle.preprocess.square import Square
from inference.api.parsing import BodyKind, parse_request
from inference.api.schema import ClassifyRequest, GenerateRequest, Limits
from inference.server import bodies as bodies_module
from inference.server.bodies import LARGE_BYTES, LARGE_PIXELS, NUM_PROCESSES, BodyReader

LIMITS = Limits(max_candidates=7)


def image_file(width: int = 300, height: int = 200, format: str = "PNG") -> str:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format=format)
    return base64.b64encode(file.getvalue()).decode()


def small_file(megapixels: int) -> str:
    """A palette PNG of a few kB, whatever it takes when it is decoded."""
    file = io.BytesIO()
    Image.new("P", (1000 * megapixels, 1000)).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def pixels_of(text: str | None, size: int) -> np.ndarray:
    assert text is not None
    return to_square(decode_image(base64.b64decode(text), what="x", min_side=size), size)


def never(deadline_seconds: float | None) -> None:
    """Give no request up."""


@pytest.fixture(scope="module")
def bodies():
    reader = BodyReader()
    yield reader
    reader.close()


def read(reader: BodyReader, body: object, kind: BodyKind = BodyKind.JSON, check=never):
    """Read a body that counts as large, whatever its size."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    sizes = {"prime_size": 16, "clip_square": Square(24)}
    return reader.read(data, kind, limits=LIMITS, **sizes, check=check)


@pytest.fixture
def all_are_large(monkeypatch):
    monkeypatch.setattr(bodies_module, "LARGE_BYTES", 0)


def children(reader):
    return [child._process for child in reader._processes._children if child._process]


@pytest.mark.usefixtures("all_are_large")
def test_scaled_images_give_the_model_the_same_pixels(bodies):
    images = [image_file(), image_file(50, 70, "JPEG")]
    request = read(bodies, {"images": images, "classes": ["a", "b"], "top": 1})
    assert isinstance(request, ClassifyRequest)
    assert (request.classes, request.top) == (["a", "b"], 1)
    for given, small in zip(images, request.images, strict=True):
        assert len(small) < len(given)
        assert (pixels_of(small, 24) == pixels_of(given, 24)).all()
    prime = image_file()
    fields = {"caption": "a star", "seed": 3, "prime_image": prime, "prime_rows": 1}
    request = read(bodies, fields)
    assert isinstance(request, GenerateRequest)
    assert (pixels_of(request.prime_image, 16) == pixels_of(prime, 16)).all()
    plain = parse_request(json.dumps(fields).encode(), limits=LIMITS)
    same = {"prime_image": request.prime_image}
    assert request == plain.model_copy(update=same), "everything else is as it was"


@pytest.mark.usefixtures("all_are_large")
@pytest.mark.parametrize("method", ["clip", "squash"])
def test_a_published_clip_reads_the_same_pixels_of_a_large_picture(bodies, method):
    image, square = image_file(50, 70, "JPEG"), Square(24, method)
    data = json.dumps({"images": [image], "classes": ["a", "b"]}).encode()
    sizes = {"prime_size": 16, "clip_square": square}
    request = bodies.read(data, BodyKind.JSON, limits=LIMITS, **sizes, check=never)
    assert isinstance(request, ClassifyRequest)
    small, given = (base64.b64decode(text) for text in (request.images[0], image))
    assert (square.read(small, "x") == square.read(given, "x")).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("megapixels", "num_children"), [(1, 0), (2, 1)], ids=["small image", "large image"]
)
def test_a_small_body_is_read_here_unless_its_images_are_large_when_decoded(
    megapixels, num_children
):
    reader = BodyReader()
    text = small_file(megapixels)
    assert len(text) < LARGE_BYTES
    request = read(reader, {"images": [text], "classes": ["a"]})
    assert len(children(reader)) == num_children
    assert (pixels_of(request.images[0], 24) == pixels_of(text, 24)).all()
    assert (megapixels * 1_000_000 > LARGE_PIXELS) == bool(num_children)
    reader.close()


@pytest.mark.slow
@pytest.mark.usefixtures("all_are_large")
@pytest.mark.parametrize(
    "body",
    [
        b"{" + b" " * 2000,
        b"\xff" * 2000,
        {"caption": "a" * 3000},
        {"caption": "a", "num_candidates": 8, "prime_image": "x" * 2000, "prime_rows": 1},
        {"images": [image_file()], "classes": ["a"], "topp": 1},
        {"images": [image_file()], "classes": [""]},
        {f"key {number}": number for number in range(100_000)},
    ],
)
def test_errors_are_those_of_a_small_body(bodies, body):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(UserError) as here:
        parse_request(data, limits=LIMITS)
    with pytest.raises(UserError) as there:
        read(bodies, data)
    for name in ("status", "code", "field"):
        assert getattr(there.value, name) == getattr(here.value, name)
    assert str(there.value) == str(here.value)


@pytest.mark.usefixtures("all_are_large")
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("####" * 500, r"images\[1\] is not base64"),
        (base64.b64encode(b"hello" * 500).decode(), r"images\[1\] is not an image"),
        (image_file()[:2000], r"images\[1\] is truncated or damaged"),
        ("https://example.com/" + "a" * 2000, "addresses are not fetched"),
        (small_file(41), r"images\[1\] has 41000 x 1000 .*the limit is 40,000,000"),
    ],
)
def test_an_image_that_cannot_be_used_is_named(bodies, text, says):
    with pytest.raises(UserError, match=says) as caught:
        read(bodies, {"images": [image_file(20, 20), text], "classes": ["a"]})
    assert (caught.value.status, caught.value.field) == (400, "images[1]")


@pytest.mark.parametrize("text", [base64.b64encode(b"hello").decode(), "AAAA"])
def test_what_is_no_image_is_left_for_the_engine_to_refuse(bodies, text):
    assert read(bodies, {"images": [text], "classes": ["a"]}).images == [text]


@pytest.mark.usefixtures("all_are_large")
def test_plain_text_has_its_limit_too(bodies):
    with pytest.raises(UserError, match="must have at most 2000 characters"):
        read(bodies, b"a " * 2000, BodyKind.TEXT)
    assert read(bodies, b"a star", BodyKind.TEXT).caption == "a star"


@pytest.mark.slow
@pytest.mark.usefixtures("all_are_large")
def test_a_child_that_has_died_is_replaced():
    reader = BodyReader()
    body = {"images": [image_file()], "classes": ["a"]}
    read(reader, body)
    (child,) = children(reader)
    child.kill()
    child.wait()
    assert isinstance(read(reader, body), ClassifyRequest)
    assert children(reader) != [child]
    reader.close()


@pytest.mark.usefixtures("all_are_large")
def test_a_body_that_kills_each_child_is_refused(monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/true")
    with pytest.raises(PlatformError, match="died of it") as caught:
        read(BodyReader(), {"images": [image_file()], "classes": ["a"]})
    assert caught.value.status == 503


@pytest.mark.usefixtures("all_are_large")
def test_more_requests_than_children_get_their_own_replies(bodies):
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        body = {"images": [image_file()] * 2, "classes": [f"class {number}"]}
        found[number] = read(bodies, body).classes[0]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {number: f"class {number}" for number in range(6)}
    assert len(children(bodies)) <= NUM_PROCESSES


@pytest.mark.slow
def test_a_request_waits_for_one_image_of_each_other_and_not_for_all_of_them(bodies):
    """Children are taken in turn, image by image: whoever came first does not keep them."""
    order: list[str] = []
    gate = threading.Barrier(NUM_PROCESSES + 1)
    reader = BodyReader()

    def noting(name: str):
        def check(deadline_seconds: float | None) -> None:
            pass

        def run(body):
            read(reader, body, check=check)
            order.append(name)

        return run

    heavy = {"images": [small_file(4)] * 12, "classes": ["a"]}
    threads = [
        threading.Thread(target=lambda: (gate.wait(60), noting("heavy")(heavy)))
        for _ in range(NUM_PROCESSES)
    ]
    for thread in threads:
        thread.start()
    gate.wait(60)
    while len(children(reader)) < NUM_PROCESSES:
        time.sleep(0.001)
    noting("light")({"images": [small_file(2)], "classes": ["a"]})
    for thread in threads:
        thread.join(120)
    assert order[0] == "light"
    assert order.count("heavy") == NUM_PROCESSES
    reader.close()


class GivenUp(Exception):  # noqa: N818 - as Cancelled
    """What `check` raises in these tests."""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["in a child", "in the queue"])
def test_a_request_is_given_up_wherever_it_is(where):
    """Stopped children, as hung ones: those that wait for them leave, and others get new ones."""
    reader = BodyReader()
    body = {"images": [small_file(2)], "classes": ["a"]}
    first = [reader._processes._take(lambda: None) for _ in range(NUM_PROCESSES)]
    for child in first:
        child._start()
        os.kill(child._process.pid, signal.SIGSTOP)
    held = [] if where == "in a child" else first
    if not held:
        for child in first:
            reader._processes._give(child)

    def check(deadline_seconds: float | None) -> None:
        raise GivenUp

    with pytest.raises(GivenUp):
        read(reader, body, check=check)
    for child in held:
        reader._processes._give(child)
        child.end()
    assert isinstance(read(reader, body), ClassifyRequest)
    assert not reader._processes._waiting
    reader.close()


def test_a_child_that_hangs_is_replaced_after_a_time(monkeypatch, tmp_path):
    program = tmp_path / "hangs"
    program.write_text("#!/bin/sh\nexec sleep 3600\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    reader = BodyReader(task_seconds=0.5)
    body = {"images": [small_file(2)], "classes": ["a"]}
    child = reader._processes._take(lambda: None)
    reader._processes._give(child)
    with pytest.raises(PlatformError, match=r"images\[0\] could not be read within 0.5 s") as error:
        read(reader, body)
    assert error.value.status == 503
    assert child._process is None
    reader.close()


@pytest.mark.slow
def test_a_child_that_was_stopped_is_replaced_at_once():
    """Its request is answered all the same, as that of a child that has died."""
    reader = BodyReader()
    child = reader._processes._take(lambda: None)
    child._start()
    stopped = child._process.pid
    os.kill(stopped, signal.SIGSTOP)
    reader._processes._give(child)
    body = {"images": [small_file(2)], "classes": ["a"]}
    assert isinstance(read(reader, body), ClassifyRequest)
    assert child._process.pid != stopped
    reader.close()


@pytest.mark.slow
def test_a_child_whose_parent_ends_ends_without_a_word(capfd):
    order = {"task": "scale", "field": "x", "size": 4, "method": "train", "lengths": [3]}
    whole = json.dumps(order).encode() + b"\nabc"  # its reply is never read
    children = []
    for sent in (b"", whole, whole + whole[:9], whole[:-1]):
        child = bodies_module._Child(bodies_module.MEMORY_BYTES)
        children.append(child)
        connection = child._start()
        connection.sendall(sent)
        connection.close()
    assert [child._process.wait() for child in children] == [0] * 4
    assert capfd.readouterr() == ("", "")


def test_the_deadline_is_told_as_soon_as_it_is_known():
    reader = BodyReader()
    told: list[float | None] = []

    def check(deadline_seconds: float | None) -> None:
        told.append(deadline_seconds)
        if deadline_seconds is not None:
            raise GivenUp

    body = {"images": [small_file(39)] * 3, "classes": ["a"], "deadline_seconds": 2.0}
    with pytest.raises(GivenUp):
        read(reader, body, check=check)
    assert told[-1] == 2.0
    reader.close()


@pytest.mark.slow
@pytest.mark.usefixtures("all_are_large")
def test_a_child_whose_memory_is_over_says_so_and_lives_on():
    reader = BodyReader(memory_bytes=64 << 20)
    with pytest.raises(UserError, match="the body takes more than 64 MiB of memory") as caught:
        read(reader, b"[" + b"[]," * 2_000_000 + b"1]")
    assert (caught.value.status, caught.value.code) == (413, "payload_too_large")
    with pytest.raises(UserError, match=r"images\[0\] takes more than 64 MiB") as caught:
        read(reader, {"images": [small_file(39)], "classes": ["a"]})
    assert caught.value.field == "images[0]"
    assert len(children(reader)) == 1
    assert read(reader, {"caption": "a"}).caption == "a"
    reader.close()
