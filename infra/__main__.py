"""`python -m infra COMMAND`: everything between the image and AWS.

A command's module is imported when the command is chosen, so that `--help` is quick and one
command does not load the libraries of another. Each module has `add_arguments(parser)` and
`run(options) -> exit code`.

Exit codes: 0 it worked (or was there already), 1 it failed, 2 the command line is wrong,
130 interrupted. An error is one message that says what to do; a traceback is a bug in this program.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from dalle.errors import DalleError

FAILED = 1
USAGE = 2
INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """module: its import name. summary: one line. examples: what follows `python -m infra`."""

    module: str
    summary: str
    examples: tuple[str, ...]


COMMANDS: dict[str, Command] = {
    "bootstrap": Command(
        "infra.setup.bootstrap",
        "create the project's bucket, image repository and role, as one stack",
        ("bootstrap", "bootstrap --read-bucket our-pictures --region eu-central-1"),
    ),
    "push": Command(
        "infra.setup.push",
        "push the Docker image to the project's repository, and check that SageMaker accepts it",
        ("push", "push --image dalle-sagemaker:trial --tag trial"),
    ),
    "upload": Command(
        "infra.setup.upload",
        "copy a folder of images and captions to the bucket; unchanged files are skipped",
        ("upload out/job/input/data --name rainbow", "upload pictures --name stars --delete"),
    ),
    "train": Command(
        "infra.jobs.train",
        "train on SageMaker: all stages in one job, or a chain of jobs",
        (
            "train --data rainbow --set size=small --spot",
            "train --data rainbow --stages dvae,transformer,clip --instance-type ml.g5.2xlarge",
            "train --data s3://our-pictures/shards/ --input-mode FastFile --no-wait",
            "train --data shards --distribution ShardedByS3Key --instance-count 4",
            "train --data s3://our-pictures/all.manifest --attributes source-ref,caption "
            "--input-mode Pipe",
        ),
    ),
    "tune": Command(
        "infra.jobs.tune",
        "search hyperparameters by a tuning job",
        (
            "tune --data rainbow --float transformer_learning_rate=0.0001:0.01:log --max-jobs 8",
            "tune --data rainbow --choice size=tiny,small --objective clip_validation_loss",
        ),
    ),
    "register": Command(
        "infra.registry.register",
        "put a trained model into the Model Registry, with its metrics and a model card",
        ("register", "register dalle-1a2b3c4d5e-all --approve"),
    ),
    "pipeline": Command(
        "infra.registry.pipeline",
        "make a pipeline that trains, evaluates, and registers a model that is good enough",
        ("pipeline --data rainbow --require transformer_validation_loss=4.5 --start",),
    ),
    "status": Command(
        "infra.account.status",
        "show the project's storage, jobs and endpoints, with their state and cost",
        ("status", "status dalle-1a2b3c4d5e-all", "status --json"),
    ),
    "logs": Command(
        "infra.jobs.logs",
        "show the log of a job or an endpoint",
        ("logs", "logs dalle-1a2b3c4d5e-all --follow", "logs dalle --tail 200"),
    ),
    "deploy": Command(
        "infra.endpoint.deploy",
        "serve a trained model: always on, scaled to zero, serverless, or one batch",
        (
            "deploy --mode async --instance-type ml.g5.xlarge",
            "deploy --mode serverless --memory-mb 6144",
            "deploy --mode realtime --instance-type ml.c7i.2xlarge --max-instances 4",
            "deploy --mode batch --captions captions.txt --out out/batch",
            "deploy --mode realtime --min-instances 2 --rollout canary --step-percent 50",
        ),
    ),
    "invoke": Command(
        "infra.endpoint.calls.command",
        "send a caption to an endpoint, and write the images that come back as files",
        (
            "invoke 'big filled orange star' --out out/star",
            "invoke 'big filled orange star' --num-candidates 32 --num-images 4 --stream",
            "invoke 'big filled orange star' --openai",
        ),
    ),
    "monitor": Command(
        "infra.endpoint.monitoring.command",
        "alarms and a dashboard of an endpoint: latency, errors, queue, memory",
        ("monitor", "monitor --endpoint stars --latency-seconds 20 --errors 5"),
    ),
    "teardown": Command(
        "infra.account.teardown",
        "list the project's resources with their cost, delete them, and check that none is left",
        ("teardown", "teardown --yes", "teardown --keep-storage"),
    ),
    "prices": Command(
        "infra.cost.command",
        "show the dated price table, or refresh it from AWS",
        ("prices", "prices refresh --type ml.g5.xlarge --region eu-west-1 --out prices.json"),
    ),
    "cost": Command(
        "infra.compare.training",
        "say what a training job costs on several instance types, on demand and spot",
        (
            "cost plan.json",
            "cost plan.json --type ml.g5.xlarge --type ml.p5.4xlarge --html out/job.html",
        ),
    ),
    "benchmark": Command(
        "infra.benchmark.command",
        "measure latency and throughput of a server, the local image or an endpoint",
        (
            "benchmark --url http://127.0.0.1:8080 --clients 1 --clients 8",
            "benchmark --image dalle-sagemaker --model model.tar.gz --cpus 1 --cpus 2",
            "benchmark --endpoint dalle --rate 0.5 --out out/endpoint.json",
        ),
    ),
    "compare": Command(
        "infra.compare.command",
        "join measurements with prices: dollars per thousand images, and which way to serve",
        (
            "compare RUN.json=ml.c7i.large,serverless",
            "compare cpu.json=ml.c5.large gpu.json=ml.g5.xlarge --html out/compare.html",
        ),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0 if words else USAGE
    name = words[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(COMMANDS)}"
        print(f"there is no command {name!r}{hint}", file=sys.stderr)
        return USAGE
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        module = importlib.import_module(COMMANDS[name].module)
        options = parser_of(name, COMMANDS[name], module).parse_args(words[1:])
    except SystemExit as exit_:  # argparse: 0 after --help, 2 after a mistake
        return exit_.code if isinstance(exit_.code, int) else USAGE
    try:
        return int(module.run(options))
    except DalleError as error:
        return _failed(error, as_json=getattr(options, "json", False))
    except Exception as error:
        from infra.aws.client import ERRORS, explain  # loads boto3, which some commands do without

        if not isinstance(error, ERRORS):
            raise
        return _failed(explain(error), as_json=getattr(options, "json", False))
    except KeyboardInterrupt:
        print("\ninterrupted; what was started at AWS continues there", file=sys.stderr)
        return INTERRUPTED


def overview() -> str:
    """Return the text of `--help` without a command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m infra COMMAND [options]",
            "",
            *lines,
            "",
            "`python -m infra COMMAND --help` shows a command's options, with examples.",
            "Exit codes: 0 it worked or was there already, 1 it failed, 2 the command line is "
            "wrong,",
            "130 it was interrupted.",
        ]
    )


def parser_of(name: str, command: Command, module: object) -> argparse.ArgumentParser:
    """Return the parser of one command, with its examples below the options."""
    parser = argparse.ArgumentParser(
        prog=f"python -m infra {name}",
        description=command.summary[0].upper() + command.summary[1:] + ".",
        epilog="examples:\n" + "\n".join(f"  python -m infra {e}" for e in command.examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)  # type: ignore[attr-defined]
    return parser


def _failed(error: DalleError, *, as_json: bool) -> int:
    print(f"{error}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": {"code": error.code, "message": str(error)}}))
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
