"""What a soak of `serve` asks, and what each answer must be: a method for each habit of callers.

Every picture is compared, pixel by pixel, with one drawn by an engine alone.
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
    """What the artefact draws and says when nobody else asks."""

    def __init__(self, artefact: Path) -> None:
        threads = torch.get_num_threads()
        runner = ModelRunner.load(artefact, "cpu", threads=1)
        torch.set_num_threads(threads)
        self.pictures: dict[tuple[str, int, float, int], bytes] = {}
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
                        self.pictures[key] = each.pixels.tobytes()
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
class Callers:
    """Asks a server at `url`. Every method may be called by any thread.

    counts: of what happened, by name; sent: requests that reached the server with a whole header.
    """

    url: str
    reference: Reference
    most_bytes: int
    counts: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)

    def one(self, number: int, seed: int) -> None:
        """Call number `number` of a soak: what it is depends on that and the seed alone.

        Raises AssertionError for a wrong answer.
        """
        chance = random.Random(f"{seed} {number}")
        habits: list[Callable[[random.Random], None]] = [
            self.asks_plainly,
            self.asks_plainly,
            self.wants_one_image,
            self.watches_a_stream,
            self.watches_previews,
            self.sends_lines,
            self.is_in_a_hurry,
            self.leaves_before_the_answer,
            self.leaves_a_stream,
            self.breaks_off_in_mid_body,
            self.sends_too_much,
            self.sends_a_large_image,
            self.sends_nonsense,
        ]
        habit = chance.choice(habits)
        habit(chance)
        self.counts[habit.__name__] += 1

    def asks_plainly(self, chance: random.Random) -> None:
        fields = self._fields(chance)
        fields["num_images"] = chance.randint(1, fields["num_candidates"])
        reply = json.loads(self._answer(fields).body)
        assert reply["completed_candidates"] == fields["num_candidates"]
        assert [each["rank"] for each in reply["images"]] == [*range(1, fields["num_images"] + 1)]
        assert len({each["candidate"] for each in reply["images"]}) == fields["num_images"]
        self._check_pictures(fields, reply["images"])

    def wants_one_image(self, chance: random.Random) -> None:
        fields = self._fields(chance)
        reply = self._answer(fields, accept="image/png")
        number = int(reply.fields["x-dalle-candidate"])
        self._check(fields, number, reply.body)

    def watches_a_stream(self, chance: random.Random, **more: Any) -> None:
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
        self._check_pictures(fields, finished)

    def watches_previews(self, chance: random.Random) -> None:
        self.watches_a_stream(chance, preview_rows=chance.randint(1, 3))

    def sends_lines(self, chance: random.Random) -> None:
        lines = [self._fields(chance) for _ in range(3)]
        body = b"\n".join([json.dumps(each).encode() for each in lines] + [b"{nonsense"])
        answer = self._answer(body, content_type="application/jsonlines")
        replies = [json.loads(line) for line in answer.body.splitlines()]
        assert len(replies) == 4
        for fields, reply in zip(lines, replies, strict=False):
            if "error" in reply:  # too many before it: told in its own line
                assert reply["error"]["code"] in ("too_busy", "deadline_exceeded"), reply
                self.counts["lines refused"] += 1
            else:
                assert reply["seed"] == fields["seed"]
                self._check_pictures(fields, reply["images"])
        assert replies[3]["error"]["code"] == "malformed_body"

    def is_in_a_hurry(self, chance: random.Random) -> None:
        fields = self._fields(chance) | {"num_candidates": MANY, "num_images": 1}
        fields["deadline_seconds"] = chance.choice([0.001, 0.05, 0.2])
        reply = self._send(fields)
        if reply.status == 504:
            assert json.loads(reply.body)["error"]["code"] == "deadline_exceeded"
        elif reply.status == 200:
            told = json.loads(reply.body)
            assert 1 <= told["completed_candidates"] < MANY
            best = [each for each in told["images"] if each["candidate"] < CANDIDATES]
            self._check_pictures(fields, best)
        else:
            self._check_refusal(reply)

    def leaves_before_the_answer(self, chance: random.Random) -> None:
        body = json.dumps(self._fields(chance) | {"num_candidates": MANY}).encode()
        with self._raw(len(body)) as connection:
            connection.sendall(body)

    def leaves_a_stream(self, chance: random.Random) -> None:
        fields = self._fields(chance) | {"num_candidates": MANY, "preview_rows": 1}
        body = json.dumps(fields).encode()
        with self._raw(len(body), accept="application/jsonlines") as connection:
            connection.sendall(body)
            assert connection.recv(1), "an answer or a refusal begins"

    def breaks_off_in_mid_body(self, chance: random.Random) -> None:
        with self._raw(1000) as connection:
            connection.sendall(b"{" * chance.randint(0, 999))

    def sends_too_much(self, chance: random.Random) -> None:
        with self._raw(2 * self.most_bytes) as connection:
            status = connection.recv(12)
        assert status in (b"HTTP/1.1 413", b"HTTP/1.1 429"), status

    def sends_a_large_image(self, chance: random.Random) -> None:
        indices, classes, probabilities = json.loads(self._answer(self.reference.large).body)[0]
        expected = self.reference.prediction
        assert (indices, classes) == (expected[0], expected[1])
        assert np.allclose(probabilities, expected[2], atol=1e-5)

    def sends_nonsense(self, chance: random.Random) -> None:
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
        """The answer to a request, asked again for as long as it is refused for a time."""
        while True:
            reply = self._send(body, **headers)
            if reply.status == 200:
                return reply
            self._check_refusal(reply)
            time.sleep(BACK_OFF)

    def _check_refusal(self, reply: Reply) -> None:
        assert reply.status in REFUSALS, (reply.status, reply.body[:500])
        assert 1 <= int(reply.fields["retry-after"]) <= 3600
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
        """A connection with the header of a request for a body of so many bytes."""
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

    def _check_pictures(self, fields: Mapping[str, Any], images: list[dict[str, Any]]) -> None:
        for each in images:
            self._check(fields, each["candidate"], base64.b64decode(each["image"]))

    def _check(self, fields: Mapping[str, Any], number: int, file: bytes) -> None:
        pixels = np.asarray(Image.open(io.BytesIO(file)))
        key = (fields["caption"], fields["seed"], fields["guidance_scale"], number)
        assert pixels.tobytes() == self.reference.pictures[key], f"another picture for {key}"
        self.counts["pictures compared"] += 1
