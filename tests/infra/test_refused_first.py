"""A plan that the platform would refuse is refused before the first request, dry run or not."""

import pytest

MODEL = "s3://bucket/model.tar.gz"
PLANS = [
    (["deploy", "--mode", "serverless", "--memory-mb", 5000], "in steps of 1024, got 5000"),
    (["deploy", "--mode", "serverless", "--max-concurrency", 201], "must be 1 to 200, got 201"),
    (["deploy", "--mode", "realtime", "--min-instances", 0], "keeps at least 1 instance"),
    (["deploy", "--mode", "realtime", "--instance-type", "ml.t3.medium"], "does not offer"),
    (["deploy", "--mode", "serverless", "--min-instances", 3], "a serverless endpoint has none"),
    (["deploy", "--mode", "realtime", "--concurrent", -1], "must be 1 or more, got -1"),
    (["deploy", "--mode", "async", "--invocation-seconds", 3601], "1 to 3600 s"),
    (["deploy", "--mode", "async", "--instance-type", "ml.p3.2xlarge"], "has Volta GPUs"),
    (["deploy", "--model", "model.tar.gz"], "is given by its s3:// address"),
    (["deploy", "--name", "a_b"], "letters and digits, with dashes between them, got 'a_b'"),
    (["train", "--data", "x", "--instance-type", "ml.p3.2xlarge"], "has Volta GPUs"),
    (["train", "--data", "x", "--instance-type", "ml.x9.large"], "does not offer"),
    (["train", "--data", "x", "--max-hours", 700], "28 days"),
    (["train", "--data", "x", "--instance-count", 0], "on 1 instance or more, got 0"),
    (["train", "--data", "x", "--validation", "held-out"], "s3://bucket/folder/ was expected"),
    (["train", "--data", "x", "--artefact", "model.tar.gz"], "s3://bucket/folder/ was expected"),
    (["train", "--data", "x", "--attributes", "a,b", "--input-mode", "Pipe"], "in S3, got x"),
    (["tune", "--data", "x", "--float", "learning_rate=0.1:1", "--parallel", 9], "got 9"),
    (["tune", "--data", "x"], "nothing to search"),
    (["upload", "/nowhere", "--name", "x"], "/nowhere is not a folder"),
    (["logs", "--tail", -1], "--tail must be 0 or more, got -1"),
    (["invoke", "a star", "--openai", "--stream"], "cannot be given together"),
    (["invoke", "a star", "--presign-hours", 2, "--stream"], "async endpoint: leave --stream out"),
    (["invoke", "a star", "--temperature", 11], "temperature must be 0.0 to 10.0, got 11.0"),
]


@pytest.mark.parametrize(("words", "says"), PLANS)
@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_a_plan_beyond_a_limit_is_refused_before_the_first_request(
    account, infra, words, says, dry_run
):
    result = infra(*words, *dry_run)
    assert result.code == 1
    assert says in result.err
    assert account.requests.total() == 0
    assert result.out == "", "a dry run prints the requests that would be sent, and none would"


def test_a_batch_beyond_a_limit_is_refused_before_the_first_request(account, infra, tmp_path):
    (tmp_path / "captions.txt").write_text("a star\n")
    words = ["deploy", "--mode", "batch", "--captions", tmp_path / "captions.txt"]
    result = infra(*words, "--concurrent", 17, "--dry-run")
    assert result.code == 1
    assert "at most 16, got 17" in result.err
    assert (result.out, account.requests.total()) == ("", 0)
