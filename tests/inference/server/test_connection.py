"""A connection's own state, over a pair of sockets."""

import socket
from contextlib import suppress

from inference.server.worker.connection import Connection, RequestBody


def test_a_connection_with_unread_replies_cannot_send_until_they_are_read():
    ours, theirs = socket.socketpair()
    with Connection(ours, "client") as connection, theirs:
        assert connection.can_send
        with suppress(BlockingIOError):
            while connection.send(bytes(65_536)):
                pass
        assert not connection.can_send
        theirs.setblocking(False)
        with suppress(BlockingIOError):
            while theirs.recv(65_536):
                pass
        assert connection.can_send


def test_a_body_that_was_read_to_its_end_is_in_memory_no_more():
    body = RequestBody(length=4, limit=10)
    body.feed(b"abcd")
    assert (body.read(3), body.size, body.is_read) == (b"abc", 4, False)
    assert (body.read(3), body.size, body.is_read) == (b"d", 0, True)
    assert (body.read(3), body.is_read) == (b"", True)
