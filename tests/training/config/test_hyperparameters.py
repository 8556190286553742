"""training.config.hyperparameters: flat text in, typed models or one complete error out."""

import dataclasses
import json
import subprocess
import sys

import pytest

from dalle.errors import HyperparameterError
from dalle.models.clip import ClipConfig
from dalle.models.dvae import DVAEConfig
from dalle.models.transformer import TransformerConfig
from dalle.types import STAGES
from tests import REPOSITORY
from training.config.fields import (
    ClipHyperparameters,
    DVAEHyperparameters,
    StageHyperparameters,
    TransformerHyperparameters,
)
from training.config.hyperparameters import (
    parse,
    render_table,
    without_effect,
)


def test_without_hyperparameters_everything_has_its_default():
    settings = parse({})
    assert settings.stage == "all"
    assert settings.dvae.batch_size == 64
    assert parse({"batch_size": "auto", "clip_batch_size": "8"}).dvae.batch_size == "auto"
    assert settings.dvae.overrides() == {}
    assert settings.given == frozenset()


@pytest.mark.parametrize("text", ["10", " 10 ", '"10"', "10.0"])
def test_a_number_may_be_written_as_the_platform_and_the_sdks_write_it(text):
    assert parse({"epochs": text}).dvae.epochs == 10


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("max_steps", "1e3"),
        ("max_steps", " 10 "),
        ("max_steps", "None"),
        ("learning_rate", "1e-3"),
        ("attention_kinds", '["full", "axial_row"]'),
        ("attention_kinds", "full,axial_row"),
        ("activation_checkpointing", "True"),
        ("activation_checkpointing", "false"),
        ("batch_size", "auto"),
        ("precision", "bf16"),
        ("norm", "None"),
    ],
)
def test_a_value_that_was_encoded_as_json_again_is_the_same_value(name, text, layers):
    encoded = text
    for _ in range(layers):
        encoded = json.dumps(encoded)
    usual, again = (parse({name: each}).transformer for each in (text, encoded))
    assert getattr(again, name) == getattr(usual, name)


@pytest.mark.parametrize("text", ["10", "true", "null", "1e3", '{"a": 1}'])
def test_a_free_text_that_was_encoded_as_json_stays_text(text):
    assert parse({"licence": json.dumps(text)}).licence == parse({"licence": text}).licence == text


@pytest.mark.parametrize("kind", ["bpe", None])
def test_a_vocabulary_below_the_alphabet_of_byte_pairs_is_refused(kind):
    given = {"tokenizer_vocab_size": "100"} | ({"tokenizer_kind": kind} if kind else {})
    with pytest.raises(HyperparameterError, match=r"at least 258 .*got 100.*tokenizer_kind=word"):
        parse(given)
    assert parse(given | {"tokenizer_kind": "word"}).tokenizer_vocab_size == 100
    settings = parse(given | {"tokenizer_kind": "clip"})
    assert "49,409" in without_effect(settings, STAGES)["tokenizer_vocab_size"]


def test_a_plain_name_sets_every_stage_and_a_prefixed_one_wins():
    settings = parse({"transformer_learning_rate": "0.01", "learning_rate": "0.1"})
    assert settings.dvae.learning_rate == settings.clip.learning_rate == 0.1
    assert settings.transformer.learning_rate == 0.01


def test_a_plain_name_sets_only_the_stages_that_have_the_field():
    settings = parse({"width": "64", "codebook_size": "256", "clip_patch_size": "4"})
    assert settings.dvae.overrides() == {"codebook_size": 256, "width": 64}
    assert settings.transformer.overrides() == {"width": 64}
    assert settings.clip.overrides() == {"patch_size": 4}


def test_a_stages_own_budget_replaces_the_one_for_all():
    settings = parse({"epochs": "3", "dvae_max_minutes": "2.5"})
    assert (settings.dvae.epochs, settings.dvae.max_minutes) == (None, 2.5)
    assert (settings.clip.epochs, settings.clip.max_minutes) == (3, None)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("True", True), ("0", False)])
def test_a_truth_value_may_be_written_in_each_of_the_usual_ways(text, value):
    assert parse({"qk_norm": text}).transformer.qk_norm is value


@pytest.mark.parametrize(
    "text",
    [
        '["full", "axial_row"]',
        "full,axial_row",
        "full, axial_row",
        '"full,axial_row"',
        "['full', 'axial_row']",  # by the SageMaker SDK v2, in local mode encoded once more
        "('full', 'axial_row')",
        json.dumps("['full', 'axial_row']"),
    ],
)
def test_a_list_may_be_json_or_python_or_separated_by_commas(text):
    assert parse({"attention_kinds": text}).transformer.attention_kinds == ("full", "axial_row")


def test_none_leaves_a_field_unset():
    assert parse({"max_steps": "None", "width": "null"}).dvae.overrides() == {}


def test_names_of_the_platform_are_ignored():
    settings = parse({"sagemaker_region": "x", "_tuning_objective_metric": "dvae_loss"})
    assert settings == parse({})


SDK_V2 = {
    "size": "tiny",
    "max_steps": "20",
    "learning_rate": "0.001",
    "qk_norm": "True",
    "attention_kinds": "['full', 'axial_row']",
    "licence": "CC BY",
}
"""As the Estimator of sagemaker 2.257 sends them."""


def test_the_hyperparameters_of_the_sdk_v2_are_what_its_user_wrote():
    settings = parse(SDK_V2)
    assert (settings.transformer.size, settings.transformer.max_steps) == ("tiny", 20)
    assert settings.transformer.learning_rate == 0.001
    assert settings.transformer.qk_norm is True
    assert settings.transformer.attention_kinds == ("full", "axial_row")
    assert settings.licence == "CC BY"


def test_a_script_of_the_sdk_that_would_not_run_is_refused():
    with pytest.raises(HyperparameterError, match=r"sagemaker_program is .*my.py.* would not run"):
        parse({"sagemaker_program": '"my.py"', "sagemaker_submit_directory": '"s3://b/c.tar.gz"'})


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("epochs", "0", "epochs must be a whole number from 1 to 1,000,000,000, got '0'"),
        ("epochs", "ten", "got 'ten'"),
        ("epochs", "1.5", "got '1.5'"),
        ("epochs", "true", "got 'true'"),
        ("epochs", "1e400", "got '1e400'"),
        ("max_minutes", "0", "max_minutes must be a number above 0 to 40,320"),
        ("max_minutes", "NaN", "got 'NaN'"),
        ("batch_size", "many", "must be a whole number from 1 to 65,536 or auto, got 'many'"),
        ("batch_size", "", "got ''"),
        ("batch_size", "0", "got '0'"),
        ("batch_size", "true", "got 'true'"),
        ("dvae_learning_rate", "-1", "dvae_learning_rate must be a number above 0 to 1"),
        ("ema_decay", "1", "ema_decay must be a number from 0 below 1"),
        ("precision", "fp8", "precision must be fp32, bf16 or fp16, got 'fp8'"),
        ("stage", "vae", "stage must be all, dvae, transformer or clip, got 'vae'"),
        ("engine", "jax", "engine must be torch or deepspeed, got 'jax'"),
        ("seed", "-1", "seed must be a whole number from 0 to 4,294,967,295"),
        ("attention_kinds", "[]", "must be a list of full, axial_row, axial_col, conv_like"),
        ("attention_kinds", "sparse", "got 'sparse'"),
        ("qk_norm", "maybe", "qk_norm must be true or false, got 'maybe'"),
        ("encoder_kernel_size", "true", "got 'true'"),
        ("encoder_kernel_size", "2", "encoder_kernel_size must be 1 or 3, got '2'"),
        ("licence", "x" * 300, "licence must be a text of at most 256 characters"),
        ("size", "huge", "size must be tiny,"),
        ("num_workers", "[" * 2000, "got '[[[["),
        ("learning_rat", "1", "learning_rat is unknown; did you mean learning_rate?"),
        ("batch-size", "1", "did you mean batch_size?"),
        ("clip_codebook_size", "1", "unknown: clip has no codebook_size, only dvae"),
        (
            "dvae_muon_learning_rate",
            "0.1",
            "unknown: dvae has no muon_learning_rate, only transformer and clip",
        ),
        ("dvae_seed", "1", "unknown: seed holds for the whole job, set it without the prefix"),
        ("zzz", "1", "zzz is unknown; `train --list-hyperparameters` shows"),
        ("dvae", "1", "dvae is unknown"),
        ("given", "1", "given is unknown"),
    ],
)
def test_a_wrong_hyperparameter_is_named_with_its_value_and_what_is_right(name, text, says):
    with pytest.raises(HyperparameterError) as caught:
        parse({name: text})
    assert says in str(caught.value)
    assert name in str(caught.value)
    assert len(str(caught.value)) < 300


def test_all_problems_are_reported_at_once():
    with pytest.raises(HyperparameterError) as caught:
        parse({"epoch": "3", "batch_size": "0", "dvae_epochs": "1", "dvae_max_steps": "2"})
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 hyperparameters are wrong:"
    assert [line.split()[1] for line in lines[1:]] == ["batch_size", "epoch", "epochs"]
    assert lines[-1] == "- epochs and max_steps are given together for dvae; give one of them"


def test_settings_of_stages_that_are_not_trained_are_found():
    settings = parse({"dvae_width": "64", "codebook_size": "64", "epochs": "4", "seed": "1"})
    assert without_effect(settings, ["clip"]) == {
        "codebook_size": "this job trains clip",
        "dvae_width": "this job trains clip",
    }
    assert without_effect(settings, ["dvae"]) == {}


def test_settings_of_a_tokenizer_that_is_not_learned_are_found():
    settings = parse({"tokenizer_kind": "clip", "tokenizer_vocab_size": "64", "text_length": "8"})
    names = ["text_length", "tokenizer_kind", "tokenizer_vocab_size"]
    trained = ["transformer", "clip"]
    fixed = "tokenizer_kind=clip always has CLIP's 49,409 text tokens"
    assert without_effect(settings, trained, present=["dvae"]) == {"tokenizer_vocab_size": fixed}
    brought = "the channel artefact brings a tokenizer"
    given = without_effect(settings, trained, present=["dvae", "tokenizer"])
    assert given == dict.fromkeys(names, brought)
    alone = "this job trains dvae, which reads no captions"
    assert without_effect(settings, ["dvae"]) == dict.fromkeys(names, alone)


def test_muons_learning_rate_is_one_of_the_stages_whose_model_has_a_use_for_it(tiny_models):
    settings = parse({"muon_learning_rate": "0.5"})
    for stage in STAGES:
        has_use = bool(getattr(tiny_models, stage).muon_parameters())
        assert settings.of(stage).muon_learning_rate == (0.5 if has_use else 0.0)
    assert without_effect(settings, ["dvae"]) == {"muon_learning_rate": "this job trains dvae"}
    rows = {line.split("`")[1]: line for line in render_table().splitlines()[2:]}
    assert rows["muon_learning_rate"].endswith("(transformer, clip) |")
    assert list(rows).index("muon_learning_rate") == list(rows).index("learning_rate") + 1


def test_the_budget_is_no_part_of_a_runs_identity():
    assert parse({"epochs": "3"}).dvae.identity() == parse({"max_minutes": "1"}).dvae.identity()
    assert parse({"width": "64"}).dvae.identity() != parse({}).dvae.identity()


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        (DVAEHyperparameters, DVAEConfig),
        (TransformerHyperparameters, TransformerConfig),
        (ClipHyperparameters, ClipConfig),
    ],
)
def test_every_override_is_a_field_of_the_models_config(settings, config):
    overrides = settings.model_fields.keys() - StageHyperparameters.model_fields.keys()
    overrides -= settings.not_of_config
    assert overrides <= {field.name for field in dataclasses.fields(config)}


def test_the_table_has_a_row_for_every_plain_name():
    rows = [line.split(" | ")[0].strip("|` ") for line in render_table().splitlines()[2:]]
    assert len(rows) == len(set(rows))
    assert {"stage", "seed", "epochs", "size", "codebook_size", "attention_kinds"} <= set(rows)
    for name in rows:
        is_text = name in ("licence", "caption_key", "deepspeed_config")
        with pytest.raises(HyperparameterError, match="must be"):
            parse({name: "x" * 2_501 if is_text else "[[]]"})


def test_every_row_of_the_table_is_a_markdown_row_of_four_cells():
    for line in render_table().splitlines():
        assert line.startswith(("| ", "|-"))
        assert line.replace("\\|", "").count("|") == 5


@pytest.mark.slow
def test_parsing_needs_no_torch():
    program = "import sys, training.config.hyperparameters; print('torch' in sys.modules)"
    root = REPOSITORY
    environment = {"PYTHONPATH": f"{root}:{root / 'container'}"}
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert printed.stdout == "False\n"


def test_thousands_of_hyperparameters_are_refused_at_once():
    with pytest.raises(HyperparameterError, match="at most 1000 hyperparameters, got 200,000"):
        parse({f"name {number}": "1" for number in range(200_000)})


def test_fine_tuning_has_small_learning_rates_unless_clips_own_are_set():
    raw = {"clip_fine_tune": "true", "learning_rate": "0.01", "muon_learning_rate": "0.1"}
    settings = parse(raw)
    assert (settings.clip.learning_rate, settings.clip.muon_learning_rate) == (1e-5, 0)
    assert settings.transformer.learning_rate == 0.01
    settings = parse(raw | {"clip_learning_rate": "0.002", "clip_muon_learning_rate": "0.003"})
    assert (settings.clip.learning_rate, settings.clip.muon_learning_rate) == (0.002, 0.003)
    assert "fine_tune" not in settings.clip.overrides()


@pytest.mark.parametrize("name", ["image_size", "dvae_image_size"])
def test_the_image_size_has_an_effect_where_a_channel_brings_the_image_tokenizer(name):
    settings, trained = parse({name: "64"}), ["transformer", "clip"]
    assert name in without_effect(settings, trained)
    assert without_effect(settings, trained, channels=["tokenizer_model"]) == {}


@pytest.mark.parametrize(
    ("raw", "decays"),
    [
        ({}, (0.0, 0.995, 0.995)),
        ({"size": "base", "clip_ema_decay": "0.5"}, (0.0, 0.995, 0.5)),
        ({"size": "dalle-1.3b", "clip_size": "tiny"}, (0.0, 0.0, 0.995)),
        ({"ema_decay": "0"}, (0.0, 0.0, 0.0)),
        ({"ema_decay": "0.9", "transformer_ema_decay": "0"}, (0.9, 0.0, 0.9)),
    ],
)
def test_weights_of_small_transformers_and_clips_are_averaged_unless_the_author_says(raw, decays):
    parsed = parse(raw)
    assert tuple(parsed.of(stage).ema_decay for stage in ("dvae", "transformer", "clip")) == decays
