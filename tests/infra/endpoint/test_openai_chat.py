"""Replies of an endpoint to `invoke --openai` that are none."""

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dalle.errors import AwsError
from infra.aws.client import Aws
from infra.aws.output import Output
from infra.endpoint.calls.openai_chat import _post


@contextmanager
def answering(reply: bytes) -> Iterator[str]:
    """A server on loopback that answers each connection with these bytes; yields its address."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline().strip():
                pass
            self.wfile.write(reply)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.02])
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", "did not answer"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 100\r\n\r\n{", "did not answer"),
        (b"nonsense\r\n\r\n", "did not answer"),
        (b"", "did not answer"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\nno", "the endpoint answered 503: no"),
    ],
)
def test_a_reply_that_breaks_off_is_an_error_in_words(reply, says):
    with answering(reply) as url:
        aws = Aws(Output(as_json=False, dry_run=False), local_url=url)
        with pytest.raises(AwsError, match=says):
            _post(aws, "/endpoints/dalle/openai/v1/chat/completions", b"{}")
