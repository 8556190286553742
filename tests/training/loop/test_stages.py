"""training.loop.stages: what each model learns from a batch, and how it is validated."""

import threading

import pytest
import torch

from dalle.preprocess.images import encode_image
from dalle.preprocess.tokenizer import CaptionTokenizer
from training import rainbow
from training.data.batching.batches import Batches
from training.data.batching.preload import Preloaded, preload_if_small
from training.data.batching.sampler import UNMIRRORED_EPOCHS
from training.data.pairs import Subset
from training.data.sources.channel import open_channel
from training.loop.stages import ClipStage, DVAEStage, StageData, TransformerStage
from training.stopping import Stopped

CPU = torch.device("cpu")


@pytest.fixture
def pairs(tmp_path):
    for number, sample in enumerate(rainbow.samples()[:5000:1000]):
        (tmp_path / f"{number}.png").write_bytes(encode_image(sample.picture(), "png"))
        (tmp_path / f"{number}.txt").write_text(sample.caption)
    return open_channel(tmp_path, image_size=16)


def batches(pairs, tiny_models, **options):
    settings = {"batch_size": 5, "seed": 0, "shuffle": False, "num_workers": 0}
    return Batches(pairs, tokenizer=tiny_models.tokenizer, **(settings | options))


def build(kind, tiny_models, data):
    match kind:
        case "dvae":
            return DVAEStage(tiny_models.dvae, data)
        case "transformer":
            return TransformerStage(tiny_models.transformer, tiny_models.dvae, data)
        case "clip":
            return ClipStage(tiny_models.clip, data)


def test_the_frozen_dvae_encodes_the_same_tokens_at_any_precision(pairs, tiny_models):
    decoded = batches(preload_if_small(pairs), tiny_models)
    streamed = batches(pairs, tiny_models, num_workers=0)
    encoded_before, encoded_then = (
        build("transformer", tiny_models, StageData(each, None, CPU))
        for each in (decoded, streamed)
    )
    batch = decoded.batch(0)
    noise = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = tiny_models.dvae.encode(noise)
        losses = [stage.loss(batch, 0.0)[0] for stage in (encoded_before, encoded_then)]
    assert not torch.equal(rounded, tiny_models.dvae.encode(noise)), "precision does not matter"
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("kind", "number"), [("dvae", "validation_loss"), ("transformer", "validation_image_loss")]
)
def test_validation_weighs_every_pair_alike_whatever_the_batches(pairs, tiny_models, kind, number):
    whole, parts = (
        build(
            kind,
            tiny_models,
            StageData(
                batches(pairs, tiny_models),
                batches(pairs, tiny_models, batch_size=size, last="keep"),
                CPU,
            ),
        ).validate()
        for size in (5, 4)
    )
    assert parts[number] == pytest.approx(whole[number], rel=1e-5)


class Recorded:
    """A CLIP's `loss`, with the image numbers kept."""

    def __init__(self, clip, monkeypatch):
        self.loss, self.image_numbers = clip.loss, None
        monkeypatch.setattr(clip, "loss", self)

    def __call__(self, *inputs, image_numbers):
        self.image_numbers = image_numbers
        return self.loss(*inputs, image_numbers=image_numbers)


def test_clip_gets_equal_numbers_for_equal_images(tmp_path, tiny_models, monkeypatch):
    for number, sample in enumerate(rainbow.samples()[:4]):
        pixels = rainbow.samples()[0 if number == 2 else number * 900].picture()
        (tmp_path / f"{number}.png").write_bytes(encode_image(pixels, "png"))
        (tmp_path / f"{number}.txt").write_text(sample.caption)
    pairs = preload_if_small(open_channel(tmp_path, image_size=16))
    source = batches(pairs, tiny_models, batch_size=4)
    recorded = Recorded(tiny_models.clip, monkeypatch)
    build("clip", tiny_models, StageData(source, None, CPU)).loss(source.batch(0), 0.0)
    first, second, third, fourth = recorded.image_numbers.tolist()
    assert first == third
    assert len({first, second, fourth}) == 3


@pytest.mark.parametrize("kind", ["dvae", "transformer", "clip"])
def test_without_held_out_pairs_there_is_nothing_to_report(pairs, tiny_models, kind):
    data = StageData(batches(pairs, tiny_models), None, CPU)
    assert build(kind, tiny_models, data).validate() == {}


class Hooked:
    """Calls `after` behind each pass through a part of a model, while it is entered; counts."""

    def __init__(self, module, after):
        self.module, self.after, self.passes = module, after, 0

    def __call__(self, *_):
        self.passes += 1
        self.after()

    def __enter__(self):
        self.handle = self.module.register_forward_hook(self)
        return self

    def __exit__(self, *_):
        self.handle.remove()


def test_a_stop_ends_the_encoding_of_a_data_sets_image_tokens(pairs, tiny_models, monkeypatch):
    monkeypatch.setattr("training.data.batching.preload.MAX_CHUNK_IMAGES", 2)
    stop = threading.Event()
    data = StageData(batches(preload_if_small(pairs), tiny_models), None, CPU, stop)
    with Hooked(tiny_models.dvae.encoder, stop.set) as hooked, pytest.raises(Stopped):
        build("transformer", tiny_models, data)
    assert hooked.passes == 1  # of 3


@pytest.mark.parametrize("kind", ["dvae", "transformer", "clip"])
def test_a_stop_ends_a_validation(pairs, tiny_models, kind):
    stop = threading.Event()
    validation = batches(pairs, tiny_models, batch_size=2, last="keep")
    stage = build(kind, tiny_models, StageData(batches(pairs, tiny_models), validation, CPU, stop))
    part = {
        "dvae": tiny_models.dvae.encoder,
        "transformer": tiny_models.dvae.encoder,
        "clip": tiny_models.clip.model.visual,
    }[kind]
    with Hooked(part, stop.set) as hooked, pytest.raises(Stopped):
        stage.validate()
    assert hooked.passes == 1  # of 3


def test_a_checkpoint_is_another_runs_when_pairs_tokens_or_models_differ(pairs, tiny_models):
    def identities(pairs, tokenizer):
        with_tokens = Batches(pairs, batch_size=2, seed=0, tokenizer=tokenizer, num_workers=0)
        data = StageData(with_tokens, None, CPU)
        stages = [build(kind, tiny_models, data) for kind in ("transformer", "clip")]
        return [stage.identity() for stage in stages]

    same = CaptionTokenizer.train(["red"], kind="word", text_length=8)
    longer = CaptionTokenizer.train(["red"], kind="word", text_length=9)
    others = CaptionTokenizer.train(["red", "blue"], kind="word", text_length=8)
    usual = identities(pairs, same)
    assert identities(pairs, same) == usual
    for changed in (
        identities(pairs, longer),
        identities(pairs, others),
        identities(Subset(pairs, 4), same),  # with the fingerprint of the whole
    ):
        assert changed[0] != usual[0]
        assert changed[1] != usual[1]


def test_a_mirrored_picture_has_the_tokens_of_the_mirrored_picture(pairs, tiny_models):
    preloaded = Preloaded(pairs)
    train = batches(preloaded, tiny_models, mirrorable=torch.ones(5, dtype=torch.bool))
    stage = build("transformer", tiny_models, StageData(train, None, CPU))
    batch = next(
        batch
        for batch in map(train.batch, range(UNMIRRORED_EPOCHS, 20))
        if 0 < int(batch.mirrored.sum()) < 5
    )
    tokens = tiny_models.dvae.encode(batch.images)
    assert not torch.equal(tokens, stage.dvae.encode(preloaded.images[batch.indices] / 255))
    expected = tiny_models.transformer.loss(batch.text_tokens, tokens).total
    assert stage.loss(batch, 0.0)[0] == pytest.approx(float(expected), rel=1e-6)
