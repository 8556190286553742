"""A request whose candidates arrive one by one, each as a file, and their ranking at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from dalle.errors import AwsError
from inference.api.replies import CandidateLine, RankingLine
from inference.api.schema import GenerateRequest
from infra.aws.project import Project
from infra.endpoint.calls import results
from infra.endpoint.calls.direct import invocation, of_component

JSON_LINES = "application/jsonlines"
STREAM_SECONDS = 500.0
"""A streamed reply may take 8 minutes."""


def invoke_stream(project: Project, name: str, component: str, body: bytes, out: Path) -> int:
    """Write every candidate when it arrives, then print the ranking; return the exit code."""
    given = {**of_component(component), "Accept": JSON_LINES, "Body": body}
    request = invocation("InvokeEndpointWithResponseStream", name, **given)
    answer = project.aws.call(request, answer={"Body": []}, read_seconds=STREAM_SECONDS)
    if project.aws.dry_run:
        return project.output.finish()
    fields = GenerateRequest.model_validate_json(body)
    files: dict[int, str] = {}
    ranking: RankingLine | None = None
    for line in lines(project.aws.chunks(answer["Body"], request)):
        event = read_line(line)
        if isinstance(event, CandidateLine):
            path = out / f"candidate-{event.candidate}.{fields.format}"
            state = results.write(path, results.decode(event.image))
            files[event.candidate] = str(path)
            project.output.item(str(path), state)
        elif isinstance(event, RankingLine):
            ranking = event
    if ranking is None:
        raise AwsError(f"the stream of endpoint {name} ended without a ranking")
    shown = [
        results.SavedImage.of(each, files[each.candidate])
        for each in ranking.ranking
        if each.same_as is None or not fields.distinct
    ]
    results.show(project.output, shown[: fields.num_images])
    results.show_warnings(project.output, ranking.warnings)
    return project.output.finish(
        endpoint=name,
        mode="realtime",
        warnings=ranking.warnings,
        seed=ranking.seed,
        sampling=ranking.sampling.model_dump(),
        ranking=[{**each.model_dump(), "file": files[each.candidate]} for each in ranking.ranking],
    )


def lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield whole lines from chunks that are cut anywhere."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line for line in whole if line.strip())
    if rest.strip():
        yield rest


def read_line(line: bytes) -> CandidateLine | RankingLine | None:
    """Parse one line of a stream; return None for other events. Raises AwsError."""
    try:
        event = json.loads(line).get("event")
        if event == "candidate":
            return CandidateLine.model_validate_json(line)
        if event == "ranking":
            return RankingLine.model_validate_json(line)
    except (ValueError, AttributeError, ValidationError) as error:
        shown = line[:200].decode("utf-8", "replace")
        raise AwsError(f"the endpoint sent a line that cannot be read: {shown!r}") from error
    message = results.error_message(line)
    if message is not None:
        raise AwsError(f"the stream ended with an error: {message}")
    return None
