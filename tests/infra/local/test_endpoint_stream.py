"""The runtime facade between boto3's own client and a container: streamed replies."""

import json
from contextlib import closing, contextmanager

import pytest
import requests
from botocore.eventstream import EventStreamBuffer
from botocore.exceptions import EventStreamError


@contextmanager
def streaming(runtime, **words):
    """A streamed reply, and an iterator over its parts."""
    reply = runtime.invoke_endpoint_with_response_stream(EndpointName="dalle", Body=b"{}", **words)
    with closing(reply["Body"]):
        yield reply, (event["PayloadPart"]["Bytes"] for event in reply["Body"])


def test_a_stream_arrives_while_the_container_is_still_writing_it(make_endpoint):
    def two_lines(handler):
        handler.begin(Transfer_Encoding="chunked", Content_Type="application/jsonlines")
        handler.chunk(b"one\n")
        handler.wait()
        handler.chunk(b"two\n")
        handler.chunk(b"")

    container, runtime, _ = make_endpoint(two_lines)
    media_types = {"ContentType": "application/json", "Accept": "x/lines"}
    with streaming(runtime, **media_types) as (reply, parts):
        ((headers, _),) = container.requests
        assert (headers["Content-Type"], headers["Accept"]) == ("application/json", "x/lines")
        assert reply["ContentType"] == "application/jsonlines"
        assert reply["InvokedProductionVariant"] == "AllTraffic"
        assert next(parts) == b"one\n"
        container.free.set()
        assert list(parts) == [b"two\n"]


@pytest.mark.parametrize("framing", ["length", "chunked", "until closed"])
def test_a_large_stream_is_whole_however_the_container_frames_it(make_endpoint, framing):
    body = bytes(range(256)) * 4096

    def answer(handler):
        if framing == "length":
            handler.reply(body)
        elif framing == "chunked":
            handler.begin(Transfer_Encoding="chunked")
            handler.chunk(body)
            handler.chunk(b"")
        else:
            handler.begin(Connection="close")
            handler.wfile.write(body)

    _, runtime, _ = make_endpoint(answer)
    with streaming(runtime) as (_, parts):
        assert b"".join(parts) == body


def test_an_error_before_the_first_part_of_a_stream_is_a_model_error(make_endpoint):
    _, runtime, _ = make_endpoint(lambda h: h.reply(b"no", 406))
    with pytest.raises(runtime.exceptions.ModelError) as caught:
        runtime.invoke_endpoint_with_response_stream(EndpointName="dalle", Body=b"{}")
    assert caught.value.response["OriginalStatusCode"] == 406
    assert caught.value.response["OriginalMessage"] == "no"


def broken_stream(runtime, facade):
    """The parts that came and the message boto3 raised; then the members of the last frame, of
    which boto3 shows only the message."""
    came = []
    with streaming(runtime) as (_, parts), pytest.raises(EventStreamError) as caught:
        came += parts
    assert caught.value.response["Error"]["Code"] == "ModelStreamError"
    url = f"{facade.url}/endpoints/dalle/invocations-response-stream"
    buffer = EventStreamBuffer()
    buffer.add_data(requests.post(url, b"{}", timeout=60).content)
    *_, last = buffer
    return came, json.loads(last.payload)


def test_a_stream_that_takes_too_long_ends_with_its_parts_and_an_error(make_endpoint):
    def stall(handler):
        handler.begin(Transfer_Encoding="chunked")
        handler.chunk(b"one")
        handler.wait()

    _, runtime, facade = make_endpoint(stall, stream_seconds=0.3, reply_seconds=0.01)
    parts, error = broken_stream(runtime, facade)
    assert parts == [b"one"]
    assert error["ErrorCode"] == "ModelInvocationTimeExceeded"
    assert "timed out" in error["Message"]


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_stream_that_breaks_off_ends_with_its_parts_and_an_error(make_endpoint, framing):
    def half(handler):
        if framing == "chunked":
            handler.begin(Transfer_Encoding="chunked")
            handler.chunk(b"half")
        else:
            handler.begin(Content_Length="8")
            handler.wfile.write(b"half")

    _, runtime, facade = make_endpoint(half)
    parts, error = broken_stream(runtime, facade)
    assert parts == [b"half"]
    assert error["ErrorCode"] == "StreamBroken"
    assert "the model process exited" in error["Message"]


def test_stopping_ends_a_running_stream_with_an_error_of_the_platforms(make_endpoint):
    def stall(handler):
        handler.begin(Transfer_Encoding="chunked")
        handler.chunk(b"one")
        handler.wait()

    _, runtime, facade = make_endpoint(stall)
    with streaming(runtime) as (_, parts):
        assert next(parts) == b"one"
        facade.__exit__(None, None, None)
        with pytest.raises(EventStreamError) as caught:
            next(parts)
    assert caught.value.response["Error"]["Code"] == "InternalStreamFailure"


def test_the_container_sees_that_a_client_has_gone(make_endpoint):
    def stream(handler):
        handler.begin(Transfer_Encoding="chunked")
        handler.write_until_gone()

    container, runtime, _ = make_endpoint(stream)
    with streaming(runtime) as (_, parts):
        next(parts)
    assert container.gone.wait(60)
