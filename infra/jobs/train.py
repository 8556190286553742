"""`train`: one job for all stages, or a chain of jobs that pass the artefact on.

A job's name has a digest of its settings and of the objects that it reads. So a second run finds
the jobs of the first, and new data are another run. It waits for a running one, takes the model of
a completed one, and starts a failed one again from its last checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from dalle.errors import AwsError, PlanError, UserError
from dalle.platform.environment import DEVICES, TRAIN_VARIABLES, unknown_variables
from dalle.types import STAGES
from infra.aws import limits, settings
from infra.aws.project import (
    IMAGE_TAG,
    PRESUMED_IMAGE,
    Project,
    add_pairs,
    add_project_arguments,
    open_project,
    split_uri,
)
from infra.aws.request import Request
from infra.aws.stack import PRESUMED_OUTPUTS, StackOutputs
from infra.aws.storage import check_readable, folder_or_file
from infra.aws.team.names import training_plan_arn
from infra.jobs import progress
from infra.jobs.channels import content_digest, data_channels
from infra.jobs.training_job import (
    Distribution,
    InputMode,
    Stage,
    TrainingRun,
    check_hyperparameters,
    check_run,
    job_name,
    model_uri,
    training_request,
)
from training.config import hyperparameters
from training.config.models import TextSizes, dvae_config, stage_config
from training.config.with_channels import with_channels

MAX_ATTEMPTS = 20
ENDED_BADLY = ("Failed", "Stopped")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    parser.add_argument(
        "--stages",
        type=stages,
        default=("all",),
        metavar="STAGE,…",
        help="all in one job (default), or a chain such as dvae,transformer,clip, a job each",
    )
    parser.add_argument(
        "--no-wait", dest="wait", action="store_false", help="return once the job is started"
    )
    add_project_arguments(parser)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `train` and `tune` share."""
    parser.add_argument(
        "--data",
        required=True,
        metavar="NAME|URI",
        help="a name given to `upload`, or s3://…/ with train/ and optionally validation/",
    )
    hyperparameter = "a hyperparameter (training/REFERENCE.md, Hyperparameters); repeatable"
    add_pairs(parser, "--set", hyperparameter)
    parser.add_argument("--artefact", metavar="URI", help="an earlier model.tar.gz to start from")
    parser.add_argument(
        "--clip", metavar="URI", help="a published CLIP: OpenAI's file, or a folder of open_clip's"
    )
    parser.add_argument(
        "--tokenizer-model",
        metavar="URI",
        help="a folder with the files of a published image tokenizer, in place of the stage dvae",
    )
    parser.add_argument(
        "--legacy",
        metavar="URI",
        help="a folder with a model of DALLE-pytorch and its tokenizer.json, to be trained on",
    )
    parser.add_argument("--tag", default=IMAGE_TAG, help=f"the image's tag; default: {IMAGE_TAG}")
    parser.add_argument(
        "--run",
        default="",
        metavar="NAME",
        help="a word in the names of the jobs; another word starts another run",
    )
    parser.add_argument("--instance-type", default="ml.g5.xlarge", help="default: ml.g5.xlarge")
    parser.add_argument("--instance-count", type=int, default=1, help="hosts; default: 1")
    parser.add_argument("--volume-gb", type=int, default=50, help="disk; default: 50")
    parser.add_argument("--max-hours", type=float, default=24.0, help="running time; default: 24")
    parser.add_argument("--spot", action="store_true", help="spare capacity: cheaper, may pause")
    parser.add_argument(
        "--max-wait-hours",
        type=float,
        help="with --spot: waiting and running; default: twice --max-hours",
    )
    parser.add_argument(
        "--input-mode",
        choices=get_args(InputMode),
        default="File",
        help="File copies the data first; FastFile streams them, for tar shards of 50 MB and more; "
        "Pipe sends them once through a pipe, and is the only mode for an augmented manifest",
    )
    parser.add_argument(
        "--distribution",
        choices=get_args(Distribution),
        default="FullyReplicated",
        help="of the training data: all of them to every host, or different shards to each",
    )
    parser.add_argument(
        "--attributes",
        type=attributes,
        default=(),
        metavar="NAME,…",
        help="for an augmented manifest (--data s3://….manifest): the attribute of the image, then "
        "those of the captions",
    )
    parser.add_argument(
        "--validation",
        metavar="URI",
        help="held-out pairs: s3://…/, or with --attributes a manifest",
    )
    add_pairs(parser, "--env", "a variable of the container; repeatable")
    parser.add_argument(
        "--keep-alive-minutes",
        type=float,
        default=0.0,
        help="keep the instances that long for the next job (a warm pool)",
    )
    parser.add_argument("--isolate", action="store_true", help="give the container no network")
    parser.add_argument(
        "--encrypt-traffic", action="store_true", help="between the hosts of one job; slower"
    )
    parser.add_argument(
        "--training-plan",
        type=training_plan_arn,
        default="",
        metavar="ARN",
        help="a SageMaker training plan, whose reserved hosts the job runs on",
    )
    settings.add_arguments(parser)


def attributes(text: str) -> tuple[str, ...]:
    """Return the names of an augmented manifest's attributes. For argparse."""
    names = tuple(text.split(","))
    if all(names) and len(set(names)) == len(names) and len(names) >= 2:
        return names
    raise argparse.ArgumentTypeError(
        f"expected the image's attribute and then the captions', such as source-ref,caption, got "
        f"{text!r}"
    )


def stages(text: str) -> tuple[Stage, ...]:
    """Return `all`, or stages in the order of training. For argparse."""
    found = tuple(text.split(","))
    known = get_args(Stage)
    in_order = found == ("all",) or found == tuple(stage for stage in STAGES if stage in found)
    if found and in_order and all(stage in known for stage in found):
        return found  # type: ignore[return-value]
    raise argparse.ArgumentTypeError(
        f"expected all, or some of {','.join(STAGES)} in this order, got {text!r}"
    )


def run(options: argparse.Namespace) -> int:
    check_settings(dict(options.set), options.stages, dict(options.env), options)
    project = open_project(options)
    for stage in options.stages:
        check_request(project, options, stage)
    training_run = read_run(options, project)
    artefact = options.artefact
    jobs: list[str] = []
    for stage in options.stages:
        job = start(project, training_run, stage, artefact, is_next=bool(jobs))
        jobs.append(job)
        is_last = stage == options.stages[-1]
        if not project.aws.dry_run and (options.wait or not is_last):
            finish(project, job)
        artefact = model_uri(training_run, job)
    waited = options.wait
    project.output.line(
        f"\nmodel: {artefact}" if waited else f"\nmodel, when it is done: {artefact}"
    )
    return project.output.finish(run=training_run.name, jobs=jobs, model=artefact, waited=waited)


def check_request(project: Project, options: argparse.Namespace, stage: Stage) -> None:
    """Raise PlanError for what the platform would refuse, before the first request."""
    planned = planned_run(options, project)
    request = training_request(planned, stage, job_name(planned, stage))
    project.aws.check(request)


def planned_run(options: argparse.Namespace, project: Project) -> TrainingRun:
    """Return the run as far as it is known before the first request. Raises PlanError."""
    data = options.data
    if options.attributes and (not data.startswith("s3://") or data.endswith("/")):
        raise PlanError(f"with --attributes, --data is an augmented manifest in S3, got {data}")
    if not data.startswith("s3://"):
        data = f"s3://{PRESUMED_OUTPUTS.bucket}/data/{data}/"
    channels = {"train": data, **_other_inputs(options)}
    for uri in (*channels.values(), *([options.artefact] if options.artefact else [])):
        split_uri(uri)
    presumed = settings.presumed_outputs(project, options)
    return _run(options, project, presumed, PRESUMED_IMAGE.uri, channels)


def _other_inputs(options: argparse.Namespace) -> dict[str, str]:
    """Return the channels beside the training data that are given: name -> address."""
    given = {
        "validation": options.validation,
        "clip": options.clip,
        hyperparameters.TOKENIZER_MODEL: options.tokenizer_model,
        hyperparameters.LEGACY: options.legacy,
    }
    return {name: uri for name, uri in given.items() if uri}


def read_run(options: argparse.Namespace, project: Project) -> TrainingRun:
    """Return the run that the options describe. Raises PlanError for a broken limit."""
    outputs = settings.stack_outputs(project, options)
    image = project.image(outputs.repository, options.tag)
    others = _other_inputs(options)
    artefact = [options.artefact] if options.artefact else []
    data = [options.data] if options.data.startswith("s3://") else []
    check_readable(project, outputs, [*data, *others.values(), *artefact])
    if options.attributes:
        channels = {"train": options.data, **others}
    else:
        channels = data_channels(project, outputs, options.data)
        channels |= {name: folder_or_file(project, uri) for name, uri in others.items()}
    content = content_digest(project, [*channels.values(), *artefact])
    return _run(options, project, outputs, image.uri, channels, content)


def _run(
    options: argparse.Namespace,
    project: Project,
    outputs: StackOutputs,
    image_uri: str,
    channels: Mapping[str, str],
    content: str = "",
) -> TrainingRun:
    wait = options.max_wait_hours
    training_run = TrainingRun(
        project=project.name,
        image_uri=image_uri,
        role_arn=outputs.role_arn,
        bucket=outputs.bucket,
        channels=channels,
        content=content,
        hyperparameters=dict(options.set),
        instance_type=options.instance_type,
        instance_count=options.instance_count,
        volume_gb=options.volume_gb,
        max_runtime_seconds=round(options.max_hours * 3600),
        max_wait_seconds=None if wait is None else round(wait * 3600),
        spot=options.spot,
        keep_alive_seconds=round(options.keep_alive_minutes * 60),
        input_mode=options.input_mode,
        distribution=options.distribution,
        attributes=options.attributes,
        isolate=options.isolate,
        environment=dict(options.env),
        note=options.run,
        network=outputs.network,
        encryption=outputs.encryption,
        tags=outputs.tags,
        encrypt_traffic=options.encrypt_traffic,
        training_plan=options.training_plan,
    )
    check_run(training_run)
    return training_run


def check_settings(
    given: Mapping[str, str],
    stages: Iterable[Stage],
    environment: Mapping[str, str],
    models: argparse.Namespace,
) -> None:
    """Raise UserError for hyperparameters and variables that the jobs would refuse or not read.

    models: the options `artefact`, `clip`, `tokenizer_model` and `legacy`, which decide sizes of
        the others.
    """
    given_models = {
        f"--{name.replace('_', '-')}": getattr(models, name)
        for name in ("artefact", hyperparameters.TOKENIZER_MODEL, hyperparameters.LEGACY)
    }
    brought = [option for option, uri in given_models.items() if uri]
    if len(brought) > 1:
        raise PlanError(
            f"{brought[0]} and {brought[1]} both bring an image tokenizer; leave one of them out"
        )
    names = ("artefact", "clip", hyperparameters.TOKENIZER_MODEL, hyperparameters.LEGACY)
    channels = [name for name in names if getattr(models, name)]
    if "stage" in given:
        raise PlanError("the stage is given by --stages, not by --set stage=…")
    limits.raise_all("hyperparameters", check_hyperparameters(given))
    problems = unknown_variables(environment, TRAIN_VARIABLES)
    if (device := environment.get("DALLE_DEVICE", DEVICES[0])) not in DEVICES:
        problems.append(f"DALLE_DEVICE must be one of {', '.join(DEVICES)}, got {device!r}")
    if problems:
        raise UserError("; ".join(problems))
    for stage in stages:
        settings = with_channels(hyperparameters.parse({**given, "stage": stage}), channels)
        if stage == "dvae" or (stage == "all" and not brought):
            dvae = dvae_config(settings)
            text = TextSizes(settings.tokenizer_vocab_size, settings.text_length)
            stage_config("transformer", settings, text, dvae)
            stage_config("clip", settings, text, dvae)


def holds_objects(project: Project, uri: str) -> bool:
    bucket, prefix = split_uri(uri)
    answer = project.aws.call(
        Request("s3", "ListObjectsV2", Bucket=bucket, Prefix=prefix, MaxKeys=1),
        answer={"KeyCount": 1},
    )
    return bool(answer["KeyCount"])


def start(
    project: Project,
    training_run: TrainingRun,
    stage: Stage,
    artefact: str | None,
    *,
    is_next: bool = False,
) -> str:
    """Start the stage's job unless it is running or completed; return its name.

    artefact: an address, or None. is_next: whether an earlier job of this chain makes it.
    """
    for attempt in range(1, MAX_ATTEMPTS + 1):
        name = job_name(training_run, stage, attempt)
        found = project.find_ours("TrainingJob", name)
        if found is None:
            break
        status = found["TrainingJobStatus"]
        if status == "Completed" and not holds_objects(project, model_uri(training_run, name)):
            status = "Completed, but its model is gone"
        elif status not in ENDED_BADLY:
            project.output.item(f"training job {name}", f"already there, {status}")
            project.output.line("  its data, settings and image are these; --run NAME trains anew")
            return name
        project.output.item(f"training job {name}", f"{status}; another attempt")
    else:
        raise UserError(
            f"{MAX_ATTEMPTS} attempts at {job_name(training_run, stage)} have failed; "
            f"`python -m infra status {name}` shows why, and --run gives another name"
        )
    request = training_request(training_run, stage, name, artefact, is_next=is_next)
    project.aws.call(request)
    project.output.item(f"training job {name}", "made")
    return name


def finish(project: Project, name: str) -> dict[str, Any]:
    """Print the job's progress until it ends. Raises AwsError with the reason when it fails."""
    done = progress.follow(project, name)
    status = done["TrainingJobStatus"]
    if status != "Completed":
        raise AwsError(
            f"training job {name} is {status}: {done.get('FailureReason') or 'no reason given'}\n"
            f"its log: python -m infra logs {name}"
        )
    return done
