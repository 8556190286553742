"""A job's log and metrics while it runs, as `train`, `logs` and `status` show them.

Metrics are read from the log by the same regular expressions that the job's request names, so that
they appear within seconds and with their steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dalle.platform.metric_lines import read_metrics
from infra.aws.output import span_words, sparkline
from infra.aws.project import Project
from infra.aws.request import Request, describe

POLL_SECONDS = 15.0
TRAINING_LOGS = "/aws/sagemaker/TrainingJobs"
TRANSFORM_LOGS = "/aws/sagemaker/TransformJobs"
ENDPOINT_LOGS = "/aws/sagemaker/Endpoints"
COMPONENT_LOGS = "/aws/sagemaker/InferenceComponents"
ENDED = ("Completed", "Failed", "Stopped")
LOSS = "loss"


class Log:
    """The lines of one job or endpoint in a log group; each line is returned once."""

    def __init__(self, project: Project, group: str, streams: str = "") -> None:
        self._opened = project
        self._request: dict[str, Any] = {"logGroupName": group}
        if streams:
            self._request["logStreamNamePrefix"] = streams
        self._streams = streams
        self._seen: set[str] = set()
        self._newest = 0

    def lines(self) -> Iterator[str]:
        """Yield the lines that are new since the last call, oldest first."""
        # From the newest timestamp on, included: lines of one timestamp may arrive separately.
        request = {**self._request, "startTime": self._newest}
        events = self._opened.aws.items(Request("logs", "FilterLogEvents", **request), "events")
        for event in sorted(events, key=lambda event: int(event["timestamp"])):
            is_own = event["logStreamName"].startswith(self._streams)
            if not is_own or event["eventId"] in self._seen:
                continue
            self._seen.add(event["eventId"])
            self._newest = max(self._newest, event["timestamp"])
            yield event["message"].rstrip("\n")


def training_log(project: Project, job: str) -> Log:
    return Log(project, TRAINING_LOGS, f"{job}/")


def follow(project: Project, job: str) -> dict[str, Any]:
    """Print a training job's states and metric lines until it ends; return its description."""
    request = describe("TrainingJob", job)
    log = training_log(project, job)
    shown = 0
    while True:
        found = project.aws.call(request)
        transitions = found.get("SecondaryStatusTransitions", [])
        for transition in transitions[shown:]:
            message = transition.get("StatusMessage", "")
            project.output.line(f"  {transition['Status']:<12} {message}".rstrip())
        shown = len(transitions)
        for line in log.lines():
            if read_metrics(line):
                project.output.line(f"  {line}")
        if found["TrainingJobStatus"] in ENDED:
            project.output.item(f"training job {job}", ended(found))
            return found
        project.aws.pause(POLL_SECONDS)


def ended(job: dict[str, Any]) -> str:
    """Return how a job ended, the billed time, and what spot capacity saved."""
    words = str(job["TrainingJobStatus"])
    ran, billed = job.get("TrainingTimeInSeconds"), job.get("BillableTimeInSeconds")
    if billed is not None:
        words += f", {span_words(billed)} billed"
    if ran and billed is not None and job.get("EnableManagedSpotTraining"):
        words += f", spot saved {100 * (1 - billed / ran):.0f} %"
    return words


def metric_history(project: Project, job: str) -> dict[str, list[float]]:
    """Return every metric of a training job, its values in the order of the log."""
    found: dict[str, list[float]] = {}
    for line in training_log(project, job).lines():
        for name, value in read_metrics(line).items():
            found.setdefault(name, []).append(value)
    return found


def loss_rows(metrics: dict[str, list[float]]) -> list[tuple[str, str, str, str]]:
    """Return table rows of the losses: name, first value, last value, sparkline."""
    return [
        (name, f"{values[0]:.4g}", f"{values[-1]:.4g}", sparkline(values))
        for name, values in metrics.items()
        if name.endswith(LOSS)
    ]
