"""`tune`: the request of a search, a second one, and searches that are refused."""

import re

import pytest


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--float", "learning_rate=0.1:2"], "learning_rate must be a number above 0 to 1, got"),
        (["--choice", "size=tiny,huge"], "size must be tiny, .*, got 'huge'"),
    ],
)
def test_a_search_over_values_that_a_job_would_refuse_is_refused_before_any_request(
    account, infra, words, says
):
    result = infra("tune", "--data", "pictures", *words)
    assert result.code == 1
    assert re.search(says, result.err)
    assert sum(account.requests.values()) == 0


TUNE = ["tune", "--data", "pictures", "--float", "learning_rate=0.0001:0.01:log"]


def test_a_search_has_ranges_an_objective_and_the_metrics(ready, infra):
    result = infra(
        *TUNE, "--int", "batch_size=16:64", "--choice", "size=tiny,small", "--max-jobs", 4
    )
    assert result.code == 0, result.err
    (job,) = ready.bodies("CreateHyperParameterTuningJob")
    config = job["HyperParameterTuningJobConfig"]
    assert config["ParameterRanges"] == {
        "ContinuousParameterRanges": [
            {
                "Name": "learning_rate",
                "MinValue": "0.0001",
                "MaxValue": "0.01",
                "ScalingType": "Logarithmic",
            }
        ],
        "IntegerParameterRanges": [
            {"Name": "batch_size", "MinValue": "16", "MaxValue": "64", "ScalingType": "Auto"}
        ],
        "CategoricalParameterRanges": [{"Name": "size", "Values": ["tiny", "small"]}],
    }
    assert config["HyperParameterTuningJobObjective"] == {
        "Type": "Minimize",
        "MetricName": "transformer_validation_loss",
    }
    assert len(job["HyperParameterTuningJobName"]) <= 32
    definition = job["TrainingJobDefinition"]
    assert definition["StaticHyperParameters"] == {"stage": "all"}
    assert "CheckpointConfig" not in definition, "all jobs would write into one folder"


@pytest.mark.slow
def test_a_second_search_of_the_same_finds_the_first(ready, infra):
    infra(*TUNE)
    assert "already there" in infra(*TUNE).out
    assert ready.requests["CreateHyperParameterTuningJob"] == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--objective", "beauty"], "--objective must be a metric that `train` prints"),
        (["--float", "x=3:1"], "x needs LOW:HIGH or LOW:HIGH:log, two numbers"),
        (["--int", "x=1:2.5"], "two whole numbers of which the second is larger, got '1:2.5'"),
        (["--parallel", "9"], "--parallel must be 1 to --max-jobs, which is 8, got 9"),
        (["--set", "learning_rate=0.1"], "learning_rate cannot be both given and searched"),
    ],
)
def test_a_search_that_cannot_be_is_refused_by_name(ready, infra, words, says):
    result = infra(*TUNE, *words)
    assert result.code == 1
    assert says in result.err
    assert ready.requests["CreateHyperParameterTuningJob"] == 0


@pytest.mark.slow
def test_a_search_for_nothing_is_refused(ready, infra):
    assert "nothing to search" in infra("tune", "--data", "pictures").err
