"""The project's pipeline and registered models, found and deleted by `teardown`."""

from __future__ import annotations

import secrets

from infra.aws.project import KIND_WORDS, Project
from infra.aws.request import Request, describe

PIPELINE, GROUP = "Pipeline", "ModelPackageGroup"


def find(project: Project) -> list[str]:
    """Return which of PIPELINE and GROUP the project has; both are named after it."""
    found = []
    for kind in (PIPELINE, GROUP):
        there = project.aws.find(describe(kind, project.name))
        if there is not None and project.owns(there[f"{kind}Arn"]):
            found.append(kind)
    return found


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
