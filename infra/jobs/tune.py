"""`tune`: a hyperparameter tuning job over the run that `train` would start once."""

from __future__ import annotations

import argparse
from typing import Any

from dalle.errors import PlanError
from dalle.platform.metric_lines import METRIC_DEFINITIONS
from dalle.types import STAGES
from infra.aws.project import Project, add_pairs, add_project_arguments, open_project
from infra.aws.request import Request, describe, digest
from infra.jobs.train import add_run_arguments, check_settings, planned_run, read_run
from infra.jobs.training_job import TrainingRun, definition

POLL_SECONDS = 30.0
MAX_NAME = 32
ENDED = ("Completed", "Failed", "Stopped")
SCALES = {"": "Auto", "log": "Logarithmic", "linear": "Linear", "reverse-log": "ReverseLogarithmic"}
ENVIRONMENT_ENTRIES = 48


def add_arguments(parser: argparse.ArgumentParser) -> None:
    search = parser.add_argument_group("search")
    add_pairs(search, "--float", "a range of numbers; repeatable", "NAME=LOW:HIGH[:log]")
    add_pairs(search, "--int", "a range of whole numbers; repeatable", "NAME=LOW:HIGH[:log]")
    add_pairs(search, "--choice", "values to try; repeatable", "NAME=ONE,TWO")
    search.add_argument(
        "--objective",
        default="transformer_validation_loss",
        help="the metric; default: transformer_validation_loss",
    )
    search.add_argument("--maximise", action="store_true", help="default: minimise the metric")
    search.add_argument(
        "--strategy", choices=("Bayesian", "Random", "Hyperband", "Grid"), default="Bayesian"
    )
    search.add_argument("--max-jobs", type=int, default=8, help="in all; default: 8")
    search.add_argument("--parallel", type=int, default=2, help="at a time; default: 2")
    search.add_argument(
        "--early-stopping", action="store_true", help="stop jobs that fall behind the others"
    )
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument(
        "--no-wait", dest="wait", action="store_false", help="return once the job is started"
    )
    add_run_arguments(parser)
    add_project_arguments(parser)


def run(options: argparse.Namespace) -> int:
    check_values(options)
    project = open_project(options)
    project.aws.check(tuning_request(options, planned_run(options, project)))
    training_run = read_run(options, project)
    request = tuning_request(options, training_run)
    name = request.parameters["HyperParameterTuningJobName"]
    look = describe("HyperParameterTuningJob", name)
    project.ensure("HyperParameterTuningJob", name, request)
    if not options.wait or project.aws.dry_run:
        return project.output.finish(tuning_job=name)
    return show(project, name, _wait(project, look))


def check_values(options: argparse.Namespace) -> None:
    """Raise UserError for a value of the search, or one given, that a job would refuse."""
    parameter_ranges(options)
    given, environment = dict(options.set), dict(options.env)
    tried: list[dict[str, str]] = [{}]
    for name, text in options.float + options.int:
        tried += [{name: end} for end in text.split(":")[:2]]
    tried += [{name: word} for name, text in options.choice for word in text.split(",")]
    for values in tried:
        check_settings({**given, **values}, [options.stage], environment, options)


def _wait(project: Project, look: Request) -> dict[str, Any]:
    printed: dict[str, int] = {}

    def has_ended(found: dict[str, Any]) -> bool:
        nonlocal printed
        counts = found.get("TrainingJobStatusCounters", {})
        if counts and counts != printed:
            printed = counts
            words = ", ".join(f"{key} {value}" for key, value in counts.items() if value)
            project.output.line(f"  {words or 'no training job yet'}")
        return found["HyperParameterTuningJobStatus"] in ENDED

    return project.aws.wait(look, has_ended, every_seconds=POLL_SECONDS)


def show(project: Project, name: str, job: dict[str, Any]) -> int:
    """Print the best job with its hyperparameters; return the exit code."""
    status = job["HyperParameterTuningJobStatus"]
    best = job.get("BestTrainingJob") or {}
    metric = best.get("FinalHyperParameterTuningJobObjectiveMetric", {})
    project.output.item(f"tuning job {name}", status)
    if best.get("TrainingJobName"):
        project.output.item(f"best: {best['TrainingJobName']}", f"{metric.get('Value')}")
        for key, value in best.get("TunedHyperParameters", {}).items():
            project.output.line(f"  --set {key}={value}")
    project.output.finish(
        tuning_job=name,
        status=status,
        best_job=best.get("TrainingJobName"),
        objective=metric.get("Value"),
        hyperparameters=best.get("TunedHyperParameters", {}),
    )
    return 0 if status == "Completed" else 1


def tuning_request(options: argparse.Namespace, training_run: TrainingRun) -> Request:
    """Return the request that starts the search. Raises PlanError for settings that contradict."""
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
    both = sorted(searched & {*training_run.hyperparameters, "stage"})
    if both:
        raise PlanError(f"{', '.join(both)} cannot be both given and searched")
    if len(training_run.environment) > ENVIRONMENT_ENTRIES:
        raise PlanError(
            f"a tuning job has at most {ENVIRONMENT_ENTRIES} environment variables, "
            f"got {len(training_run.environment)}"
        )
    # No CheckpointConfig: all jobs of a search would write into one folder.
    job: dict[str, Any] = {
        "StaticHyperParameters": {**training_run.hyperparameters, "stage": options.stage},
        **definition(training_run, options.artefact),
    }
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
    # The platform derives the names of the jobs from it, so it must be short.
    name = f"{training_run.project}-{digest([search, job, training_run.content])}"[:MAX_NAME]
    parts = {"HyperParameterTuningJobConfig": search, "TrainingJobDefinition": job}
    operation = "CreateHyperParameterTuningJob"
    names = {"HyperParameterTuningJobName": name, "Tags": training_run.tags}
    return Request("sagemaker", operation, **names, **parts)


def parameter_ranges(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Return the search space in the API's form. Raises PlanError for an invalid range."""
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
