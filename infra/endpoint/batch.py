"""`deploy --mode batch`: a file of captions through a transform job, and the images as files.

One request a line, so that each caption has its own deadline, and an error in one line leaves the
others unaffected. Nothing is left running.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle.errors import AwsError, PlanError
from inference.bench.workload import read_captions
from infra.aws.deployment import Deployment
from infra.aws.limits import BATCH_AMI, BATCH_PAYLOAD_MB, check_payload, has_gpu
from infra.aws.output import Output
from infra.aws.project import Project
from infra.aws.request import Request, describe, digest
from infra.aws.stack import StackOutputs
from infra.endpoint.calls import results
from infra.endpoint.calls.streamed import JSON_LINES

DEFAULT_OUT = Path("out/batch")
PAYLOAD_MB = 6
POLL_SECONDS = 15.0
FILE = "captions.jsonl"


@dataclass(frozen=True)
class Batch:
    """One batch: its job, and the folder of its captions and results in the bucket.

    body: the requests, one a line. folder: without the bucket.
    """

    name: str
    request: Request
    bucket: str
    folder: str
    body: bytes


def plan(deployment: Deployment, model_name: str, outputs: StackOutputs, captions: Path) -> Batch:
    """Return the batch. Raises UserError for unreadable captions, PlanError for a broken limit."""
    body = requests(captions)
    check_payload("batch", len(body))
    folder = f"batch/{digest([body.decode(), deployment.model_data])}"
    request = transform_request(deployment, model_name, outputs, folder)
    return Batch(request.parameters["TransformJobName"], request, outputs.bucket, folder, body)


def run(project: Project, batch: Batch, out: Path | None) -> int:
    """Upload the captions, run the job unless it has run, and write the images."""
    output = project.output
    name, out = batch.name, out or DEFAULT_OUT
    look = describe("TransformJob", name)
    key = f"{batch.folder}/in/{FILE}"
    captions = Request("s3", "PutObject", Bucket=batch.bucket, Key=key, Body=batch.body)
    project.ensure("TransformJob", name, captions, batch.request)
    done = project.aws.wait(
        look,
        lambda answer: answer["TransformJobStatus"] in ("Completed", "Failed", "Stopped"),
        every_seconds=POLL_SECONDS,
    )
    if project.aws.dry_run:
        return output.finish()
    if done["TransformJobStatus"] != "Completed":
        raise AwsError(
            f"transform job {name} is {done['TransformJobStatus']}: "
            f"{done.get('FailureReason') or 'no reason given'}; "
            f"its log: python -m infra logs {name}"
        )
    key = f"{batch.folder}/out/{FILE}.out"
    reply = project.aws.read(batch.bucket, key)
    if reply is None:
        raise AwsError(f"transform job {name} left no s3://{batch.bucket}/{key}")
    written, refused = save(output, reply, out)
    output.line(f"{written} images in {out}; {refused} captions refused")
    return output.finish(transform_job=name, pictures=written, refused=refused, folder=str(out))


def requests(captions: Path) -> bytes:
    """JSON lines, a request for each line of the file that is not empty. Raises UserError."""
    # A seed by line, so that a second run of the same file gives the same images.
    return b"".join(
        json.dumps({"caption": caption, "seed": number}, ensure_ascii=False).encode() + b"\n"
        for number, caption in enumerate(read_captions(captions, None))
    )


def transform_request(
    deployment: Deployment, model_name: str, outputs: StackOutputs, folder: str
) -> Request:
    """The request that makes the job. Raises PlanError for payloads beyond the platform's."""
    if PAYLOAD_MB * deployment.concurrent_per_instance > BATCH_PAYLOAD_MB:
        raise PlanError(
            f"--concurrent times {PAYLOAD_MB} MB must be at most {BATCH_PAYLOAD_MB} MB: at most "
            f"{BATCH_PAYLOAD_MB // PAYLOAD_MB}, got {deployment.concurrent_per_instance}"
        )
    resources: dict[str, Any] = {
        "InstanceType": deployment.instance_type,
        "InstanceCount": deployment.max_instances,
        **outputs.encryption.volume_fields("VolumeKmsKeyId", deployment.instance_type),
    }
    if has_gpu(str(deployment.instance_type)):
        resources["TransformAmiVersion"] = BATCH_AMI
    source = {"S3DataType": "S3Prefix", "S3Uri": f"s3://{outputs.bucket}/{folder}/in/{FILE}"}
    request = {
        "ModelName": model_name,
        "MaxConcurrentTransforms": deployment.concurrent_per_instance,
        "MaxPayloadInMB": PAYLOAD_MB,
        "BatchStrategy": "SingleRecord",
        "ModelClientConfig": {
            "InvocationsTimeoutInSeconds": deployment.invocation_seconds,
            "InvocationsMaxRetries": 1,
        },
        "TransformInput": {
            "DataSource": {"S3DataSource": source},
            "ContentType": JSON_LINES,
            "SplitType": "Line",
        },
        "TransformOutput": {
            "S3OutputPath": f"s3://{outputs.bucket}/{folder}/out/",
            "Accept": JSON_LINES,
            "AssembleWith": "Line",
            **outputs.encryption.output_fields,
        },
        "TransformResources": resources,
    }
    name = f"{deployment.name}-{digest(request)}"
    operation = "CreateTransformJob"
    return Request("sagemaker", operation, TransformJobName=name, **request, Tags=outputs.tags)


def save(output: Output, reply: bytes, out: Path) -> tuple[int, int]:
    """Write the images of every line; return the numbers of images and of refused captions.

    Empty lines count for nothing: the platform ends a line that has ended already.
    """
    written = refused = 0
    for number, line in enumerate(filter(None, map(bytes.strip, reply.splitlines())), 1):
        message = results.error_message(line)
        if message is None:
            reply_to_line = results.read_reply(line)
            images = results.save_images(reply_to_line, out, "png", prefix=f"{number:04}-")
            written += len(images)
            for warning in reply_to_line.warnings:
                output.item(f"caption {number}", f"warning: {warning}")
        else:
            refused += 1
            output.item(f"caption {number}", message)
    return written, refused
