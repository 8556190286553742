"""An endpoint for tests: boto3's own client, the runtime facade, and behind it a real HTTP server
that behaves as the test says."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3
import pytest
from botocore.config import Config

from infra.local.endpoint import Limits, RuntimeFacade

ONCE = Config(retries={"total_max_attempts": 1}, read_timeout=60)


class Container:
    """What a test wants of a container. answer: a function of the request's handler.

    requests: (headers, body) of each one; paths: of each one. free: set by a test to let a waiting
    answer go on, and at its end.
    """

    def __init__(self, answer):
        self.requests = []
        self.paths = []
        self.free = threading.Event()
        self.gone = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                assert self.path in ("/invocations", "/v1/chat/completions")
                outer.paths.append(self.path)
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.requests.append((self.headers, body))
                self.close_connection = True
                answer(self)

            def wait(self):
                assert outer.free.wait(60)

            def begin(self, status=200, **headers):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()

            def reply(self, body, status=200, **headers):
                self.begin(status, Content_Length=str(len(body)), **headers)
                self.wfile.write(body)

            def chunk(self, data):
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

            def write_until_gone(self):
                """Until the other side hangs up."""
                try:
                    while True:
                        self.chunk(b"x" * 1000)
                except OSError:
                    outer.gone.set()

            def log_message(self, *words):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, args=[0.01])
        self.thread.start()

    def stop(self):
        self.free.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def make_endpoint():
    """A function: a container's answer, limits -> the container, and boto3's client of it. The
    endpoint is called `dalle`."""
    started = []

    def make(answer, **limits):
        container = Container(answer)
        started.append(container.stop)
        facade = RuntimeFacade({"dalle": container.port}, limits=Limits(**limits))
        facade.__enter__()
        started.append(lambda: facade.__exit__(None, None, None))
        runtime = client(facade.url)
        started.append(runtime.close)
        return container, runtime, facade

    yield make
    for stop in reversed(started):
        stop()


def client(url):
    return boto3.client(
        "sagemaker-runtime",
        region_name="us-east-1",
        endpoint_url=url,
        aws_access_key_id="any",
        aws_secret_access_key="any",
        config=ONCE,
    )
