"""A connection's own state, over a pair of sockets."""

import socket
from contextlib import suppress

from inference.server.connection import Connection


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
