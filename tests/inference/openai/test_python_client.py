"""OpenAI's own Python client against a real `serve`."""

import base64
import importlib
import re

import pytest
from PIL import Image

from inference.openai.schema import MODEL
from tests.inference.openai.conftest import client_of
from tests.inference.openai.posting import file_of, mask
from tests.inference.server.app_fixtures import pixels_of

pytestmark = pytest.mark.slow

ASKED = {"model": "gpt-image-2", "prompt": "a red square"}


@pytest.fixture(scope="module")
def openai():
    """The library, which takes seconds to import: only when these tests run."""
    return importlib.import_module("openai")


def of_invocations(served, **fields) -> list[str]:
    return [each["image"] for each in served.ask(**fields).json()["images"]]


def test_its_pictures_are_those_of_an_invocation_with_the_same_seed(served, api):
    reply = api.images.generate(**ASKED, n=2, extra_body={"seed": 7, "num_candidates": 4})
    assert [each.b64_json for each in reply.data] == of_invocations(
        served, num_candidates=4, num_images=2
    )
    assert pixels_of(reply.data[0].b64_json).shape == (16, 16, 3)
    assert (reply.size, reply.output_format, reply.seed) == ("16x16", "png", 7)
    # Three words, and 16 image tokens of each picture.
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (3, 32)


def test_its_stream_has_partial_pictures_and_ends_with_the_same_picture(api):
    extra = {"seed": 7, "num_candidates": 2}
    plain = api.images.generate(**ASKED, extra_body=extra)
    stream = api.images.generate(**ASKED, stream=True, partial_images=3, extra_body=extra)
    *partial, last = list(stream)
    assert [type(each).__name__ for each in partial] == ["ImageGenPartialImageEvent"] * 3
    assert [each.partial_image_index for each in partial] == [0, 1, 2]
    assert (pixels_of(partial[0].b64_json)[4:] == 128).all()  # grey below the first row
    assert type(last).__name__ == "ImageGenCompletedEvent"
    assert last.b64_json == plain.data[0].b64_json


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_it_gets_the_format_that_it_asks_for(api, kind):
    reply = api.images.generate(**ASKED, output_format=kind, extra_body={"num_candidates": 1})
    file = base64.b64decode(reply.data[0].b64_json)
    assert file.startswith({"jpeg": b"\xff\xd8\xff", "webp": b"RIFF"}[kind])


def test_its_edit_keeps_the_rows_that_the_mask_keeps(served, api):
    image = file_of(Image.new("RGB", (16, 16), "red"))
    extra = {"seed": 7, "num_candidates": 2}
    reply = api.images.edit(image=image, mask=mask(8, 16), prompt="a red square", extra_body=extra)
    prime = {"prime_image": base64.b64encode(image).decode(), "prime_rows": 2}
    assert [reply.data[0].b64_json] == of_invocations(served, num_images=1, **prime)
    events = api.images.edit(
        image=image, mask=mask(8, 16), prompt="a red square", stream=True, extra_body=extra
    )
    (last,) = list(events)
    assert (last.type, last.b64_json) == ("image_edit.completed", reply.data[0].b64_json)


def test_an_edit_that_the_model_cannot_do_is_raised_as_its_bad_request_error(openai, api):
    image = file_of(Image.new("RGB", (16, 16), "red"))
    with pytest.raises(openai.BadRequestError, match="4 rows of pixels are the nearest") as raised:
        api.images.edit(image=image, mask=mask(5, 16), prompt="a red square")
    assert (raised.value.param, raised.value.code) == ("mask", "unsupported_mask")


def test_a_wrong_value_is_raised_as_its_bad_request_error(openai, api):
    with pytest.raises(openai.BadRequestError, match="must be auto or 16x16") as raised:
        api.images.generate(**ASKED, size="1024x1024")
    assert (raised.value.param, raised.value.code) == ("size", "invalid_request")
    assert raised.value.type == "invalid_request_error"


def test_a_wrong_value_of_a_stream_is_raised_before_it_begins(openai, api):
    with pytest.raises(openai.BadRequestError, match="prompt must be at most 8 tokens"):
        api.images.generate(model="", prompt="red " * 12, stream=True)


def test_a_passed_deadline_is_its_internal_server_error_and_is_not_repeated(openai, served, api):
    def passed() -> int:
        found = re.search(r'total{status="504"} (\d+)', served.get("/metrics").text)
        return int(found[1]) if found else 0

    before = passed()
    with pytest.raises(openai.InternalServerError, match="deadline"):
        api.with_options(max_retries=2).images.generate(
            **ASKED, extra_body={"deadline_seconds": 1e-6}
        )
    assert passed() <= before + 1


def test_an_unknown_model_is_raised_as_its_not_found_error(openai, api):
    assert [each.id for each in api.models.list()] == [MODEL]
    assert api.models.retrieve(MODEL).created >= 0
    with pytest.raises(openai.NotFoundError) as raised:
        api.models.retrieve("gpt-5")
    assert raised.value.code == "model_not_found"


def chat(api, messages, **fields):
    extra = {"seed": 7, "num_candidates": 2}
    return api.chat.completions.create(model="", messages=messages, extra_body=extra, **fields)


def test_its_chat_gets_the_picture_of_an_invocation(served, api):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "a red square"},
    ]
    reply = chat(api, messages)
    (part,) = reply.choices[0].message.content
    (image,) = of_invocations(served, num_images=1)
    assert part["image_url"]["url"] == f"data:image/png;base64,{image}"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (3, 16)


def test_its_streamed_chat_gets_the_same_picture(served, api):
    messages = [{"role": "user", "content": [{"type": "text", "text": "a red square"}]}]
    options = {"include_usage": True}
    chunks = list(chat(api, messages, stream=True, stream_options=options))
    parts = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    (image,) = of_invocations(served, num_images=1)
    assert [part["image_url"]["url"] for (part,) in parts] == [f"data:image/png;base64,{image}"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == 16


# Its types say that content is text; pictures are there as vLLM-Omni hands them over.
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_its_helper_for_streams_puts_the_chat_together(api):
    messages = [{"role": "user", "content": "a red square"}]
    with api.chat.completions.stream(model="", messages=messages) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content[0]["type"] == "image_url"


def test_a_chat_goes_on_after_pictures_in_its_history(openai, served, api):
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 400_000}}
    history = [{"role": "user", "content": "b"}, {"role": "assistant", "content": [picture]}]
    asked = {"role": "user", "content": "a red square"}
    (part,) = chat(api, [*history, asked]).choices[0].message.content
    assert part["image_url"]["url"].endswith(of_invocations(served, num_images=1)[0])
    with pytest.raises(openai.BadRequestError, match="a part of type 'image_url'"):
        chat(api, [*history, {"role": "user", "content": [picture]}])
    with pytest.raises(openai.APIStatusError, match="262,144 bytes") as raised:
        chat(api, [{"role": "user", "content": "a" * 300_000}])
    assert raised.value.status_code == 413


def test_tools_are_raised_as_its_bad_request_error(openai, api):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(openai.BadRequestError, match="tools must be empty"):
        chat(api, [{"role": "user", "content": "a"}], tools=[tool])


def test_a_stream_that_it_closes_is_cancelled(slow_served):
    with client_of(slow_served) as api:
        stream = api.images.generate(
            **ASKED, stream=True, partial_images=3, extra_body={"num_candidates": 512}
        )
        next(iter(stream))
        stream.close()
    slow_served.wait_for("cancelled: the client closed")
