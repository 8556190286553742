"""POST /v1/images/edits: an image's top rows are kept, and any other mask is refused by name."""

import base64
import io
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from werkzeug.datastructures import FileStorage
from werkzeug.test import stream_encode_multipart

from dalle.errors import UserError
from inference.api.schema import Limits
from inference.openai.edits import read_edit
from inference.openai.masks import kept_rows
from inference.openai.schema import EditRequest
from inference.server import app
from inference.server.app import create_app
from inference.server.openai.handler import OpenAIHandler
from tests.inference.openai.posting import events, file_of, mask
from tests.inference.server.app_fixtures import ATTRIBUTES, PATIENCE, SETTINGS, in_background

ROUTE = "/v1/images/edits"


@pytest.fixture(autouse=True)
def with_grid(engine):
    """The model has a grid of four rows, each of two pixels."""
    engine.card = engine.card.model_copy(update={"image_size": 8, "grid_size": 4})


def picture(width: int = 8, height: int = 8, mode: str = "RGB") -> bytes:
    return file_of(Image.new(mode, (width, height), "red"))


def edit(client, path=ROUTE, headers=None, **parts: object):
    """Send a form: bytes are files, everything else is text."""
    data = {
        name: FileStorage(io.BytesIO(part), f"{name}.png") if isinstance(part, bytes) else part
        for name, part in ({"prompt": "a", "image": picture()} | parts).items()
        if part is not None
    }
    body, _, boundary = stream_encode_multipart(data, use_tempfile=False)
    content_type = f"multipart/form-data; boundary={boundary}"
    return client.post(
        path, data=body.read(), headers=headers, content_type=content_type, buffered=True
    )


def test_the_rows_above_the_transparent_part_of_the_mask_are_kept(client, engine):
    image = picture()
    response = edit(client, image=image, mask=mask(4, 8), n="2", num_candidates="3", seed="7")
    assert response.status_code == 200, response.json
    (request,) = engine.asked
    assert (request.caption, request.num_candidates, request.num_images) == ("a", 3, 2)
    assert (base64.b64decode(request.prime_image), request.prime_rows) == (image, 2)
    assert [each["candidate"] for each in response.json["data"]] == [2, 1]
    assert response.json["usage"]["input_tokens_details"]["image_tokens"] == 2 * 4


def test_without_a_mask_the_images_own_transparency_is_one(client, engine):
    image = mask(6, 8)
    assert edit(client, image=image).status_code == 200
    assert (base64.b64decode(engine.asked[0].prime_image), engine.asked[0].prime_rows) == (image, 3)


def test_a_list_of_one_image_is_an_image(client, engine):
    assert edit(client, image=None, **{"image[]": picture()}, mask=mask(2, 8)).status_code == 200
    assert engine.asked[0].prime_rows == 1


def test_an_image_of_a_megabyte_is_read(engine_core, engine):
    noise = np.random.default_rng(7).integers(0, 256, (600, 600, 3), np.uint8)
    image = file_of(Image.fromarray(noise))
    assert len(image) > 1_000_000
    client = create_app(engine_core, replace(SETTINGS, limits=Limits())).test_client()
    response = edit(client, image=image, mask=mask(300, 600))
    assert response.status_code == 200, response.json
    assert engine.asked[0].prime_rows == 2


def test_of_an_upload_nothing_is_held_while_pictures_are_made(engine_core, engine, monkeypatch):
    """Neither the body, nor the image and the mask in it, nor the image in base64."""
    bodies_gone: list[bool] = []
    read, scaled = app._read_body, OpenAIHandler._with_small_images
    large: list[weakref.ref[Any]] = []

    class Body(bytes):
        def __del__(self) -> None:
            bodies_gone.append(True)

    def note(handler, request):
        large.append(weakref.ref(request))
        return scaled(handler, request)

    monkeypatch.setattr(app, "_read_body", lambda limits: Body(read(limits)))
    monkeypatch.setattr(OpenAIHandler, "_with_small_images", note)
    client = create_app(engine_core, SETTINGS).test_client()
    engine.gate.clear()
    thread, answers = in_background(lambda: edit(client, mask=mask(4, 8)))
    assert engine.begun.acquire(timeout=PATIENCE)
    try:
        assert bodies_gone == [True]
        assert large[0]() is None
    finally:
        engine.gate.set()
        thread.join(PATIENCE)
    assert answers[0].status_code == 200


def test_the_fields_of_an_edit_have_no_files():
    body, _, boundary = stream_encode_multipart(
        {"prompt": "a", "image": FileStorage(io.BytesIO(mask(4, 8)), "image.png")}
    )
    content_type = f"multipart/form-data; boundary={boundary}"
    call = read_edit(body.read(), content_type, limits=Limits(), image_size=8, grid_size=4)
    assert isinstance(call.fields, EditRequest)
    assert (call.fields.image, call.fields.mask) == (b"", None)


def test_a_text_that_no_field_needs_is_a_413_that_says_the_limit(engine_core):
    client = create_app(engine_core, replace(SETTINGS, limits=Limits())).test_client()
    response = edit(client, mask=mask(4, 8), prompt="a" * 131_073)
    assert (response.status_code, response.json["error"]["code"]) == (413, "payload_too_large")
    assert "a text of more than 131,072 bytes" in response.json["error"]["message"]


def test_numbers_and_truths_of_a_form_are_read_as_such(client, engine):
    fields = {"guidance_scale": "2.5", "top_k": "null", "stream": "true", "partial_images": "1"}
    fields |= {"model": "1", "user": "null", "num_candidates": "1"}
    response = edit(client, mask=mask(4, 8), **fields)
    names = [name for name, _ in events(response.data)]
    assert names == ["image_edit.partial_image", "image_edit.completed"]
    assert (engine.asked[0].guidance_scale, engine.asked[0].top_k) == (2.5, None)


def test_edits_are_reached_by_an_invocations_attributes(client, engine):
    response = edit(client, "/invocations", {ATTRIBUTES: f"route={ROUTE}"}, mask=mask(2, 8))
    assert (response.status_code, engine.asked[0].prime_rows) == (200, 1)


@pytest.mark.parametrize(
    ("parts", "status", "param", "code", "says"),
    [
        ({"image": None, "mask": mask(4, 8)}, 400, "image", "invalid_request", "image is missing"),
        ({"prompt": None}, 400, "prompt", "invalid_request", "prompt is missing"),
        ({}, 400, "mask", "unsupported_mask", "mask is missing, or without it an image with an"),
        ({"mask": picture()}, 400, "mask", "unsupported_mask", "must have an alpha channel"),
        ({"mask": mask(0, 8)}, 400, "mask", "unsupported_mask", "0 of 4 rows of the model's grid"),
        ({"mask": mask(8, 8)}, 400, "mask", "unsupported_mask", "4 of 4 rows of the model's grid"),
        ({"mask": mask(3, 8)}, 400, "mask", "unsupported_mask", "4 rows of pixels are the nearest"),
        ({"mask": mask(8, 8, first=4)}, 400, "mask", "unsupported_mask", "kept pixels below"),
        ({"mask": mask(4, 9, 8)}, 400, "mask", "unsupported_mask", "the image's 8 x 8 pixels"),
        ({"mask": b"GIF89a"}, 400, "mask", "bad_image", "give a PNG, WEBP file"),
        ({"image": b"hello"}, 400, "image", "bad_image", "image is no image"),
        ({"mask": mask(4, 8)[:60]}, 400, "mask", None, "mask is"),
        ({"mask": mask(4, 8), "size": "9x9"}, 400, "size", "invalid_request", "auto or 8x8"),
        (
            {"mask": mask(4, 8), "n": "many"},
            400,
            "n",
            "invalid_request",
            'valid integer, got "many"',
        ),
        (
            {"mask": mask(4, 8), "prime_rows": "1"},
            400,
            "prime_rows",
            "invalid_request",
            "is unknown",
        ),
        ({"mask": mask(4, 8), "markup": picture()}, 400, "markup", "invalid_request", "is a file"),
        ({"mask": mask(4, 8), "image": "x"}, 400, "image", "invalid_request", "must be a file"),
        ({"mask": "x"}, 400, "mask", "invalid_request", "mask must be a file, got a text: 'x'"),
        ({"mask": mask(4, 8), "prompt": "a" * 70_000}, 413, None, "payload_too_large", "20,000"),
    ],
)
def test_a_refused_edit_says_what_the_model_can_do(
    client, engine, parts, status, param, code, says
):
    response = edit(client, **parts)
    error = response.json["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert code in (None, error["code"])
    assert says in error["message"]
    assert engine.asked == [], "no device time may be spent on a refused request"


def test_several_images_are_refused(client):
    data = {"prompt": "a", "image[]": [(io.BytesIO(picture()), f"{n}.png") for n in range(2)]}
    response = client.post(ROUTE, data=data, content_type="multipart/form-data")
    assert (response.status_code, response.json["error"]["param"]) == (400, "image")
    assert "one file, got 2" in response.json["error"]["message"]


@pytest.mark.parametrize(
    ("body", "content_type", "status", "code"),
    [
        (b"{}", "application/json", 415, "unsupported_media_type"),
        (b"a", "multipart/form-data", 400, "malformed_body"),
        (b"--x\r\nnonsense", "multipart/form-data; boundary=x", 400, "malformed_body"),
        (b'--x\r\nContent-Disposition: form-data; name="n"\r\n\r\n1\r\n' * 99 + b"--x--",
         "multipart/form-data; boundary=x", 413, "payload_too_large"),
    ],
)  # fmt: skip
def test_a_body_that_is_no_form_is_refused(client, body, content_type, status, code):
    response = client.post(ROUTE, data=body, content_type=content_type)
    assert (response.status_code, response.json["error"]["code"]) == (status, code)


@pytest.mark.parametrize(
    ("size", "kept", "grid", "rows"),
    [
        ((8, 8), 2, 4, 1),
        ((100, 100), 50, 8, 4),
        ((100, 100), 12, 8, 1),  # the row ends at 12.5
        ((100, 100), 13, 8, 1),
        ((200, 100), 50, 4, 2),  # wider than high: the middle is used
        ((100, 200), 100, 4, 2),  # higher than wide: the first row used is the 50th
        ((100, 200), 75, 4, 1),
    ],
)
def test_pixels_that_are_kept_are_counted_in_the_centre_square(size, kept, grid, rows):
    width, height = size
    keeping = mask(kept, width, height)
    assert kept_rows(picture(width, height), keeping, grid) == rows


def test_rows_above_the_centre_square_are_not_kept_rows_of_the_grid():
    with pytest.raises(UserError, match="0 of 4 rows of the model's grid"):
        kept_rows(picture(100, 200), mask(50, 100, 200), 4)


def test_half_transparent_pixels_are_kept():
    assert kept_rows(picture(), mask(4, 8, kept=1), 4) == 2


def test_a_photo_on_its_side_has_the_width_and_height_that_it_is_seen_with():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = file_of(Image.new("RGB", (16, 8)), "JPEG", exif=exif)
    assert kept_rows(image, mask(8, 8, 16), 4) == 2


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage!garbage", b"Exif\0\0II*\0"])
def test_exif_data_that_cannot_be_read_turn_nothing(exif):
    pixels = np.zeros((8, 16, 4), np.uint8)
    pixels[:4, :, 3] = 255
    image = file_of(Image.fromarray(pixels), exif=exif)
    assert kept_rows(image, mask(4, 16, 8), 4) == 2
    assert kept_rows(image, None, 4) == 2


def test_a_large_image_is_measured_without_decoding_it():
    image = picture(4096, 2048)
    cut = image[: len(image) // 2]  # no decoder would take it
    with pytest.raises(UserError, match="the image's 4096 x 2048 pixels"):
        kept_rows(cut, mask(4, 8), 4)


def test_a_mask_of_too_many_pixels_is_refused_by_its_header():
    large = file_of(Image.new("LA", (4096, 2048)))
    with pytest.raises(UserError, match="at most 4,194,304 pixels, got 4096 x 2048"):
        kept_rows(picture(4096, 2048), large, 4)
