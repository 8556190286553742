"""`train` again: jobs that exist, failed attempts, waiting and progress."""

import pytest

from tests.infra.aws_account import BUCKET

TRAIN = ["train", "--data", "pictures", "--set", "size=tiny"]


@pytest.mark.slow
def test_a_second_run_finds_the_job(ready, infra):
    first = infra(*TRAIN, "--json").json
    ready.leave_model(first["jobs"][0])
    second = infra(*TRAIN)
    assert second.code == 0
    assert f"training job {first['jobs'][0]}" in second.out
    assert "already there, Completed" in second.out
    assert ready.requests["CreateTrainingJob"] == 1


@pytest.mark.slow
def test_a_job_whose_model_is_gone_is_run_again(ready, infra):
    infra(*TRAIN)
    result = infra(*TRAIN, "--json")
    assert result.json["jobs"][0].endswith("-all-2")
    assert "Completed, but its model is gone; another attempt" in result.err


@pytest.mark.slow
def test_new_data_and_another_artefact_are_another_run(ready, infra):
    model = f"s3://{BUCKET}/models/old/output/model.tar.gz"
    ready.put_object("models/old/output/model.tar.gz")
    names = []
    for change in ("", "data/pictures/train/1.txt", "data/pictures/validation/1.txt"):
        if change:
            ready.put_object(change)
        names.append(infra(*TRAIN, "--json").json["jobs"][0])
    names.append(infra(*TRAIN, "--artefact", model, "--json").json["jobs"][0])
    assert len({*names}) == 4
    ready.leave_model(names[-1])
    again = infra(*TRAIN, "--artefact", model)
    assert "already there, Completed" in again.out
    assert "--run NAME trains anew" in again.out


@pytest.mark.slow
def test_other_hyperparameters_are_another_run(ready, infra):
    names = {
        infra(*TRAIN, *more, "--json").json["jobs"][0]
        for more in (
            [],
            ["--set", "seed=2"],
            ["--run", "again"],
            ["--instance-type", "ml.m5.large"],
        )
    }
    assert len(names) == 4
    assert sum(name.startswith("dalle-again-") for name in names) == 1


FAILED = {
    "TrainingJobArn": "arn:aws:sagemaker:us-east-1:123456789012:training-job/dalle-x",
    "TrainingJobStatus": "Failed",
    "FailureReason": "AlgorithmError: hyperparameter size must be tiny, small or base",
    "SecondaryStatusTransitions": [
        {"Status": "Starting", "StatusMessage": "Preparing", "StartTime": 0},
        {"Status": "Failed", "StatusMessage": "Training job failed", "StartTime": 0},
    ],
}


@pytest.mark.slow
def test_a_failed_job_is_reported_with_its_reason_and_where_its_log_is(ready, infra):
    ready.refuse("DescribeTrainingJob", "ValidationException", "Requested resource not found.")
    ready.handlers["DescribeTrainingJob"] = lambda request: FAILED
    result = infra(*TRAIN)
    assert result.code == 1
    assert "AlgorithmError: hyperparameter size must be tiny, small or base" in result.err
    assert "its log: python -m infra logs dalle-" in result.err
    assert "  Starting     Preparing\n  Failed       Training job failed\n" in result.out


@pytest.mark.slow
def test_attempts_end(ready, infra):
    ready.handlers["ListTags"] = lambda request: (
        {"Tags": [{"Key": "dalle:project", "Value": "dalle"}]}
    )
    ready.handlers["DescribeTrainingJob"] = lambda request: FAILED
    result = infra(*TRAIN)
    assert result.code == 1
    assert "20 attempts at dalle-" in result.err
    assert ready.requests["CreateTrainingJob"] == 0


@pytest.mark.slow
def test_another_attempt_has_the_same_checkpoints(ready, infra):
    infra(*TRAIN)  # its model is not there, as moto trains nothing
    infra(*TRAIN)
    first, second = ready.bodies("CreateTrainingJob")
    assert second["TrainingJobName"] == f"{first['TrainingJobName']}-2"
    assert second["CheckpointConfig"] == first["CheckpointConfig"]


@pytest.mark.slow
def test_no_wait_returns_at_once_but_a_chain_waits_for_all_but_the_last(ready, infra):
    infra(*TRAIN, "--no-wait")
    assert ready.requests["DescribeTrainingJob"] == 1  # whether it is there
    assert ready.requests["FilterLogEvents"] == 0
    infra(*TRAIN, "--run", "chain", "--stages", "dvae,transformer", "--no-wait")
    assert ready.requests["FilterLogEvents"] == 1


@pytest.mark.slow
def test_progress_is_shown_while_it_trains(ready, infra):
    name = infra(*TRAIN, "--no-wait", "--json").json["jobs"][0]
    lines = ["loading", "dvae_step=50; dvae_loss=0.5;", "dvae_step=100; dvae_loss=0.25;"]
    ready.write_log("/aws/sagemaker/TrainingJobs", f"{name}/algo-1-1", lines)
    ready.leave_model(name)
    result = infra(*TRAIN)
    assert "  dvae_step=50; dvae_loss=0.5;\n  dvae_step=100; dvae_loss=0.25;\n" in result.out
    assert "loading" not in result.out
