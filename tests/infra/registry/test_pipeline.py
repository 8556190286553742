"""`pipeline`: what trains, evaluates and registers, held against botocore's model and the SDK."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from infra.aws.client import Aws
from infra.aws.output import Output
from infra.aws.request import Request

METRIC = "transformer_validation_loss"
WORDS = ["pipeline", "--data", "pictures", "--require", f"{METRIC}=4.5"]
ROLE = "arn:aws:iam::123456789012:role/pipelines"


@pytest.fixture
def ready(account, infra):
    """An account with a stack, an image and data to train and to validate on."""
    infra("bootstrap", "--pipelines", "yes")
    account.put_image()
    account.put_object("data/pictures/train/0.txt")
    account.put_object("data/pictures/validation/1.txt")
    return account


def definition(account) -> Any:
    (request,) = account.bodies("CreatePipeline")
    return json.loads(request["PipelineDefinition"])


def resolved(value: Any) -> Any:
    """A step's arguments with a text in place of each reference to another step."""
    if isinstance(value, dict):
        if "Get" in value:
            return "Approved" if "ApprovalStatus" in value["Get"] else "s3://b/model.tar.gz"
        if "Std:Join" in value:
            return value["Std:Join"]["On"].join(resolved(value["Std:Join"]["Values"])[:1])
        return {key: resolved(item) for key, item in value.items()}
    return [resolved(item) for item in value] if isinstance(value, list) else value


def test_a_pipeline_trains_and_registers_what_is_good_enough(ready, infra):
    result = infra(*WORDS)
    assert result.code == 0, result.err
    train, measure = definition(ready)["Steps"]
    assert train["Arguments"]["HyperParameters"]["stage"] == "all"
    assert "TrainingJobName" not in train["Arguments"]
    (condition,) = measure["Arguments"]["Conditions"]
    assert condition == {
        "Type": "LessThanOrEqualTo",
        "LeftValue": {
            "Get": "Steps.Train.FinalMetricDataList['transformer_validation_loss'].Value"
        },
        "RightValue": {"Get": "Parameters.MaxTransformerValidationLoss"},
    }
    (register,) = measure["Arguments"]["IfSteps"]
    container = register["Arguments"]["InferenceSpecification"]["Containers"][0]
    assert container["ModelDataUrl"] == {"Get": "Steps.Train.ModelArtifacts.S3ModelArtifacts"}
    assert container["Image"] == train["Arguments"]["AlgorithmSpecification"]["TrainingImage"]
    (refuse,) = measure["Arguments"]["ElseSteps"]
    assert "transformer_validation_loss at most 4.5" in refuse["Arguments"]["ErrorMessage"]


def test_the_arguments_of_every_step_are_a_request_that_botocore_takes(ready, infra):
    infra(*WORDS, "--spot", "--set", "size=tiny")
    aws = Aws(Output())
    train, measure = definition(ready)["Steps"]
    arguments = resolved(train["Arguments"])
    aws.check(Request("sagemaker", "CreateTrainingJob", TrainingJobName="x", **arguments))
    (register,) = measure["Arguments"]["IfSteps"]
    aws.check(Request("sagemaker", "CreateModelPackage", **resolved(register["Arguments"])))


def test_every_run_has_a_folder_of_its_own_for_checkpoints(ready, infra):
    infra(*WORDS)
    arguments = definition(ready)["Steps"][0]["Arguments"]
    for key, field in (("CheckpointConfig", "S3Uri"), ("TensorBoardOutputConfig", "S3OutputPath")):
        join = arguments[key][field]["Std:Join"]
        assert join["Values"][1] == {"Get": "Execution.PipelineExecutionId"}


def test_every_reference_is_to_a_step_or_a_parameter_that_is_there(ready, infra):
    infra(*WORDS, "--require", "clip_validation_loss=2")
    found = definition(ready)
    names = {step["Name"] for step in found["Steps"]}
    parameters = {each["Name"] for each in found["Parameters"]}
    for kind, name in re.findall(r'"Get": "(Steps|Parameters)\.(\w+)', json.dumps(found)):
        assert name in (names if kind == "Steps" else parameters)


@pytest.mark.slow
def test_conditions_parameters_and_kinds_are_those_of_the_sdk(ready, infra):
    import sagemaker.core
    from sagemaker.core.workflow.conditions import ConditionLessThanOrEqualTo  # takes a while
    from sagemaker.core.workflow.parameters import ParameterFloat, ParameterString

    infra(*WORDS)
    found = definition(ready)
    theirs = [
        ParameterString("ApprovalStatus", default_value="PendingManualApproval"),
        ParameterFloat("MaxTransformerValidationLoss", default_value=4.5),
    ]
    assert found["Parameters"] == [json.loads(json.dumps(p.to_request())) for p in theirs]
    condition = ConditionLessThanOrEqualTo(left="x", right=4.5).to_request()
    (ours,) = found["Steps"][1]["Arguments"]["Conditions"]
    assert (set(ours), ours["Type"]) == (set(condition), condition["Type"])
    steps = [*found["Steps"], *found["Steps"][1]["Arguments"]["IfSteps"]]
    steps += found["Steps"][1]["Arguments"]["ElseSteps"]
    # Read, and not imported: the module brings half of the SDK with it.
    source = Path(sagemaker.core.__file__).parents[1] / "mlops/workflow/steps.py"
    kinds = re.findall(r'^    [A-Z_]+ = "(\w+)"$', source.read_text("utf-8"), re.MULTILINE)
    assert {step["Type"] for step in steps} <= set(kinds)


@pytest.mark.slow
def test_a_second_run_changes_nothing_and_another_limit_changes_it(ready, infra):
    infra(*WORDS)
    assert "already there" in infra(*WORDS).out
    result = infra(*WORDS[:-1], "transformer_validation_loss=4", "--start")
    assert result.code == 0, result.err
    assert "changed" in result.out
    assert "started" in result.out
    assert (ready.requests["CreatePipeline"], ready.requests["UpdatePipeline"]) == (1, 1)
    assert ready.requests["StartPipelineExecution"] == 1


def test_the_definition_may_be_written_to_a_file(ready, infra, tmp_path):
    infra(*WORDS, "--out", tmp_path / "pipeline.json")
    assert json.loads((tmp_path / "pipeline.json").read_text()) == definition(ready)


@pytest.mark.slow
def test_a_pipeline_runs_as_the_role_of_the_stack_or_another(ready, infra):
    infra(*WORDS)
    infra(*WORDS, "--pipeline-role", ROLE)
    (made,) = ready.bodies("CreatePipeline")
    (changed,) = ready.bodies("UpdatePipeline")
    assert re.search(r":role/dalle-PipelineRole", made["RoleArn"])
    assert changed["RoleArn"] == ROLE


@pytest.mark.slow
def test_teardown_deletes_the_pipeline_and_the_registered_models(ready, infra):
    infra(*WORDS)
    result = infra("teardown", "--yes")
    assert result.code == 0, result.err
    assert "pipeline dalle" in result.out
    assert {"ModelPackageGroupName": "dalle"} in ready.bodies("DeleteModelPackageGroup")
    assert ready.client("sagemaker").list_pipelines()["PipelineSummaries"] == []


@pytest.fixture
def a_run(ready, infra):
    """The ARN of a run that goes on until it is stopped."""
    assert infra(*WORDS, "--start").code == 0
    sagemaker = ready.client("sagemaker")
    (found,) = sagemaker.list_pipeline_executions(PipelineName="dalle")[
        "PipelineExecutionSummaries"
    ]
    arn = found["PipelineExecutionArn"]
    states = ["Executing"]
    ready.handlers["ListPipelineExecutions"] = lambda request: {
        "PipelineExecutionSummaries": [
            {"PipelineExecutionArn": arn, "PipelineExecutionStatus": states[-1]}
        ]
    }

    def stop(request):
        assert request["PipelineExecutionArn"] == arn
        states.append("Stopped")
        return {"PipelineExecutionArn": arn}

    ready.handlers["StopPipelineExecution"] = stop
    return arn


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--keep-storage"]])
def test_teardown_stops_a_run_of_the_pipeline(ready, infra, a_run, words):
    run_id = a_run.rpartition("/")[2]
    assert re.search(rf"pipeline run {run_id} +Executing", infra("status").out)
    result = infra("teardown", "--yes", *words)
    assert result.code == 0, result.err
    assert f"pipeline run {run_id}" in result.out
    assert ready.requests["StopPipelineExecution"] == 1
    assert ready.requests["DeletePipeline"] == (0 if words else 1)
    assert run_id not in infra("status").out


@pytest.mark.slow
def test_runs_of_another_owners_pipeline_go_on(account, infra):
    infra("bootstrap")
    account.client("sagemaker").create_pipeline(
        PipelineName="dalle",
        PipelineDefinition="{}",
        ClientRequestToken="x" * 32,
        RoleArn=ROLE,
        Tags=[{"Key": "team", "Value": "vision"}],
    )
    assert infra("teardown", "--yes").code == 0
    assert not account.requests["ListPipelineExecutions"]
    assert not account.requests["StopPipelineExecution"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([*WORDS, "--role", ROLE], f"--role {ROLE} needs --pipeline-role"),
        ([*WORDS, "--require", "clip_validation_loss=nan"], "needs a finite number, got 'nan'"),
        (WORDS[:3], "--require is missing, such as --require transformer_validation_loss=4.5"),
        ([*WORDS, "--require", "clip_loss=2"], "takes a validation loss, one of"),
        ([*WORDS, "--require", "clip_validation_loss=low"], "needs a number, got 'low'"),
        ([*WORDS, "--set", "size=large-ish"], "size"),
    ],
)
def test_what_no_pipeline_can_do_is_refused_before_any_request(account, infra, words, says):
    result = infra(*words)
    assert result.code == 1
    assert says in result.err
    assert account.requests.total() == 0


@pytest.mark.slow
def test_data_without_held_out_pairs_are_refused(account, infra):
    infra("bootstrap", "--pipelines", "yes")
    account.put_image()
    account.put_object("data/pictures/train/0.txt")
    result = infra(*WORDS)
    assert result.code == 1
    assert "the data have no validation/" in result.err


def test_without_a_role_it_says_how_to_get_one(account, infra):
    infra("bootstrap")
    account.put_image()
    account.put_object("data/pictures/train/0.txt")
    account.put_object("data/pictures/validation/1.txt")
    result = infra(*WORDS)
    assert result.code == 1
    assert "`python -m infra bootstrap --pipelines yes` makes one" in result.err
