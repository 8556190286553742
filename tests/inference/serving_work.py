"""Clients of a soak of `serve`: a method for each kind of request, with what its reply must be.

Every image is compared, pixel by pixel, with one of an engine alone.
"""

import base64
import http.client
import io
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image

from inference.api.schema import ClassifyRequest, GenerateRequest
from inference.engine.model_runner import ModelRunner

CAPTIONS = ("a red square", "a blue circle", "big filled star")
SEEDS = 3
GUIDANCE = (1.0, 3.0)
CANDIDATES = 6  # that there is a reference for
MANY = 400  # candidates of requests that are not waited for
PATIENCE = 120.0  # seconds until a caller gives the server up
REFUSALS = (429, 503)
BACK_OFF = 0.1  # seconds after a refusal: less than it asks for, or a soak would mostly wait


class Reference:
    """Images and predictions of the artefact without other requests."""

    def __init__(self, artefact: Path) -> None:
        threads = torch.get_num_threads()
        runner = ModelRunner.load(artefact, "cpu", threads=1)
        torch.set_num_threads(threads)
        self.images: dict[tuple[str, int, float, int], bytes] = {}
        for caption in CAPTIONS:
            for seed in range(SEEDS):
                for scale in GUIDANCE:
                    request = GenerateRequest(
                        caption=caption,
                        seed=seed,
                        guidance_scale=scale,
                        num_candidates=CANDIDATES,
                        num_images=CANDIDATES,
                    )
                    for each in runner.run(runner.prepare(request)).ranked:
                        key = (caption, seed, scale, each.number)
                        self.images[key] = each.pixels.tobytes()
        noise = np.random.default_rng(0).integers(0, 256, (350, 350, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).save(file, format="PNG")
        self.large: dict[str, Any] = {
            "images": [base64.b64encode(file.getvalue()).decode()],
            "classes": ["a red square", "a blue circle", "star"],
        }
        prepared = runner.prepare(ClassifyRequest(**self.large))
        (self.prediction,) = runner.run(prepared).predictions


@dataclass
class Reply:
    status: int
    fields: Mapping[str, str]
    body: bytes


@dataclass
class Clients:
    """Clients of the server at `url`. Any thread may call any method.

    counts: how often each thing happened; sent: requests that were sent with a whole header.
    """

    url: str
    reference: Reference
    most_bytes: int
    counts: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)

    def one(self, number: int, seed: int) -> None:
        """Make call `number` of a soak, which depends on that and the seed alone.

        Raises AssertionError for a wrong answer.
        """
        chance = random.Random(f"{seed} {number}")
        kinds: list[Callable[[random.Random], None]] = [
            self.request_images,
            self.request_images,
            self.request_one_image,
            self.stream,
            self.stream_previews,
            self.send_lines,
            self.set_a_short_deadline,
            self.close_before_the_reply,
            self.close_a_stream,
            self.send_half_a_body,
            self.send_a_body_over_the_limit,
            self.send_a_large_image,
            self.send_nonsense,
        ]
        kind = chance.choice(kinds)
        kind(chance)
        self.counts[kind.__name__] += 1

    def request_images(self, chance: random.Random) -> None:
        fields = self._fields(chance)
        fields["num_images"] = chance.randint(1, fields["num_candidates"])
        reply = json.loads(self._answer(fields).body)
        assert reply["completed_candidates"] == fields["num_candidates"]
        assert [each["rank"] for each in reply["images"]] == [*range(1, fields["num_images"] + 1)]
        assert len({each["candidate"] for each in reply["images"]}) == fields["num_images"]
        self._check_images(fields, reply["images"])

    def request_one_image(self, chance: random.Random) -> None:
        fields = self._fields(chance)
        reply = self._answer(fields, accept="image/png")
        number = int(reply.fields["x-dalle-candidate"])
        self._check(fields, number, reply.body)

    def stream(self, chance: random.Random, **more: Any) -> None:
        fields = self._fields(chance) | more
        lines = [
            json.loads(line)
            for line in self._answer(fields, accept="application/jsonlines").body.splitlines()
        ]
        finished = [line for line in lines if line["event"] == "candidate"]
        numbers = [*range(fields["num_candidates"])]
        assert sorted(line["candidate"] for line in finished) == numbers, "each exactly once"
        assert [line["event"] for line in lines].index("ranking") == len(lines) - 1
        assert sorted(each["candidate"] for each in lines[-1]["ranking"]) == numbers
        self._check_images(fields, finished)

    def stream_previews(self, chance: random.Random) -> None:
        self.stream(chance, preview_rows=chance.randint(1, 3))

    def send_lines(self, chance: random.Random) -> None:
        lines = [self._fields(chance) for _ in range(3)]
        body = b"\n".join([json.dumps(each).encode() for each in lines] + [b"{nonsense"])
        answer = self._answer(body, content_type="application/jsonlines")
        replies = [json.loads(line) for line in answer.body.splitlines()]
        assert len(replies) == 4
        for fields, reply in zip(lines, replies, strict=False):
            if "error" in reply:  # too many requests before it
                assert reply["error"]["code"] in ("too_busy", "deadline_exceeded"), reply
                self.counts["lines refused"] += 1
            else:
                assert reply["seed"] == fields["seed"]
                self._check_images(fields, reply["images"])
        assert replies[3]["error"]["code"] == "malformed_body"

    def set_a_short_deadline(self, chance: random.Random) -> None:
        fields = self._fields(chance) | {"num_candidates": MANY, "num_images": 1}
        fields["deadline_seconds"] = chance.choice([0.001, 0.05, 0.2])
        reply = self._send(fields)
        if reply.status == 504:
            assert json.loads(reply.body)["error"]["code"] == "deadline_exceeded"
        elif reply.status == 200:
            body = json.loads(reply.body)
            assert 1 <= body["completed_candidates"] < MANY
            best = [each for each in body["images"] if each["candidate"] < CANDIDATES]
            self._check_images(fields, best)
        else:
            self._check_refusal(reply)

    def close_before_the_reply(self, chance: random.Random) -> None:
        body = json.dumps(self._fields(chance) | {"num_candidates": MANY}).encode()
        with self._raw(len(body)) as connection:
            connection.sendall(body)

    def close_a_stream(self, chance: random.Random) -> None:
        fields = self._fields(chance) | {"num_candidates": MANY, "preview_rows": 1}
        body = json.dumps(fields).encode()
        with self._raw(len(body), accept="application/jsonlines") as connection:
            connection.sendall(body)
            assert connection.recv(1), "an answer or a refusal begins"

    def send_half_a_body(self, chance: random.Random) -> None:
        with self._raw(1000) as connection:
            connection.sendall(b"{" * chance.randint(0, 999))

    def send_a_body_over_the_limit(self, chance: random.Random) -> None:
        with self._raw(2 * self.most_bytes) as connection:
            status = connection.recv(12)
        assert status in (b"HTTP/1.1 413", b"HTTP/1.1 429"), status

    def send_a_large_image(self, chance: random.Random) -> None:
        indices, classes, probabilities = json.loads(self._answer(self.reference.large).body)[0]
        expected = self.reference.prediction
        assert (indices, classes) == (expected[0], expected[1])
        assert np.allclose(probabilities, expected[2], atol=1e-5)

    def send_nonsense(self, chance: random.Random) -> None:
        reply = self._send(b"{" * chance.randint(1, 100))
        if reply.status in REFUSALS:
            self._check_refusal(reply)
        else:
            assert (reply.status, json.loads(reply.body)["error"]["code"]) == (
                400,
                "malformed_body",
            )

    def _fields(self, chance: random.Random) -> dict[str, Any]:
        return {
            "caption": chance.choice(CAPTIONS),
            "seed": chance.randrange(SEEDS),
            "guidance_scale": chance.choice(GUIDANCE),
            "num_candidates": chance.randint(1, CANDIDATES),
            "num_images": 1,
        }

    def _answer(self, body: object, **headers: str) -> Reply:
        """Return the reply to a request, which is repeated while the server is busy."""
        while True:
            reply = self._send(body, **headers)
            if reply.status == 200:
                return reply
            self._check_refusal(reply)
            time.sleep(BACK_OFF)

    def _check_refusal(self, reply: Reply) -> None:
        assert reply.status in REFUSALS, (reply.status, reply.body[:500])
        assert 1 <= int(reply.fields.get("retry-after", 0)) <= 3600, reply
        assert json.loads(reply.body)["error"]["code"] in ("queue_full", "too_busy")
        self.counts[f"refused with {reply.status}"] += 1

    def _send(
        self, body: object, *, accept: str = "*/*", content_type: str = "application/json"
    ) -> Reply:
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=PATIENCE)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            headers = {"Accept": accept, "Content-Type": content_type}
            connection.request("POST", "/invocations", data, headers)
            response = connection.getresponse()
            fields = {name.lower(): value for name, value in response.getheaders()}
            reply = Reply(response.status, fields, response.read())
        finally:
            connection.close()
        self.sent["whole"] += 1
        return reply

    def _raw(self, length: int, accept: str = "*/*") -> socket.socket:
        """Return a connection, with the header sent of a body of `length` bytes."""
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        assert parts.port is not None
        connection = socket.create_connection((parts.hostname, parts.port), PATIENCE)
        lines = (
            "POST /invocations HTTP/1.1",
            "Host: x",
            "Content-Type: application/json",
            f"Accept: {accept}",
            f"Content-Length: {length}",
        )
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        self.sent["raw"] += 1
        return connection

    def _check_images(self, fields: Mapping[str, Any], images: list[dict[str, Any]]) -> None:
        for each in images:
            self._check(fields, each["candidate"], base64.b64decode(each["image"]))

    def _check(self, fields: Mapping[str, Any], number: int, file: bytes) -> None:
        pixels = np.asarray(Image.open(io.BytesIO(file)))
        key = (fields["caption"], fields["seed"], fields["guidance_scale"], number)
        assert pixels.tobytes() == self.reference.images[key], f"another image for {key}"
        self.counts["images compared"] += 1
