"""training.stages: what each model learns from a batch, and how it is validated."""

import pytest
import torch

from dalle.images import encode_image
from training import rainbow
from training.data.batches import Batches
from training.data.folder import open_folder
from training.stages import ClipStage, DVAEStage, StageData, TransformerStage

CPU = torch.device("cpu")


@pytest.fixture
def pairs(tmp_path):
    for number, sample in enumerate(rainbow.samples()[:5000:1000]):
        (tmp_path / f"{number}.png").write_bytes(encode_image(sample.picture(), "png"))
        (tmp_path / f"{number}.txt").write_text(sample.caption)
    return open_folder(tmp_path, image_size=16)


def batches(pairs, tiny_models, **options):
    settings = {"batch_size": 5, "seed": 0, "tokenizer": tiny_models.tokenizer, "shuffle": False}
    return Batches(pairs, **(settings | options))


def build(kind, tiny_models, data):
    match kind:
        case "dvae":
            return DVAEStage(tiny_models.dvae, data)
        case "transformer":
            return TransformerStage(tiny_models.transformer, tiny_models.dvae, data)
        case "clip":
            return ClipStage(tiny_models.clip, data)


def test_the_frozen_dvae_encodes_the_same_tokens_at_any_precision(pairs, tiny_models):
    decoded = batches(pairs, tiny_models)
    streamed = batches(pairs, tiny_models, max_decoded_bytes=0, num_workers=0)
    encoded_before, encoded_then = (
        build("transformer", tiny_models, StageData(each, None, CPU))
        for each in (decoded, streamed)
    )
    batch = decoded.batch(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = tiny_models.dvae.encode(batch.images)
        losses = [stage.loss(batch, 0.0)[0] for stage in (encoded_before, encoded_then)]
    assert not torch.equal(rounded, tiny_models.dvae.encode(batch.images))  # it would matter
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


@pytest.mark.parametrize("kind", ["dvae", "transformer", "clip"])
def test_without_held_out_pairs_there_is_nothing_to_report(pairs, tiny_models, kind):
    data = StageData(batches(pairs, tiny_models), None, CPU)
    assert build(kind, tiny_models, data).validate() == {}
