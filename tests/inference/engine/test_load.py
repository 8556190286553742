"""Clients and arrivals against a tiny HTTP server that behaves as a test says."""

import json
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dalle.errors import UserError
from inference.bench.http_target import HttpTarget
from inference.bench.load import HTTP, RETRY, arrivals, closed_loop, open_loop
from inference.bench.workload import DEFAULT_CAPTIONS, Workload, read_captions

WORKLOAD = Workload(captions=["a red square", "a blue star"], num_candidates=8, num_images=2)
TIMINGS = {f"{stage}_seconds": 1e-6 for stage in ("queue", "sample", "decode", "rank", "encode")}


def reply(request, completed=None):
    """A reply of `serve` to a request, with pictures of two bytes."""
    images = [
        {"rank": n + 1, "candidate": n, "clip_score": 0.5, "log_likelihood": -1.0, "image": "eHg="}
        for n in range(request["num_images"])
    ]
    return {
        "images": images,
        "seed": request["seed"],
        "num_candidates": request["num_candidates"],
        "completed_candidates": completed or request["num_candidates"],
        "ranked_by": "clip",
        "timings": TIMINGS,
    }


class Server:
    """answer: a function of (handler, request) that sends the response."""

    def __init__(self, answer):
        self.requests = []
        self.connections = 0
        self.lock = threading.Lock()
        self.most_at_once = 0
        self._at_once = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                with outer.lock:
                    outer.connections += 1

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                request = json.loads(body)
                with outer.lock:
                    outer.requests.append(request)
                    outer._at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer._at_once)
                try:
                    answer(self, request)
                finally:
                    with outer.lock:
                        outer._at_once -= 1

            def send(self, status, body, **headers):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *words):
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.02])
        self._thread.start()
        self.target = HttpTarget(f"http://127.0.0.1:{self._server.server_port}", timeout_seconds=30)

    def close(self):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextmanager
def serving(answer):
    server = Server(answer)
    try:
        yield server
    finally:
        server.close()


def well(handler, request):
    handler.send(200, json.dumps(reply(request)).encode())


def test_every_run_sends_the_same_captions_with_the_same_seeds():
    asked = [[json.loads(WORKLOAD.request(k)) for k in range(5)] for _ in range(2)]
    assert asked[0] == asked[1]
    assert [each["caption"] for each in asked[0]] == ["a red square", "a blue star"] * 2 + [
        "a red square"
    ]
    assert [each["seed"] for each in asked[0]] == [0, 1, 2, 3, 4]
    other = WORKLOAD.model_copy(update={"seed": 100})
    assert json.loads(other.request(3))["seed"] == 103


def test_a_closed_loop_counts_exactly_the_given_number_of_requests():
    with serving(well) as server:
        measured = closed_loop(server.target, WORKLOAD, clients=3, requests=10)
    assert len(measured.records) == 10
    assert all(each.is_answered for each in measured.records)
    assert measured.window_seconds > 0
    assert len(server.requests) <= 10 + 2, "clients that were still busy are waited for"


def test_a_closed_loop_has_as_many_requests_under_way_as_it_has_clients_and_keeps_its_lines():
    together = threading.Barrier(4)

    def answer(handler, request):
        if request["seed"] < 4:  # the first request of each client: none is answered before all are
            together.wait(30)
        well(handler, request)

    with serving(answer) as server:
        closed_loop(server.target, WORKLOAD, clients=4, requests=12)
        assert server.most_at_once == 4
        assert server.connections == 4


def test_the_record_of_a_request_has_its_stages_and_what_remains_is_http():
    with serving(well) as server:
        (record,) = closed_loop(server.target, WORKLOAD, clients=1, requests=1).records
    assert sum(record.stages.values()) == pytest.approx(record.latency_seconds)
    assert record.stages["sample"] == 1e-6
    assert record.stages[HTTP] > 0
    assert record.stages[RETRY] == 0
    assert (record.num_images, record.completed_candidates) == (2, 8)
    assert record.request_bytes == len(WORKLOAD.request(0))
    assert record.reply_bytes > 100


def test_as_many_images_are_asked_for_as_are_priced_however_alike_they_are():
    assert json.loads(WORKLOAD.request(0))["distinct"] is False


def test_a_refused_request_is_sent_again_and_its_wait_counts():
    seen = Counter()

    def answer(handler, request):
        seen[request["seed"]] += 1
        if seen[request["seed"]] < 3:
            handler.send(429, b"{}", Retry_After="0" if seen[request["seed"]] > 1 else "1")
        else:
            well(handler, request)

    with serving(answer) as server:
        measured = closed_loop(server.target, WORKLOAD, clients=1, requests=1)
    (record,) = measured.records
    assert measured.refusals == {"429": 2}
    assert record.is_answered
    assert record.stages[RETRY] >= 1.0, "Retry-After said so"
    assert record.latency_seconds == pytest.approx(sum(record.stages.values()))


def test_a_server_that_refuses_for_ever_ends_with_the_time():
    with serving(lambda handler, _: handler.send(503, b"{}", Retry_After="600")) as server:
        measured = closed_loop(server.target, WORKLOAD, clients=2, requests=5, max_seconds=0.3)
    assert measured.records == []
    assert measured.refusals == {"503": 2}


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (lambda handler, _: handler.send(500, b"{}"), "500"),
        (lambda handler, _: handler.send(422, b"{}"), "422"),
        (lambda handler, _: handler.send(200, b"not JSON"), "bad reply"),
        (lambda handler, _: handler.send(200, b'{"images": []}'), "bad reply"),
        (lambda handler, _: setattr(handler, "close_connection", True), "connection"),
    ],
)
def test_a_failure_is_counted_by_its_kind_and_not_as_an_answer(answer, outcome):
    with serving(answer) as server:
        measured = closed_loop(server.target, WORKLOAD, clients=1, requests=3)
    assert [each.outcome for each in measured.records] == [outcome] * 3
    assert not any(each.is_answered for each in measured.records)
    assert [each.stages for each in measured.records] == [{}, {}, {}]


def test_an_answer_that_does_not_come_is_a_timeout():
    free = threading.Event()
    with serving(lambda handler, _: free.wait(30)) as server:
        server.target.timeout_seconds = 0.2
        measured = closed_loop(server.target, WORKLOAD, clients=1, requests=1)
        free.set()
    assert [each.outcome for each in measured.records] == ["timeout"]


def test_a_kept_connection_that_the_server_closed_is_no_failure():
    def answer(handler, request):
        well(handler, request)
        handler.close_connection = True  # without saying so

    with serving(answer) as server:
        measured = closed_loop(server.target, WORKLOAD, clients=1, requests=4)
        assert [each.outcome for each in measured.records] == ["200"] * 4
        assert server.connections == 4


def test_a_reply_with_fewer_candidates_than_requested_is_marked():
    def answer(handler, request):
        handler.send(200, json.dumps(reply(request, completed=3)).encode())

    with serving(answer) as server:
        (record,) = closed_loop(server.target, WORKLOAD, clients=1, requests=1).records
    assert (record.is_cut_short, record.completed_candidates) == (True, 3)


def test_arrivals_are_the_same_for_a_seed_and_come_at_the_rate():
    times = arrivals(2.0, 4000, seed=3)
    assert times == arrivals(2.0, 4000, seed=3)
    assert times != arrivals(2.0, 4000, seed=4)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(2000, rel=0.1)


def test_an_open_loop_does_not_wait_for_replies():
    together = threading.Barrier(5)

    def answer(handler, request):
        together.wait(30)  # nobody is answered before all five have been sent
        well(handler, request)

    with serving(answer) as server:
        measured = open_loop(server.target, WORKLOAD, times=[0.0, 0.01, 0.02, 0.03, 0.04])
    assert [each.number for each in measured.records] == [0, 1, 2, 3, 4]
    assert all(each.is_answered for each in measured.records)


def test_latency_of_an_open_loop_counts_from_the_intended_arrival():
    # One line only, and three arrivals at once: two of them wait here, not at the server.
    with serving(well) as server:
        measured = open_loop(server.target, WORKLOAD, times=[0.0, 0.0, 0.0], max_in_flight=1)
        assert server.most_at_once == 1
    first, second, third = measured.records
    assert first.latency_seconds < second.latency_seconds < third.latency_seconds
    assert third.late_seconds >= first.latency_seconds
    for each in measured.records:
        assert each.latency_seconds - each.late_seconds == pytest.approx(sum(each.stages.values()))


def test_an_open_loop_does_not_repeat_what_is_refused():
    with serving(lambda handler, _: handler.send(429, b"{}", Retry_After="1")) as server:
        measured = open_loop(server.target, WORKLOAD, times=[0.0, 0.0])
        assert len(server.requests) == 2
    assert measured.refusals == {"429": 2}
    assert [each.outcome for each in measured.records] == ["429", "429"]


def test_a_mistake_in_one_client_ends_the_loop_and_is_reported():
    class Broken:
        def connect(self):
            return self

        def send(self, body):
            raise AssertionError("a mistake")

        def close(self):
            """Nothing to close."""

    with pytest.raises(AssertionError, match="a mistake"):
        closed_loop(Broken(), WORKLOAD, clients=3, requests=5)


def test_rounds_add_up():
    with serving(well) as server:
        one = closed_loop(server.target, WORKLOAD, clients=1, requests=2)
        two = closed_loop(server.target, WORKLOAD, clients=1, requests=3, first=2)
    both = one + two
    assert [each.number for each in both.records] == [0, 1, 2, 3, 4]
    assert both.window_seconds == one.window_seconds + two.window_seconds


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://x/", "http://", "x"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(UserError, match="must be like http://127.0.0.1:8080"):
        HttpTarget(url)


def test_an_address_may_name_the_route_or_stand_behind_a_path():
    assert HttpTarget("http://h:1").path == "/invocations"
    assert HttpTarget("http://h:1/invocations").path == "/invocations"
    assert HttpTarget("https://h/stage/").path == "/stage/invocations"


def test_captions_are_read_a_line_each(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("\n a red square \n\na blue star\n")
    assert read_captions(path, ["third"]) == ["a red square", "a blue star", "third"]
    assert read_captions(None, None) == list(DEFAULT_CAPTIONS)


@pytest.mark.parametrize(
    ("text", "says"), [(b"\n \n", "holds no captions"), (b"\xff", "UTF-8|utf-8")]
)
def test_a_captions_file_that_cannot_be_used_is_named(tmp_path, text, says):
    path = tmp_path / "captions.txt"
    path.write_bytes(text)
    with pytest.raises(UserError, match=says):
        read_captions(path, None)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"captions": ["x" * 2001]}, "caption 1, 'xxx.*caption: String should have at most 2000"),
        ({"num_candidates": 0}, "num_candidates: Input should be greater than or equal to 1"),
        ({"num_images": 9}, "num_images must be 1 to num_candidates, which is 8, got 9"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
    ],
)
def test_a_request_that_no_server_would_take_is_refused_before_any_is_sent(fields, says):
    with pytest.raises(UserError, match=says):
        WORKLOAD.model_copy(update=fields).check()
