"""The commands: what each is for, by which module, and examples for its `--help`.

A module is imported when its command is chosen, so that `--help` is quick and one command's
libraries burden no other. Each has `add_arguments(parser)` and `run(options) -> exit code`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """module: its import name. summary: one line. examples: what follows `python -m infra`."""

    module: str
    summary: str
    examples: tuple[str, ...]


COMMANDS: dict[str, Command] = {
    "bootstrap": Command(
        "infra.setup.bootstrap",
        "make the project's bucket, image repository and role, as one stack",
        ("bootstrap", "bootstrap --read-bucket our-pictures --region eu-central-1"),
    ),
    "push": Command(
        "infra.setup.push",
        "push the Docker image into the project's repository, and look that hosts will take it",
        ("push", "push --image dalle-sagemaker:trial --tag trial"),
    ),
    "upload": Command(
        "infra.setup.upload",
        "copy a folder of pictures and captions to the bucket; what is there already is skipped",
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
    "status": Command(
        "infra.account.status",
        "show what the project has and how its jobs and endpoints are",
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
        ),
    ),
    "invoke": Command(
        "infra.endpoint.invoke",
        "draw pictures for a caption by an endpoint, and write them as files",
        (
            "invoke 'big filled orange star' --out out/star",
            "invoke 'big filled orange star' --num-candidates 32 --num-images 4 --stream",
        ),
    ),
    "teardown": Command(
        "infra.account.teardown",
        "find everything the project made, say what it costs, delete it, and look again",
        ("teardown", "teardown --yes", "teardown --keep-storage"),
    ),
    "prices": Command(
        "infra.cost.prices",
        "show the dated price table, or refresh it from AWS",
        ("prices", "prices refresh --type ml.g5.xlarge --region eu-west-1 --out prices.json"),
    ),
    "benchmark": Command(
        "infra.benchmark.command",
        "measure how long pictures take, on the local image or an endpoint",
        (
            "benchmark --url http://127.0.0.1:8080 --clients 1 --clients 8",
            "benchmark --image dalle-sagemaker --model model.tar.gz --cpus 1 --cpus 2",
            "benchmark --endpoint dalle --rate 0.5 --out out/endpoint.json",
        ),
    ),
    "compare": Command(
        "infra.compare.command",
        "join measurements with prices: dollars per thousand pictures, and which way to serve",
        (
            "compare RUN.json=ml.c7i.large,serverless",
            "compare cpu.json=ml.c5.large gpu.json=ml.g5.xlarge --html out/compare.html",
        ),
    ),
}
