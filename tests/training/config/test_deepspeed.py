"""training.config.deepspeed: what the job's author says, and what DeepSpeed is given."""

import json

import pytest

from dalle.errors import HyperparameterError
from training.config.deepspeed import configuration, read_json
from training.config.hyperparameters import parse, without_effect

NO_MUON = "Muon needs whole matrices; engine=deepspeed trains by AdamW alone"


def configured(raw, *, num_ranks=4):
    settings = parse({"engine": "deepspeed"} | raw)
    return configuration(
        settings,
        settings.transformer,
        num_ranks=num_ranks,
        num_parameters=1_000,
        is_on_cpu=False,
    )


def with_json(config, **raw):
    return {"deepspeed_config": json.dumps(config)} | raw


def test_the_batch_is_shared_out_among_ranks_and_parts():
    config = configured({"batch_size": "64", "gradient_accumulation_steps": "2"})
    assert config["train_batch_size"] == 64
    assert config["train_micro_batch_size_per_gpu"] == 8
    assert config["gradient_accumulation_steps"] == 2


@pytest.mark.parametrize(("clipping", "given"), [("0", 0.0), ("0.5", 0.5)])
def test_clipping_is_always_said_for_deepspeeds_default_would_clip(clipping, given):
    assert configured({"gradient_clipping": clipping})["gradient_clipping"] == given


def test_at_zero_0_the_engine_clips_and_not_deepspeed():
    assert configured({"zero_stage": "0"})["gradient_clipping"] == 0.0


def test_no_optimiser_is_asked_for_that_would_have_to_be_compiled():
    config = configured({"offload_optimizer": "true"})
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


def test_small_gradients_are_added_up_in_fp32():
    raw = {"precision": "bf16", "gradient_accumulation_steps": "2"}
    assert configured(raw)["data_types"] == {"grad_accum_dtype": "fp32"}


def test_the_json_stands_for_the_hyperparameters_that_it_decides():
    config = {
        "train_batch_size": 32,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "none"},
        },
    }
    settings = parse(with_json(config, engine="deepspeed"))
    assert settings.zero_stage == 3
    assert (settings.offload_optimizer, settings.offload_parameters) == (True, False)
    transformer = settings.transformer
    assert (transformer.batch_size, transformer.gradient_accumulation_steps) == (32, 2)
    assert (transformer.gradient_clipping, transformer.precision) == (0.5, "bf16")
    assert settings.dvae == parse({}).dvae, "DeepSpeed does not train it"
    assert settings.clip == parse({}).clip
    assert settings.given == {"engine", "deepspeed_config"}


def test_the_json_may_repeat_a_hyperparameter_or_leave_it_open():
    config = {"zero_optimization": {"stage": 1}, "train_batch_size": "auto"}
    settings = parse(with_json(config, engine="deepspeed", zero_stage="1", batch_size="8"))
    assert (settings.zero_stage, settings.transformer.batch_size) == (1, 8)


def test_the_json_sets_what_there_is_no_hyperparameter_for():
    config = {
        "zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 7},
        "fp16": {"initial_scale_power": 12},
        "train_micro_batch_size_per_gpu": 16,
    }
    given = configured(with_json(config))
    assert given["zero_optimization"]["overlap_comm"] is True
    assert given["zero_optimization"]["reduce_bucket_size"] == 7
    assert given["zero_optimization"]["stage"] == 2
    assert given["fp16"] == {"enabled": False, "initial_scale_power": 12}


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (with_json({"zero_optimization": {"stage": 3}}, zero_stage="2"),
         "zero_optimization.stage says zero_stage=3, but zero_stage is 2; leave one of them out"),
        (with_json({"bf16": {"enabled": True}}, transformer_precision="fp32"),
         "bf16.enabled says precision=bf16, but transformer_precision is fp32"),
        (with_json({"train_batch_size": 8}, transformer_batch_size="4"),
         "train_batch_size says batch_size=8, but transformer_batch_size is 4"),
        (with_json({"train_batch_size": 0}), "transformer_batch_size must be a whole number from"),
        (with_json({"zero_optimization": {"stage": 4}}), "zero_stage must be a whole number from"),
        (with_json({"optimizer": {"type": "Lamb"}}), "optimizer is not for a job to set: it is A"),
        (with_json({"scheduler": {"type": "WarmupLR"}}), "scheduler is not for a job to set: set "),
        (with_json({"pipeline": {"stages": 2}}), "pipeline.stages is not for a job to set"),
        (with_json({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}),
         "zero_optimization.offload_optimizer.device must be cpu or none, got 'nvme'"),
        (with_json({"fp16": {"enabled": True}, "bf16": {"enabled": True}}),
         "fp16 and bf16 are both enabled"),
        (with_json({"fp16": {"enabled": 1}}), "fp16.enabled must be true or false, got 1"),
        (with_json({"steps_per_print": "auto"}), "steps_per_print must be given"),
        ({"deepspeed_config": "{"}, "deepspeed_config is not JSON"),
        ({"deepspeed_config": "[1]"}, "deepspeed_config must be a JSON object, got '[1]'"),
        ({"deepspeed_config": "{" + " " * 2_500 + "}"}, "a text of at most 2500 characters"),
        ({"offload_parameters": "true"}, "offload_parameters needs zero_stage=3, got zero_stage=2"),
        ({"offload_optimizer": "true", "zero_stage": "0"}, "offload_optimizer needs zero_stage 1,"),
        ({"precision": "bf16", "zero_stage": "0"},
         "transformer: precision=bf16 needs zero_stage 1, 2 or 3: at 0 there are no fp32 weights"),
        ({"transformer_precision": "fp16", "zero_stage": "0"}, "precision=fp16 needs zero_stage"),
        ({"zero_stage": "4"}, "zero_stage must be a whole number from 0 to 3, got '4'"),
        ({"clip_gradient_accumulation_steps": "2"}, "clip has no gradient_accumulation_steps,"),
        ({"dvae_activation_checkpointing": "1"}, "dvae has no activation_checkpointing, only"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_by_name(raw, says):
    with pytest.raises(HyperparameterError) as caught:
        parse({"engine": "deepspeed"} | raw)
    assert says in str(caught.value)


def test_every_wrong_key_of_the_json_is_named_at_once():
    config = {"optimizer": {"type": "Adam", "params": {"lr": 1}}, "zero": 1}
    with pytest.raises(HyperparameterError) as caught:
        parse(with_json(config, engine="deepspeed", epochs="0"))
    assert str(caught.value).splitlines()[0] == "3 hyperparameters are wrong:"


def test_a_size_of_parts_that_is_not_the_batchs_is_refused_with_the_right_one():
    raw = with_json({"train_micro_batch_size_per_gpu": 4}, batch_size="64")
    with pytest.raises(HyperparameterError, match=r"must be 16 \(batch_size 64 / 4 devices / "):
        configured(raw)


def test_a_stage_that_deepspeed_does_not_train_may_have_any_precision():
    raw = {"engine": "deepspeed", "zero_stage": "0"}
    assert parse(raw | {"clip_precision": "bf16"}).clip.precision == "bf16"
    assert parse(raw | {"precision": "bf16", "stage": "dvae"}).dvae.precision == "bf16"


@pytest.mark.parametrize(
    ("raw", "trained", "expected"),
    [
        (
            {"zero_stage": "3"},
            ["transformer"],
            {"zero_stage": "it is DeepSpeed's, and engine=torch"},
        ),
        ({"engine": "deepspeed", "zero_stage": "3"}, ["transformer", "clip"], {}),
        ({"muon_learning_rate": "0.1"}, ["transformer"], {}),
        ({"engine": "deepspeed", "muon_learning_rate": "0.1"}, ["transformer", "clip"], {}),
        (
            {"engine": "deepspeed", "muon_learning_rate": "0.1"},
            ["transformer"],
            {"muon_learning_rate": NO_MUON},
        ),
        (
            {"engine": "deepspeed", "transformer_muon_learning_rate": "0.1"},
            ["dvae", "transformer", "clip"],
            {"transformer_muon_learning_rate": NO_MUON},
        ),
        (
            {"engine": "deepspeed", "zero_stage": "1"},
            ["dvae"],
            dict.fromkeys(
                ["engine", "zero_stage"], "this job trains dvae, always by torch's engine"
            ),
        ),
    ],
)
def test_settings_of_the_other_engine_are_told_to_have_no_effect(raw, trained, expected):
    assert without_effect(parse(raw), trained) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 2_400, "deepspeed_config is nested too deeply"),
        ('{"a":' * 400 + "1" + "}" * 400, r"a\.a\.a\.a\.a\.a\.a\.a\.a is not for a job to set$"),
    ],
)
def test_an_object_within_hundreds_of_others_is_refused_in_words(text, says):
    with pytest.raises(HyperparameterError, match=says):
        read_json(text)
