"""`status` and `logs`: what there is, how it is, what it costs; progress and metrics of a job."""

import pytest

from infra.aws.output import aligned, size_words, span_words, sparkline
from tests.infra.aws_account import BUCKET

GROUP = "/aws/sagemaker/TrainingJobs"


@pytest.fixture
def job(account, infra):
    """A completed training job that has written a log."""
    infra("bootstrap")
    account.put_image()
    account.put_object("data/pictures/train/0.txt")
    name = infra("train", "--data", "pictures", "--json").json["jobs"][0]
    losses = [0.8, 0.4, 0.2, 0.1]
    lines = [f"dvae_step={n}; dvae_loss={loss}; dvae_epoch=1;" for n, loss in enumerate(losses)]
    account.write_log(GROUP, f"{name}/algo-1-1", ["starting", *lines])
    account.write_log(GROUP, f"{name}x/algo-1-1", ["dvae_loss=9.9;"])  # another job's
    return name


@pytest.mark.slow
def test_everything_is_listed(account, infra, job):
    model = f"s3://{BUCKET}/m.tar.gz"
    infra("deploy", "--mode", "async", "--instance-type", "ml.g4dn.xlarge", "--model", model)
    result = infra("status", "--json")
    assert result.code == 0, result.err
    assert result.json["stack"] == "CREATE_COMPLETE"
    assert result.json["bucket"] == BUCKET
    assert len(result.json["images"]) == 1
    (endpoint,) = result.json["endpoints"]
    assert (endpoint["name"], endpoint["mode"], endpoint["status"]) == (
        "dalle",
        "async",
        "InService",
    )
    assert endpoint["usd_per_month"] == pytest.approx(537.57, abs=0.01)
    assert result.json["jobs"] == [{"kind": "training job", "name": job, "status": "Completed"}]


def test_a_project_without_a_stack_says_what_comes_first(account, infra):
    result = infra("status")
    assert result.code == 0
    assert "project dalle has no stack; `python -m infra bootstrap`" in result.out


@pytest.mark.slow
def test_a_job_is_shown_with_the_course_of_its_losses(infra, job):
    result = infra("status", job)
    assert "dvae_loss  0.8    0.1   █▄▂▁" in result.out
    assert "dvae_epoch" not in result.out
    assert infra("status", job, "--json").json["metrics"]["dvae_loss"] == 0.1


@pytest.mark.slow
def test_the_log_is_the_jobs_own(infra, job):
    result = infra("logs", job)
    assert result.out.splitlines()[0] == "starting"
    assert len(result.out.splitlines()) == 5
    assert "9.9" not in result.out
    assert infra("logs").out == result.out, "the newest job is the default"


@pytest.mark.slow
def test_the_logs_end_is_shown(infra, job):
    assert infra("logs", job, "--tail", 1).out.startswith("dvae_step=3;")


@pytest.mark.slow
def test_following_a_job_that_has_ended_ends(infra, job):
    assert infra("logs", job, "--follow").code == 0


@pytest.mark.slow
def test_an_endpoints_log_has_a_group_of_its_own(account, infra, job):
    model = f"s3://{BUCKET}/m.tar.gz"
    infra("deploy", "--mode", "realtime", "--instance-type", "ml.m5.large", "--model", model)
    account.write_log("/aws/sagemaker/Endpoints/dalle", "main/i-1", ["scheduler: ready"])
    assert infra("logs", "dalle").out == "scheduler: ready\n"


@pytest.mark.parametrize("command", ["status", "logs"])
def test_an_unknown_name_is_reported(account, infra, command):
    result = infra(command, "dalle-none")
    assert result.code == 1
    assert "`python -m infra status` lists them" in result.err


def test_without_a_job_there_is_no_log(account, infra):
    assert "has no training job yet" in infra("logs").err


@pytest.mark.parametrize(
    ("values", "line"),
    [([], ""), ([1.0], "▁"), ([3, 2, 1], "█▅▁"), ([1, 1, 1], "▁▁▁"), (range(100), 24)],
)
def test_a_course_is_drawn_from_lowest_to_highest(values, line):
    drawn = sparkline(list(values))
    assert drawn == line if isinstance(line, str) else len(drawn) == line
    if line == 24:
        assert (drawn[0], drawn[-1]) == ("▁", "█")


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1500, "1.5 kB"),
        (7.24e9, "7.2 GB"),
        (2e12, "2,000.0 GB"),
    ],
)
def test_sizes_have_the_unit_that_reads_best(num_bytes, words):
    assert size_words(num_bytes) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(5, "5 s"), (65, "1 min 05 s"), (3599.6, "1 h 00 min"), (7260, "2 h 01 min")],
)
def test_spans_have_their_two_largest_units(seconds, words):
    assert span_words(seconds) == words


def test_columns_are_as_wide_as_their_widest_cell():
    assert aligned([("a", "bb"), ("ccc", "")]) == ["a    bb", "ccc"]
    assert aligned([]) == []
