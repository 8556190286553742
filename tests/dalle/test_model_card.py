"""The model card: what it says of an artefact, and the form that model hubs read."""

import json
import re
from dataclasses import replace

import pytest

from dalle.manifest import (
    ChosenSampling,
    Manifest,
    SamplingSettings,
    StageRecord,
    TriedSampling,
)
from dalle.model_card import describe, render
from inference.api.schema import GenerateRequest
from tests.dalle.models.tiny_tokenizers import tiny_tokenizer

RECORD = StageRecord(
    stage="transformer",
    job_name="job",
    finished_at="2026-11-30T08:41:34+00:00",
    steps=3_000,
    is_finished=True,
    wall_seconds=90.0,
    cpu_seconds=170.0,
    hyperparameters={"caption_dropout": 0.1},
    metrics={"validation_loss": 1.2345678},
    dataset_fingerprint="c6255b632b902b2e680f64a152921bb4",
    dataset_counts={"train": 2765, "validation": 512},
)


@pytest.fixture
def artefact(tiny_models):
    manifest = Manifest(
        licence="CC-BY-4.0",
        library_version="0.1.0",
        captions=["a red square", 'a "quoted": one'],
        stages=[RECORD.model_copy(update={"steps": 1}), RECORD],
    )
    return replace(tiny_models, manifest=manifest)


def front_matter(text):
    """The fields above the text: every value is a plain word or JSON, both of which are YAML."""
    begin, matter, _ = text.split("---\n", 2)
    assert begin == ""
    fields = dict(line.split(": ", 1) for line in matter.splitlines())
    is_word = re.compile(r"[a-z][a-z0-9.-]*").fullmatch
    return {name: value if is_word(value) else json.loads(value) for name, value in fields.items()}


def test_a_card_has_sizes_data_metrics_licence_and_captions_of_its_artefact(artefact):
    card = artefact.card()
    assert (card.image_size, card.grid_size) == (16, 4)
    assert (card.licence, card.captions[0], card.guidance) == ("CC-BY-4.0", "a red square", True)
    dvae, transformer, clip = card.components
    assert transformer.parameters == sum(p.numel() for p in artefact.transformer.parameters())
    assert (transformer.steps, transformer.minutes) == (3_000, 1.5), "the newest record"
    assert transformer.pairs == {"train": 2765, "validation": 512}
    assert transformer.sizes["text_length"] == 8
    assert (dvae.steps, clip.metrics) == (None, {})


def test_the_front_matter_is_what_model_hubs_read(artefact):
    matter = front_matter(render(artefact.card()))
    assert matter["license"] == "cc-by-4.0"
    assert matter["pipeline_tag"] == "text-to-image"
    assert matter["library_name"] == "dalle-sagemaker"
    assert matter["tags"] == ["dall-e", "dvae", "transformer", "clip"]
    assert matter["widget"] == [{"text": "a red square"}, {"text": 'a "quoted": one'}]
    (result,) = matter["model-index"][0]["results"]
    assert result["task"] == {"type": "text-to-image"}
    assert result["metrics"] == [{"type": "validation_loss", "value": 1.2345678}]


@pytest.mark.parametrize(
    ("licence", "fields"),
    [
        ("", {"license": "unknown"}),
        ("MIT", {"license": "mit"}),
        ("Ours: all rights", {"license": "other", "license_name": "Ours: all rights"}),
    ],
)
def test_a_licence_that_hubs_do_not_know_is_given_by_its_name(artefact, licence, fields):
    artefact.manifest.licence = licence
    matter = front_matter(render(artefact.card()))
    assert {name: matter.get(name) for name in fields} == fields


def test_the_text_says_what_the_card_knows(artefact):
    text = render(artefact.card())
    assert "16 x 16 pixels" in text
    assert "train 2,765" in text
    assert "3,000 steps, 1.5 minutes" in text
    assert "| validation_loss | 1.235 |" in text
    assert "at most 8 text tokens" in text
    assert "a guidance_scale above 1 may help" in text


def test_a_model_without_a_clip_says_what_comes_first(tiny_models):
    text = render(replace(tiny_models, clip=None).card())
    assert "a discrete VAE decodes them, and the likeliest come first." in text


def test_an_image_tokenizer_that_others_trained_is_named(tiny_models):
    card = render(replace(tiny_models, dvae=tiny_tokenizer("openai")).card())
    assert "| OpenAI's discrete VAE, not trained here: image to image tokens and back |" in card
    assert "image_size 32, grid_size 4, codebook_size 12, num_codebooks 1, width 4" in card


def test_a_caption_of_several_lines_is_one_item(tiny_models):
    manifest = Manifest(captions=["a red\n# square"])
    text = render(replace(tiny_models, manifest=manifest).card())
    assert "\n- a red # square\n" in text


def test_parts_of_a_model_are_not_offered_as_text_to_image(tiny_models):
    text = render(describe(Manifest(), {"clip": tiny_models.clip}))
    assert "pipeline_tag" not in front_matter(text)
    assert "They generate no images" in text
    assert "Not recorded." in text
    assert "Not measured" in text


def test_the_sampling_defaults_are_those_of_a_request():
    defaults = describe(Manifest(), {}).sampling_defaults
    assert {"num_candidates", "temperature", "top_k", "top_p", "guidance_scale"} == {*defaults}
    assert {name: GenerateRequest.model_fields[name].default for name in defaults} == defaults


def test_chosen_sampling_settings_are_the_defaults_and_say_on_how_many_captions():
    settings = SamplingSettings(temperature=0.7, guidance_scale=1.5)
    tried = TriedSampling(settings=settings, own_caption=0.8, nats=1.0, spread=0.1)
    sampling = ChosenSampling(
        settings=settings, num_captions=96, own_caption_of_real=0.9, tried=[tried]
    )
    card = describe(Manifest(sampling=sampling), {})
    assert card.sampling_defaults == {"num_candidates": 16, **settings.model_dump()}
    text = render(card)
    assert "| temperature | 0.7 |" in text
    assert "Chosen on 96 held-out captions. A request's own values win." in text


def test_the_trainings_that_came_before_are_told_as_far_as_one_goes_on_from_the_other():
    first, second, third = (
        RECORD.model_copy(update={"job_name": name, "trained_on_from": begun})
        for name, begun in (("much", "0" * 64), ("fifty", "1" * 64), ("six", "2" * 64))
    )
    new = RECORD.model_copy(update={"job_name": "new"})
    manifest = Manifest(stages=[first, new, second, third])
    assert [each.job_name for each in manifest.lineage("transformer")] == ["six", "fifty", "new"]
    (component,) = describe(manifest, {"transformer": tiny_tokenizer("openai")}).components
    assert [each.split(",")[0] for each in component.trained_on_from] == ["job fifty", "job new"]
