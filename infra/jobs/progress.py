"""A job's log and metrics as they come: what `train` shows while it waits, and `logs` and `status`.

Metrics are read from the log by the same expressions that the platform is given, so that they show
within seconds and with their steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dalle.platform.metric_lines import read_metrics
from infra.aws.output import span_words, sparkline
from infra.aws.project import Project
from infra.aws.request import Call

POLL_SECONDS = 15.0
TRAINING_LOGS = "/aws/sagemaker/TrainingJobs"
TRANSFORM_LOGS = "/aws/sagemaker/TransformJobs"
ENDPOINT_LOGS = "/aws/sagemaker/Endpoints"
ENDED = ("Completed", "Failed", "Stopped")
LOSS = "loss"


class Log:
    """A log group's lines of one job or endpoint, each given once however often it is asked."""

    def __init__(self, opened: Project, group: str, streams: str = "") -> None:
        self._opened = opened
        self._request: dict[str, Any] = {"logGroupName": group}
        if streams:
            self._request["logStreamNamePrefix"] = streams
        self._streams = streams
        self._seen: set[str] = set()
        self._newest = 0

    def lines(self) -> Iterator[str]:
        """What is new since the last time, oldest first; nothing while there is no log yet."""
        # From the newest moment on, that moment included: lines of one moment may arrive apart.
        request = {**self._request, "startTime": self._newest}
        events = self._opened.aws.items(Call("logs", "FilterLogEvents", request), "events")
        for event in sorted(events, key=lambda event: int(event["timestamp"])):
            is_own = event["logStreamName"].startswith(self._streams)
            if not is_own or event["eventId"] in self._seen:
                continue
            self._seen.add(event["eventId"])
            self._newest = max(self._newest, event["timestamp"])
            yield event["message"].rstrip("\n")


def training_log(opened: Project, job: str) -> Log:
    return Log(opened, TRAINING_LOGS, f"{job}/")


def follow(opened: Project, job: str) -> dict[str, Any]:
    """Show a training job's states and metric lines until it ends; returns its description."""
    call = Call("sagemaker", "DescribeTrainingJob", {"TrainingJobName": job})
    log = training_log(opened, job)
    shown = 0
    while True:
        found = opened.aws.call(call)
        transitions = found.get("SecondaryStatusTransitions", [])
        for transition in transitions[shown:]:
            message = transition.get("StatusMessage", "")
            opened.console.say(f"  {transition['Status']:<12} {message}".rstrip())
        shown = len(transitions)
        for line in log.lines():
            if read_metrics(line):
                opened.console.say(f"  {line}")
        if found["TrainingJobStatus"] in ENDED:
            opened.console.item(f"training job {job}", ended(found))
            return found
        opened.aws.pause(POLL_SECONDS)


def ended(job: dict[str, Any]) -> str:
    """How a job ended, how long it was paid for, and what spot capacity saved."""
    words = str(job["TrainingJobStatus"])
    ran, billed = job.get("TrainingTimeInSeconds"), job.get("BillableTimeInSeconds")
    if billed is not None:
        words += f", {span_words(billed)} billed"
    if ran and billed is not None and job.get("EnableManagedSpotTraining"):
        words += f", spot saved {100 * (1 - billed / ran):.0f} %"
    return words


def courses(opened: Project, job: str) -> dict[str, list[float]]:
    """Every metric of a training job, its values in the order in which they were printed."""
    found: dict[str, list[float]] = {}
    for line in training_log(opened, job).lines():
        for name, value in read_metrics(line).items():
            found.setdefault(name, []).append(value)
    return found


def loss_rows(metrics: dict[str, list[float]]) -> list[tuple[str, str, str, str]]:
    """Table rows of the losses: name, first and last value, and their course as a line of bars."""
    return [
        (name, f"{values[0]:.4g}", f"{values[-1]:.4g}", sparkline(values))
        for name, values in metrics.items()
        if name.endswith(LOSS)
    ]
