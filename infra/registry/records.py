"""The project's pipeline, its runs and registered models, found and deleted by `teardown`."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from infra.aws.project import KIND_WORDS, Project
from infra.aws.request import Request, describe

PIPELINE, GROUP = "Pipeline", "ModelPackageGroup"
RUNNING = ("Executing", "Stopping")


def find(project: Project) -> list[str]:
    """Return which of PIPELINE and GROUP the project has; both are named after it."""
    found = []
    for kind in (PIPELINE, GROUP):
        there = project.aws.find(describe(kind, project.name))
        if there is not None and project.owns(there[f"{kind}Arn"]):
            found.append(kind)
    return found


def running(project: Project) -> dict[str, str]:
    """Return ARN -> status of the pipeline's runs that have not ended: their jobs cost money.

    The platform names these jobs, so that they are not found among those of the project.
    """
    there = project.aws.find(describe(PIPELINE, project.name))
    if there is None or not project.owns(there["PipelineArn"]):
        return {}
    listed = Request("sagemaker", "ListPipelineExecutions", PipelineName=project.name)
    return {
        found["PipelineExecutionArn"]: found["PipelineExecutionStatus"]
        for found in project.aws.items(listed, "PipelineExecutionSummaries")
        if found["PipelineExecutionStatus"] in RUNNING
    }


def stop(project: Project, runs: Mapping[str, str]) -> None:
    """Stop runs of the pipeline, and with each the job that it waits for."""
    for arn, status in runs.items():
        request = {"PipelineExecutionArn": arn, "ClientRequestToken": secrets.token_hex(16)}
        if status != "Stopping":
            project.aws.find(Request("sagemaker", "StopPipelineExecution", **request))
        project.output.item(f"pipeline run {run_id(arn)}", "stopping")


def run_id(arn: str) -> str:
    return arn.rpartition("/")[2]


def delete(project: Project, kinds: list[str]) -> None:
    """Delete what `find` returned. A group goes after the models that are registered in it."""
    aws, name = project.aws, project.name
    if PIPELINE in kinds:
        token = secrets.token_hex(16)
        request = {"PipelineName": name, "ClientRequestToken": token}
        aws.find(Request("sagemaker", "DeletePipeline", **request))
        project.output.item(f"{KIND_WORDS[PIPELINE]} {name}", "deleted")
    if GROUP in kinds:
        listed = Request("sagemaker", "ListModelPackages", ModelPackageGroupName=name)
        for found in list(aws.items(listed, "ModelPackageSummaryList")):
            arn = found["ModelPackageArn"]
            aws.find(Request("sagemaker", "DeleteModelPackage", ModelPackageName=arn))
        aws.find(Request("sagemaker", "DeleteModelPackageGroup", ModelPackageGroupName=name))
        project.output.item(f"{KIND_WORDS[GROUP]} {name}", "deleted")
