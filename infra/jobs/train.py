"""`train`: one job for all stages, or a chain of jobs that pass the artefact on.

A job's name has a digest of its settings and of the objects that it reads. So a second run finds
the jobs of the first, and new data are another run. It waits for a running one, takes the model of
a completed one, and starts a failed one again from its last checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from dalle.errors import AwsError, PlanError, UserError
from dalle.platform.environment import DEVICES, TRAIN_VARIABLES, unknown_variables
from dalle.platform.splits import Split, split_of
from dalle.types import STAGES
from infra.aws import limits
from infra.aws.project import (
    IMAGE_TAG,
    Project,
    StackOutputs,
    add_pairs,
    add_project_arguments,
    open_project,
    split_uri,
)
from infra.aws.request import Request
from infra.jobs import progress
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
    parser.add_argument("--clip", metavar="URI", help="a pretrained OpenAI CLIP file")
    parser.add_argument(
        "--tokenizer-model",
        metavar="URI",
        help="a folder with the files of a published image tokenizer, in place of the stage dvae",
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
    training_run = read_run(options, project)
    artefact = options.artefact
    jobs = []
    for stage in options.stages:
        job = start(project, training_run, stage, artefact)
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


def read_run(options: argparse.Namespace, project: Project) -> TrainingRun:
    """Return the run that the options describe. Raises PlanError for a broken limit."""
    given = dict(options.set)
    outputs = project.stack_outputs()
    image = project.image(outputs.repository, options.tag)
    if options.attributes:
        if not options.data.startswith("s3://") or options.data.endswith("/"):
            raise PlanError(
                f"with --attributes, --data is an augmented manifest in S3, got {options.data}"
            )
        channels = {"train": options.data}
    else:
        channels = data_channels(project, outputs, options.data)
    if options.validation:
        channels["validation"] = options.validation
    if options.clip:
        channels["clip"] = options.clip
    if options.tokenizer_model:
        channels[hyperparameters.TOKENIZER_MODEL] = options.tokenizer_model
    wait = options.max_wait_hours
    inputs = [*channels.values(), *([options.artefact] if options.artefact else [])]
    training_run = TrainingRun(
        project=project.name,
        image_uri=image.uri,
        role_arn=outputs.role_arn,
        bucket=outputs.bucket,
        channels=channels,
        content=content_digest(project, inputs),
        hyperparameters=given,
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

    models: the options `artefact` and `tokenizer_model`, which decide sizes of the others.
    """
    if models.artefact and models.tokenizer_model:
        raise PlanError(
            "--artefact and --tokenizer-model both bring an image tokenizer; leave one of them out"
        )
    channels = [hyperparameters.TOKENIZER_MODEL] if models.tokenizer_model else []
    if "stage" in given:
        raise PlanError("the stage is given by --stages, not by --set stage=…")
    limits.raise_all("hyperparameters", check_hyperparameters(given))
    problems = unknown_variables(environment, TRAIN_VARIABLES)
    if (device := environment.get("DALLE_DEVICE", DEVICES[0])) not in DEVICES:
        problems.append(f"DALLE_DEVICE must be one of {', '.join(DEVICES)}, got {device!r}")
    if problems:
        raise UserError("; ".join(problems))
    for stage in stages:
        settings = hyperparameters.parse({**given, "stage": stage})
        hyperparameters.check_with_channels(settings, channels)
        if stage == "dvae" or (stage == "all" and not (models.artefact or models.tokenizer_model)):
            dvae = dvae_config(settings)
            text = TextSizes(settings.tokenizer_vocab_size, settings.text_length)
            stage_config("transformer", settings, text, dvae)
            stage_config("clip", settings, text, dvae)


def data_channels(project: Project, outputs: StackOutputs, data: str) -> dict[str, str]:
    """Return the channels `train` and, where there is one, `validation`.

    They are the folders of these names (see `dalle.platform.splits`). A folder in which there are
    none is the channel `train` itself. Raises UserError without data, and where pictures that are
    held out would be trained on.
    """
    base = data if data.startswith("s3://") else f"s3://{outputs.bucket}/data/{data}"
    # Without the slash a channel would also include prefixes that begin alike: train, train_old.
    base = base.rstrip("/") + "/"
    names = top_names(project, base)
    if not names:
        raise UserError(
            f"there is nothing at {base}; `python -m infra upload FOLDER --name {data}` uploads it"
        )
    found = splits_in(names)
    for split, folders in found.items():
        if split != "test" and len(folders) > 1 and all(name.endswith("/") for name in folders):
            raise UserError(
                f"{base} has {' and '.join(folders)}, and the channel {split} can be only one of "
                f"them; move the other away, or name one: --data {base}{folders[0]}"
            )
    train = [name for name in found.get("train", []) if name.endswith("/")]
    if not train:
        _refuse_held_out(base, found)
        return {"train": base}
    channels = {"train": base + train[0]}
    inside = top_names(project, channels["train"], if_dry_run=())
    _refuse_held_out(channels["train"], splits_in(inside))
    for name in found.get("validation", []):
        channels["validation"] = base + name
    for name in found.get("test", []):
        project.output.line(f"{base}{name} is left out: it is neither to train nor to validate on")
    return channels


def _refuse_held_out(uri: str, found: Mapping[Split, list[str]]) -> None:
    """Raise UserError when a channel to train on holds what is held out."""
    held_out = found.get("validation", []) + found.get("test", [])
    if held_out:
        raise UserError(
            f"{uri} would be the channel train, and it holds {', '.join(held_out[:5])}: pictures "
            "that are held out would be trained on. Put those to train on into a folder train/ "
            "and those to validate on into validation/ beside it"
        )


def splits_in(names: Iterable[str]) -> dict[Split, list[str]]:
    """Return split -> the names that belong to it. A folder's name ends with a slash."""
    found: dict[Split, list[str]] = {}
    for name in sorted(names):
        split = split_of(name.rstrip("/"), is_folder=name.endswith("/"))
        if split is not None:
            found.setdefault(split, []).append(name)
    return found


def top_names(
    project: Project, uri: str, *, if_dry_run: Iterable[str] = ("train", "validation")
) -> set[str]:
    """Return the first parts of the keys below an address; a folder's ends with a slash.

    if_dry_run: the folders that a dry run presumes.
    """
    bucket, prefix = split_uri(uri)
    request = Request("s3", "ListObjectsV2", Bucket=bucket, Prefix=prefix, Delimiter="/")
    answer = [{"Prefix": f"{prefix}{name}/"} for name in if_dry_run]
    folders = project.aws.items(request, "CommonPrefixes", answer=answer)
    names = {found["Prefix"].removeprefix(prefix) for found in folders}
    files = [] if project.aws.dry_run else project.aws.items(request, "Contents")
    return names | {found["Key"].removeprefix(prefix) for found in files} - {""}


def content_digest(project: Project, uris: Iterable[str]) -> str:
    """Return a digest of the objects at some addresses: their names, sizes and ETags."""
    content = hashlib.sha256()
    for uri in sorted(uris):
        bucket, prefix = split_uri(uri)
        request = Request("s3", "ListObjectsV2", Bucket=bucket, Prefix=prefix)
        for found in project.aws.items(request, "Contents"):
            line = f"{uri} {found['Key']} {found['Size']} {found['ETag']}\n"
            content.update(line.encode())
    return content.hexdigest()


def holds_objects(project: Project, uri: str) -> bool:
    bucket, prefix = split_uri(uri)
    answer = project.aws.call(
        Request("s3", "ListObjectsV2", Bucket=bucket, Prefix=prefix, MaxKeys=1),
        answer={"KeyCount": 1},
    )
    return bool(answer["KeyCount"])


def start(project: Project, training_run: TrainingRun, stage: Stage, artefact: str | None) -> str:
    """Start the stage's job unless it is running or completed; return its name."""
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
    project.aws.call(training_request(training_run, stage, name, project.tags, artefact))
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
