"""Event-stream frames, read back by botocore's own parser."""

import json

import pytest
from botocore.eventstream import ChecksumMismatch, EventStreamBuffer

from infra.local import event_stream


def read(data):
    buffer = EventStreamBuffer()
    buffer.add_data(data)
    return list(buffer)


@pytest.mark.parametrize("part", [b"", b"x", bytes(range(256)) * 300])
def test_a_part_comes_out_as_it_went_in(part):
    (event,) = read(event_stream.payload_part(part))
    assert event.payload == part
    assert event.headers == {
        ":event-type": "PayloadPart",
        ":content-type": "application/octet-stream",
        ":message-type": "event",
    }


def test_frames_follow_one_another_without_a_gap():
    data = event_stream.payload_part(b"one") + event_stream.payload_part(b"two")
    assert [event.payload for event in read(data)] == [b"one", b"two"]


def test_an_error_carries_its_name_and_members():
    (event,) = read(event_stream.exception("ModelStreamError", {"ErrorCode": "StreamBroken"}))
    assert event.headers[":exception-type"] == "ModelStreamError"
    assert event.headers[":message-type"] == "exception"
    assert json.loads(event.payload) == {"ErrorCode": "StreamBroken"}


@pytest.mark.parametrize("position", [2, 9, 20, -6, -1])
def test_a_byte_that_changes_on_the_way_is_found(position):
    data = bytearray(event_stream.payload_part(b"twelve bytes"))
    data[position] ^= 1
    with pytest.raises(ChecksumMismatch):
        read(bytes(data))


def test_names_and_values_may_be_any_text():
    (event,) = read(event_stream.frame({"näme": "wörth"}, b""))
    assert event.headers == {"näme": "wörth"}
