"""Pictures for reports: drawn, ranked, reconstructed and found, by tiny models."""

import threading
from dataclasses import replace

import pytest
import torch
from PIL import Image

from dalle.artefact import Artefact
from dalle.errors import ArtefactError, CaptionTooLong
from dalle.models.clip import Clip
from training.data.batching.preload import Preloaded
from training.data.sources.channel import open_channel
from training.report.nearest import TrainingPictures
from training.report.samples import (
    codebook_usage,
    generate_best,
    generate_candidates,
    memorisation,
    reconstruct,
    reconstructions,
    retrieval,
    to_uint8,
)
from training.stopping import Stopped

CAPTIONS = ["big filled red star", "small blue circle", "big green square"]


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=generator)


def without(models, *names):
    components = {name: getattr(models, name) for name in models.components()}
    return Artefact(**components | dict.fromkeys(names))


def test_generated_pictures_come_best_first_beside_the_real_one(tiny_models, images):
    rows = generate_best(tiny_models, CAPTIONS, images[:3], num_candidates=6, num_images=4, seed=1)
    assert [row.caption for row in rows] == CAPTIONS
    for row, actual in zip(rows, images, strict=False):
        assert [image.shape for image in row.images] == [(16, 16, 3)] * 4
        assert row.scores == sorted(row.scores, reverse=True)
        assert (row.actual == actual.permute(1, 2, 0).numpy()).all()
    (all_six,) = generate_candidates(tiny_models, CAPTIONS[:1], [range(6)], seed=1)
    assert rows[0].scores[0] == pytest.approx(float(all_six.scores.max()), abs=1e-5)


@pytest.mark.slow
def test_a_likelihood_weight_lets_the_transformer_have_a_say(tiny_models):
    def ranked(weight):
        clip = Clip(replace(tiny_models.clip.config, likelihood_weight=weight)).eval()
        clip.load_state_dict(tiny_models.clip.state_dict())
        models = replace(tiny_models, clip=clip)
        (drawn,) = generate_candidates(models, CAPTIONS[:1], [range(6)], seed=1)
        return drawn

    (blind,) = generate_candidates(without(tiny_models, "clip"), CAPTIONS[:1], [range(6)], seed=1)
    likelihood, scores = blind.scores, ranked(0.0).scores
    assert ranked(0.0).best(6) == scores.argsort(descending=True, stable=True).tolist()
    assert ranked(1e6).best(6) == likelihood.argsort(descending=True, stable=True).tolist()
    merits = tiny_models.clip.model.logit_scale.exp() * scores + 2.0 * likelihood
    torch.testing.assert_close(ranked(2.0).merits, merits)
    torch.testing.assert_close(ranked(2.0).scores, scores)


def test_without_clip_the_likeliest_comes_first(tiny_models):
    blind = without(tiny_models, "clip")
    (row,) = generate_best(blind, CAPTIONS[:1], None, num_candidates=4, num_images=2, seed=1)
    assert row.actual is None
    assert row.scores[0] >= row.scores[1]
    assert max(row.scores) < 0  # log-likelihoods in nats


class StopBehind:
    """Sets a stop behind a pass through a part of a model, while it is entered; counts passes."""

    def __init__(self, module):
        self.module, self.stop, self.passes = module, threading.Event(), 0

    def note(self, *_):
        self.passes += 1
        self.stop.set()

    def __enter__(self):
        self.handle = self.module.register_forward_hook(self.note)
        return self

    def __exit__(self, *_):
        self.handle.remove()


def draw_all(models, images, stop):
    options = {"num_candidates": 2, "num_images": 1, "seed": 0}
    return generate_best(models, CAPTIONS, images[:3], stop=stop, **options)


@pytest.mark.parametrize(
    ("part", "work"),
    [
        (lambda models: models.transformer.blocks[0], draw_all),
        (lambda models: models.dvae.decoder, draw_all),
        (lambda models: models.clip.model.visual, draw_all),
        (
            lambda models: models.dvae.encoder,
            lambda models, images, stop: reconstructions(models.dvae, images, stop),
        ),
        (
            lambda models: models.dvae.encoder,
            lambda models, images, stop: codebook_usage(models.dvae, images, stop),
        ),
        (
            lambda models: models.clip.model.visual,
            lambda models, images, stop: retrieval(models, images[:3], CAPTIONS, stop),
        ),
    ],
)
def test_a_stop_ends_the_work_behind_the_pass_in_which_it_came(
    tiny_models, images, monkeypatch, part, work
):
    monkeypatch.setattr("training.data.batching.preload.MAX_CHUNK_IMAGES", 1)
    with StopBehind(part(tiny_models)) as watched:
        with pytest.raises(Stopped):
            work(tiny_models, images, watched.stop)
        assert watched.passes == 1


def test_reconstructions_are_what_the_tokens_decode_to(tiny_models, images):
    dvae = tiny_models.dvae
    again = reconstruct(dvae, images)
    assert torch.equal(again, to_uint8(dvae.decode(dvae.encode(images.float() / 255))))
    both = reconstructions(dvae, images)
    assert (both.originals[2] == images[2].permute(1, 2, 0).numpy()).all()
    assert (both.reconstructions[2] == again[2].permute(1, 2, 0).numpy()).all()


def test_every_code_of_every_position_is_counted(tiny_models, images):
    config = tiny_models.dvae.config
    usage = codebook_usage(tiny_models.dvae, images)
    assert [each.name for each in usage] == ["codebook 1", "codebook 2"]
    for each in usage:
        assert each.counts.shape == (config.codebook_size,)
        assert each.counts.sum() == len(images) * config.num_positions


def test_an_image_equal_to_the_captions_own_is_its_own(tiny_models, images):
    same = images[:1].expand(3, -1, -1, -1)
    assert retrieval(tiny_models, same, CAPTIONS).top1 == 1.0
    other = retrieval(tiny_models, images[:3], [CAPTIONS[0]] * 3)
    assert other.top1 == pytest.approx(1 / 3)  # one image is the best for the caption
    assert other.num_pairs == 3


@pytest.mark.parametrize("name", ["dvae", "transformer", "tokenizer"])
def test_what_is_missing_for_drawing_is_named(tiny_models, name):
    with pytest.raises(ArtefactError, match=f"no {name}, which generating images needs"):
        list(generate_candidates(without(tiny_models, name), CAPTIONS, [[0]] * 3, seed=0))


def test_retrieval_needs_a_clip(tiny_models, images):
    with pytest.raises(ArtefactError, match="no clip, which retrieval needs"):
        retrieval(without(tiny_models, "clip"), images[:3], CAPTIONS)


def test_a_caption_that_is_too_long_is_named(tiny_models):
    with pytest.raises(CaptionTooLong, match="at most 8 tokens long"):
        list(generate_candidates(tiny_models, ["red " * 9], [[0]], seed=0))


def training_pictures(tmp_path, pixels, captions):
    for number, (image, caption) in enumerate(zip(pixels, captions, strict=True)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(caption)
    channel = open_channel(tmp_path, image_size=16, channel="train")
    return channel, TrainingPictures(Preloaded(channel))


def test_an_image_counts_as_memorised_where_another_captions_picture_is_nearer_than_its_own(
    tmp_path, images
):
    channel, pictures = training_pictures(tmp_path, images[:3], CAPTIONS)
    asked = ["small blue circle", "big filled red star", "a new caption", "a new caption"]
    generated = images[[0, 0, 0, 3]]
    real = torch.stack([images[4], images[4], images[4], images[3]])
    # The picture of another caption twice; the caption's own; and the real picture itself.
    assert pictures.memorised_share(generated, real, asked) == 2 / 4
    assert TrainingPictures(channel).memorised_share(generated, real, asked) == 2 / 4
    numbers, distances = pictures.nearest(images[:3])
    assert (numbers.tolist(), distances.tolist()) == ([0, 1, 2], [0.0, 0.0, 0.0])


def test_the_nearest_training_picture_stands_beside_the_real_one(tiny_models, tmp_path, images):
    _, pictures = training_pictures(tmp_path, images[:3], CAPTIONS)
    (row,) = generate_best(
        tiny_models,
        CAPTIONS[:1],
        images[:1],
        num_candidates=2,
        num_images=1,
        seed=1,
        training=pictures,
    )
    best = torch.from_numpy(row.images[0]).permute(2, 0, 1)[None]
    number = int(pictures.nearest(best)[0])
    assert (row.nearest == images[number].permute(1, 2, 0).numpy()).all()
    assert row.nearest_caption == CAPTIONS[number]
    found = memorisation(tiny_models, CAPTIONS, images[:3], pictures, seed=1)
    assert (found.num_captions, found.num_pictures) == (3, 3)
    assert 0 <= found.share <= 1
