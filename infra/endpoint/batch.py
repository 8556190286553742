"""`deploy --mode batch`: a file of captions through a transform job, and its pictures as files.

One request a line, so that each caption has its own deadline; a line that cannot be drawn is told
in its own reply and does not sink the others. Nothing is left running.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle.errors import AwsError, PlanError, UserError
from infra.aws.limits import BATCH_AMI, BATCH_PAYLOAD_MB, Deployment, check_payload, has_gpu
from infra.aws.output import Console
from infra.aws.project import Project
from infra.aws.request import Call, digest
from infra.endpoint import results
from infra.endpoint.invoke import JSON_LINES

DEFAULT_OUT = Path("out/batch")
PAYLOAD_MB = 6
POLL_SECONDS = 15.0
FILE = "captions.jsonl"


@dataclass(frozen=True)
class Work:
    """One batch: the job, and where in the bucket its captions and pictures are.

    body: the requests, one a line. folder: without the bucket.
    """

    job: Call
    bucket: str
    folder: str
    body: bytes

    @property
    def name(self) -> str:
        return str(self.job.parameters["TransformJobName"])


def plan(
    wanted: Deployment, model_name: str, bucket: str, captions: Path, tags: list[dict[str, str]]
) -> Work:
    """Raises UserError for captions that cannot be read, PlanError for what is too much."""
    body = requests(captions)
    check_payload("batch", len(body))
    folder = f"batch/{digest([body.decode(), wanted.model_data])}"
    return Work(transform_call(wanted, model_name, bucket, folder, tags), bucket, folder, body)


def run(opened: Project, work: Work, out: Path | None) -> int:
    """Upload the captions, run the job unless it has run, and write what came of it."""
    console = opened.console
    name, out = work.name, out or DEFAULT_OUT
    look = Call("sagemaker", "DescribeTransformJob", {"TransformJobName": name})
    if opened.aws.find(look) is None:
        source = {"Bucket": work.bucket, "Key": f"{work.folder}/in/{FILE}", "Body": work.body}
        opened.aws.call(Call("s3", "PutObject", source))
        opened.aws.call(work.job)
        console.item(f"transform job {name}", "made")
    else:
        console.item(f"transform job {name}", "already there")
    done = opened.aws.wait(
        look,
        lambda answer: answer["TransformJobStatus"] in ("Completed", "Failed", "Stopped"),
        every_seconds=POLL_SECONDS,
    )
    if opened.aws.dry_run:
        return console.finish()
    if done["TransformJobStatus"] != "Completed":
        raise AwsError(
            f"transform job {name} is {done['TransformJobStatus']}: "
            f"{done.get('FailureReason') or 'no reason given'}; "
            f"its log: python -m infra logs {name}"
        )
    key = f"{work.folder}/out/{FILE}.out"
    reply = opened.aws.read(work.bucket, key)
    if reply is None:
        raise AwsError(f"transform job {name} left no s3://{work.bucket}/{key}")
    written, refused = save(console, reply, out)
    console.say(f"{written} pictures in {out}; {refused} captions refused")
    return console.finish(transform_job=name, pictures=written, refused=refused, folder=str(out))


def requests(captions: Path) -> bytes:
    """JSON lines, a request for each line of the file that is not empty. Raises UserError."""
    try:
        text = captions.read_text("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {captions}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{captions} is not UTF-8 at byte {error.start}") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{captions} has no captions; one a line was expected")
    # A seed by line: a second run of the same file draws the same pictures.
    return b"".join(
        json.dumps({"caption": caption, "seed": number}, ensure_ascii=False).encode() + b"\n"
        for number, caption in enumerate(lines)
    )


def transform_call(
    wanted: Deployment, model_name: str, bucket: str, folder: str, tags: list[dict[str, str]]
) -> Call:
    """The request that makes the job. Raises PlanError for payloads beyond the platform's."""
    if PAYLOAD_MB * wanted.concurrent_per_instance > BATCH_PAYLOAD_MB:
        raise PlanError(
            f"--concurrent times {PAYLOAD_MB} MB must be at most {BATCH_PAYLOAD_MB} MB: at most "
            f"{BATCH_PAYLOAD_MB // PAYLOAD_MB}, got {wanted.concurrent_per_instance}"
        )
    resources: dict[str, Any] = {
        "InstanceType": wanted.instance_type,
        "InstanceCount": wanted.max_instances,
    }
    if has_gpu(str(wanted.instance_type)):
        resources["TransformAmiVersion"] = BATCH_AMI
    source = {"S3DataType": "S3Prefix", "S3Uri": f"s3://{bucket}/{folder}/in/{FILE}"}
    request = {
        "ModelName": model_name,
        "MaxConcurrentTransforms": wanted.concurrent_per_instance,
        "MaxPayloadInMB": PAYLOAD_MB,
        "BatchStrategy": "SingleRecord",
        "ModelClientConfig": {
            "InvocationsTimeoutInSeconds": wanted.invocation_seconds,
            "InvocationsMaxRetries": 1,
        },
        "TransformInput": {
            "DataSource": {"S3DataSource": source},
            "ContentType": JSON_LINES,
            "SplitType": "Line",
        },
        "TransformOutput": {
            "S3OutputPath": f"s3://{bucket}/{folder}/out/",
            "Accept": JSON_LINES,
            "AssembleWith": "Line",
        },
        "TransformResources": resources,
    }
    name = f"{wanted.name}-{digest(request)}"
    return Call(
        "sagemaker", "CreateTransformJob", {"TransformJobName": name, **request, "Tags": tags}
    )


def save(console: Console, reply: bytes, out: Path) -> tuple[int, int]:
    """Write the pictures of every line; returns how many, and how many captions were refused."""
    written = refused = 0
    for number, line in enumerate(reply.splitlines(), 1):
        message = results.error_message(line)
        if message is None:
            drawn = results.read_reply(line)
            pictures = results.save_pictures(drawn, out, "png", prefix=f"{number:04}-")
            written += len(pictures)
        else:
            refused += 1
            console.item(f"caption {number}", message)
    return written, refused
