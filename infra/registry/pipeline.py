"""`pipeline`: a SageMaker pipeline that trains, evaluates, and registers on a threshold.

It has the options of `train`. A run trains anew on the data of that day, with the same settings.
"""

from __future__ import annotations

import argparse
import json
import math
import secrets
from collections.abc import Mapping
from pathlib import Path

from dalle.errors import PlanError, UserError
from dalle.platform.metric_lines import METRIC_DEFINITIONS
from infra.aws.output import write_file
from infra.aws.project import Project, add_pairs, add_project_arguments, open_project
from infra.aws.request import Request, has_placeholder, placeholder
from infra.aws.stack import outputs_of
from infra.aws.team.names import role_arn
from infra.jobs.train import add_run_arguments, check_settings, planned_run, read_run
from infra.jobs.training_job import Stage, TrainingRun, training_request
from infra.registry.definition import definition
from infra.registry.package import group_request

LOSSES = [m["Name"] for m in METRIC_DEFINITIONS if m["Name"].endswith("validation_loss")]
STAGE: Stage = "all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pairs(
        parser,
        "--require",
        "the highest validation loss with which a model is registered; repeatable",
        "METRIC=VALUE",
    )
    parser.add_argument(
        "--pipeline-role",
        type=role_arn,
        metavar="ARN",
        help="what the pipeline runs as; default: the role of `bootstrap --pipelines yes`",
    )
    parser.add_argument("--start", action="store_true", help="start a run of it, too")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the definition here, too")
    add_run_arguments(parser)
    add_project_arguments(parser)


def run(options: argparse.Namespace) -> int:
    required = read_required(options.require)
    if options.role and not options.pipeline_role:
        raise PlanError(
            f"--role {options.role} needs --pipeline-role: the stack's role of pipelines may give "
            "jobs the stack's role alone; `python -m infra bootstrap --role ARN` changes that one"
        )
    check_settings(dict(options.set), [STAGE], dict(options.env), options)
    project = open_project(options)
    planned = planned_run(options, project)
    role = options.pipeline_role or placeholder("PipelineRoleArn of the stack")
    project.aws.check(create_request(planned, required, role, options.artefact))
    training_run = read_run(options, project)
    request = create_request(
        training_run, required, options.pipeline_role or pipeline_role(project), options.artefact
    )
    text = request.parameters["PipelineDefinition"]
    if options.out:
        write_file(options.out, json.dumps(json.loads(text), indent=2) + "\n")
    group = project.name
    project.ensure("ModelPackageGroup", group, group_request(group, training_run.tags))
    state = put_pipeline(project, request)
    execution = start(project, project.name) if options.start else None
    return project.output.finish(
        pipeline=project.name, state=state, definition=json.loads(text), execution=execution
    )


def read_required(pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Return metric -> the highest value. Raises PlanError for what a job does not print."""
    if not pairs:
        raise PlanError(f"--require is missing, such as --require {LOSSES[1]}=4.5")
    found = {}
    for name, text in pairs:
        if name not in LOSSES:
            raise PlanError(
                f"--require takes a validation loss, one of {', '.join(LOSSES)}; got {name!r}"
            )
        try:
            found[name] = float(text)
        except ValueError as error:
            raise PlanError(f"--require {name} needs a number, got {text!r}") from error
        if not math.isfinite(found[name]):
            raise PlanError(f"--require {name} needs a finite number, got {text!r}")
    return found


def create_request(
    run: TrainingRun, required: Mapping[str, float], role: str, artefact: str | None
) -> Request:
    """Return the request that creates the pipeline; its token is of the definition."""
    if "validation" not in run.channels and not has_placeholder(run.bucket):
        raise PlanError(
            "a pipeline requires a validation loss, and the data have no validation/: put "
            "held-out pairs there, or give --validation"
        )
    training = training_request(run, STAGE, run.project, artefact)
    content = definition(training, run.project, required, image=run.image_uri)
    return Request(
        "sagemaker",
        "CreatePipeline",
        PipelineName=run.project,
        PipelineDefinition=json.dumps(content, sort_keys=True),
        PipelineDescription="Trains, evaluates, and registers a model that is good enough.",
        ClientRequestToken=secrets.token_hex(16),
        RoleArn=role,
        Tags=run.tags,
    )


def pipeline_role(project: Project) -> str:
    """Return the stack's role of pipelines. Raises UserError when it has none."""
    stack = project.stack()
    if project.aws.dry_run:
        return placeholder("PipelineRoleArn of the stack")
    found = outputs_of(stack).get("PipelineRoleArn")
    if not found:
        raise UserError(
            "the project has no role for pipelines: `python -m infra bootstrap --pipelines yes` "
            "makes one, or name one by --pipeline-role ARN"
        )
    return found


def put_pipeline(project: Project, create: Request) -> str:
    """Create the pipeline, or change it; return `made`, `changed` or `already there`.

    Raises UserError when the pipeline of that name is not the project's.
    """
    name = create.parameters["PipelineName"]
    there = project.find_ours("Pipeline", name)
    kept = ("PipelineDefinition", "RoleArn")
    if there is None:
        project.aws.call(create)
        state = "made"
    elif all(there.get(key) == create.parameters[key] for key in kept):
        state = "already there"
    else:
        fields = {key: create.parameters[key] for key in ("PipelineName", *kept)}
        project.aws.call(Request("sagemaker", "UpdatePipeline", **fields))
        state = "changed"
    project.output.item(f"pipeline {name}", state)
    return state


def start(project: Project, name: str) -> str:
    """Start a run and return its ARN."""
    answer = project.aws.call(
        Request(
            "sagemaker",
            "StartPipelineExecution",
            PipelineName=name,
            ClientRequestToken=secrets.token_hex(16),
        ),
        answer={"PipelineExecutionArn": placeholder("PipelineExecutionArn")},
    )
    execution = str(answer["PipelineExecutionArn"])
    project.output.item(f"run {execution.rpartition('/')[2]}", "started")
    return execution
