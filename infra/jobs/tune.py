"""`tune`: a hyperparameter tuning job over the same run that `train` would start once."""

from __future__ import annotations

import argparse
from typing import Any

from dalle.errors import PlanError
from dalle.platform.metric_lines import METRIC_DEFINITIONS
from dalle.types import STAGES
from infra.aws import project
from infra.aws.project import Project
from infra.aws.request import Call, digest
from infra.jobs.train import add_run_arguments, read_run
from infra.jobs.training_job import Run, definition, resources

POLL_SECONDS = 30.0
MAX_NAME = 32
ENDED = ("Completed", "Failed", "Stopped")
SCALES = {"": "Auto", "log": "Logarithmic", "linear": "Linear", "reverse-log": "ReverseLogarithmic"}
ENVIRONMENT_ENTRIES = 48


def add_arguments(parser: argparse.ArgumentParser) -> None:
    search = parser.add_argument_group("search")
    search.add_argument(
        "--float", action="append", type=project.pair, default=[], metavar="NAME=LOW:HIGH[:log]"
    )
    search.add_argument(
        "--int", action="append", type=project.pair, default=[], metavar="NAME=LOW:HIGH[:log]"
    )
    search.add_argument(
        "--choice", action="append", type=project.pair, default=[], metavar="NAME=ONE,TWO"
    )
    search.add_argument(
        "--objective",
        default="transformer_validation_loss",
        help="the metric; default: transformer_validation_loss",
    )
    search.add_argument("--maximise", action="store_true", help="more is better; default: less is")
    search.add_argument(
        "--strategy", choices=("Bayesian", "Random", "Hyperband", "Grid"), default="Bayesian"
    )
    search.add_argument("--max-jobs", type=int, default=8, help="in all; default: 8")
    search.add_argument("--parallel", type=int, default=2, help="at a time; default: 2")
    search.add_argument("--early-stopping", action="store_true", help="end hopeless jobs early")
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument(
        "--no-wait", dest="wait", action="store_false", help="return once the job is started"
    )
    add_run_arguments(parser)
    project.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    opened = project.open_project(options)
    wanted = read_run(options, opened)
    channels = {**wanted.channels, **({"artefact": options.artefact} if options.artefact else {})}
    call = tuning_call(options, wanted, channels, opened.tags)
    name = call.parameters["HyperParameterTuningJobName"]
    look = Call(
        "sagemaker",
        "DescribeHyperParameterTuningJob",
        {"HyperParameterTuningJobName": name},
    )
    opened.ensure(f"tuning job {name}", look, call)
    if not options.wait or opened.aws.dry_run:
        return opened.console.finish(tuning_job=name)
    return show(opened, name, _wait(opened, look))


def _wait(opened: Project, look: Call) -> dict[str, Any]:
    told: dict[str, int] = {}
    while True:
        found = opened.aws.call(look)
        counts = found.get("TrainingJobStatusCounters", {})
        if counts and counts != told:
            told = counts
            words = ", ".join(f"{key} {value}" for key, value in counts.items() if value)
            opened.console.say(f"  {words or 'no training job yet'}")
        if found["HyperParameterTuningJobStatus"] in ENDED:
            return found
        opened.aws.pause(POLL_SECONDS)


def show(opened: Project, name: str, job: dict[str, Any]) -> int:
    """The best job that was found, with the values it tried."""
    status = job["HyperParameterTuningJobStatus"]
    best = job.get("BestTrainingJob") or {}
    metric = best.get("FinalHyperParameterTuningJobObjectiveMetric", {})
    opened.console.item(f"tuning job {name}", status)
    if best.get("TrainingJobName"):
        opened.console.item(f"best: {best['TrainingJobName']}", f"{metric.get('Value')}")
        for key, value in best.get("TunedHyperParameters", {}).items():
            opened.console.say(f"  --set {key}={value}")
    opened.console.finish(
        tuning_job=name,
        status=status,
        best_job=best.get("TrainingJobName"),
        objective=metric.get("Value"),
        hyperparameters=best.get("TunedHyperParameters", {}),
    )
    return 0 if status == "Completed" else 1


def tuning_call(
    options: argparse.Namespace,
    wanted: Run,
    channels: dict[str, str],
    tags: list[dict[str, str]],
) -> Call:
    """The request that starts the search. Raises PlanError for a search that cannot be."""
    metrics = [metric["Name"] for metric in METRIC_DEFINITIONS]
    if options.objective not in metrics:
        raise PlanError(
            f"--objective must be a metric that `train` prints, one of {', '.join(metrics)}; "
            f"got {options.objective!r}"
        )
    ranges = parameter_ranges(options)
    if not any(ranges.values()):
        raise PlanError("nothing to search: give at least one of --float, --int and --choice")
    if not 1 <= options.parallel <= options.max_jobs:
        raise PlanError(
            f"--parallel must be 1 to --max-jobs, which is {options.max_jobs}, "
            f"got {options.parallel}"
        )
    searched = {entry["Name"] for entries in ranges.values() for entry in entries}
    both = sorted(searched & {*wanted.hyperparameters, "stage"})
    if both:
        raise PlanError(f"{', '.join(both)} cannot be both given and searched")
    if len(wanted.environment) > ENVIRONMENT_ENTRIES:
        raise PlanError(
            f"a tuning job has at most {ENVIRONMENT_ENTRIES} environment variables, "
            f"got {len(wanted.environment)}"
        )
    # No CheckpointConfig: all jobs of a search would write into its one folder.
    job: dict[str, Any] = {
        "StaticHyperParameters": {**wanted.hyperparameters, "stage": options.stage},
        **definition(wanted, channels),
        "ResourceConfig": resources(wanted),
    }
    if wanted.environment:
        job["Environment"] = dict(wanted.environment)
    search = {
        "Strategy": options.strategy,
        "HyperParameterTuningJobObjective": {
            "Type": "Maximize" if options.maximise else "Minimize",
            "MetricName": options.objective,
        },
        "ResourceLimits": {
            "MaxNumberOfTrainingJobs": options.max_jobs,
            "MaxParallelTrainingJobs": options.parallel,
        },
        "ParameterRanges": ranges,
        "TrainingJobEarlyStoppingType": "Auto" if options.early_stopping else "Off",
    }
    # The jobs of a search are named by the platform after it, so its name must be short.
    name = f"{wanted.project}-{digest([search, job])}"[:MAX_NAME]
    return Call(
        "sagemaker",
        "CreateHyperParameterTuningJob",
        {
            "HyperParameterTuningJobName": name,
            "HyperParameterTuningJobConfig": search,
            "TrainingJobDefinition": job,
            "Tags": tags,
        },
    )


def parameter_ranges(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """What is searched, in the API's words. Raises PlanError for a range that is none."""
    return {
        "ContinuousParameterRanges": [_range(name, text, float) for name, text in options.float],
        "IntegerParameterRanges": [_range(name, text, int) for name, text in options.int],
        "CategoricalParameterRanges": [
            {"Name": name, "Values": text.split(",")} for name, text in options.choice
        ],
    }


def _range(name: str, text: str, kind: type[int] | type[float]) -> dict[str, Any]:
    low, _, rest = text.partition(":")
    high, _, scale = rest.partition(":")
    try:
        is_rising = kind(low) < kind(high)
    except ValueError:
        is_rising = False
    if not is_rising or scale not in SCALES:
        raise PlanError(
            f"{name} needs LOW:HIGH or LOW:HIGH:log, two {'whole ' if kind is int else ''}numbers "
            f"of which the second is larger, got {text!r}"
        )
    return {"Name": name, "MinValue": low, "MaxValue": high, "ScalingType": SCALES[scale]}
