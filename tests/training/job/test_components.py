"""training.job: a job's inputs, components and output, opened from its channels."""

import itertools
import logging
import shutil
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from dalle import artefact as artefacts
from dalle.errors import CaptionTooLong, DataError, HyperparameterError
from dalle.manifest import Manifest, StageRecord
from dalle.platform.environment import read_job
from dalle.platform.outputs import prepare_outputs
from dalle.preprocess.images import encode_image
from dalle.types import COMPONENTS
from tests.training.pairs import tar_of
from training.config.hyperparameters import parse
from training.data.batching.preload import to_chw
from training.data.batching.token_cache import TokenCache
from training.data.skips import SkipReason
from training.job.components import Components
from training.job.inputs import Inputs
from training.job.output import Output
from training.stopping import DelayedStop, Stopped

TINY = {"size": "tiny", "image_size": "16", "batch_size": "4", "tokenizer_kind": "word"}


def fill(folder, num_pairs):
    for number in range(num_pairs):
        pixels = np.full((16, 16, 3), number, dtype=np.uint8)
        (folder / f"{number}.png").write_bytes(encode_image(pixels, "png"))
        (folder / f"{number}.txt").write_text(f"picture {number}")
    return folder


@pytest.fixture
def open_inputs(opt_ml):
    """A function: hyperparameters and a stop -> the inputs of the job in `opt_ml`."""

    def open_inputs(stop=None, **raw):
        job = read_job(opt_ml.root, {"DALLE_DEVICE": "cpu"})
        prepare_outputs(job.paths)
        device = torch.device("cpu")
        return Inputs(job, parse(TINY | raw), device, stop or threading.Event())

    return open_inputs


def put_artefact(opt_ml, models, **stopped_at):
    """Models into the channel artefact. stopped_at: stage -> the step its training stopped at."""
    fields = {"job_name": "earlier-1", "finished_at": "", "wall_seconds": 1, "cpu_seconds": 1}
    fields |= {"hyperparameters": {}, "metrics": {}, "dataset_fingerprint": ""}
    records = [
        StageRecord(stage=stage, steps=step, is_finished=False, dataset_counts={}, **fields)
        for stage, step in stopped_at.items()
    ]
    finished = records[0].model_copy(update={"stage": "clip", "is_finished": True})
    manifest = Manifest(stages=[*records, finished])
    artefacts.save(opt_ml.add_channel("artefact"), replace(models, manifest=manifest))


def test_validation_leaves_out_no_pair(opt_ml, open_inputs):
    fill(opt_ml.add_channel("train"), 4)
    fill(opt_ml.add_channel("validation"), 5)
    stage = Components(open_inputs()).build("dvae")
    sizes = [len(batch.captions) for batch in stage.data.validation_batches()]
    assert sizes == [4, 1]


def test_everything_that_the_channels_brought_is_present_and_nothing_learned_later(
    opt_ml, open_inputs, tiny_artefact
):
    fill(opt_ml.add_channel("train"), 4)
    inputs = open_inputs()
    Components(inputs).check(["transformer"])  # which learns a tokenizer
    assert inputs.present == set()
    shutil.copytree(tiny_artefact, opt_ml.add_channel("artefact"), dirs_exist_ok=True)
    assert open_inputs().present == set(COMPONENTS)


@pytest.fixture
def long_caption(opt_ml):
    """Four pairs with a long caption among them, one with nothing but a long one, and a held-out
    one."""
    train = fill(opt_ml.add_channel("train"), 5)
    (train / "2.txt").write_text("picture 2\nthis picture has a caption of many words")
    (train / "3.txt").write_text("picture 3 is the third one of all")
    held_out = fill(opt_ml.add_channel("validation"), 2)
    (held_out / "1.txt").write_text("picture number one and nothing more")


def captions_of(pairs):
    return [pairs.captions(index) for index in range(len(pairs))]


def test_a_caption_that_is_too_long_ends_the_job_by_file_and_caption(long_caption, open_inputs):
    inputs = open_inputs(text_length="4")
    with pytest.raises(CaptionTooLong) as caught:
        Components(inputs).check(["transformer"])
    for part in ("train/2.png: ", "'this picture has", "text_length", "long_captions"):
        assert part in str(caught.value)


@pytest.mark.parametrize("kind", ["word", "clip"])
def test_captions_that_are_too_long_are_cut_to_their_first_words(
    long_caption, open_inputs, caplog, kind
):
    inputs = open_inputs(text_length="4", long_captions="cut", tokenizer_kind=kind)
    Components(inputs).check(["transformer", "clip"])
    pairs = inputs.train.pairs
    assert captions_of(pairs)[2:4] == [
        ("picture 2", "this picture has a"),
        ("picture 3 is the",),
    ]
    assert captions_of(inputs.validation.pairs)[1] == ("picture number one and",)
    assert pairs.skips.counts[SkipReason.CUT_CAPTION] == 2
    assert (pairs.skips.num_bad, pairs.skips.num_good) == (0, 5)
    assert "2.png: caption cut to text_length, 4 tokens: 'this picture has a cap" in caplog.text


def test_captions_that_are_too_long_are_left_out_and_pairs_without_others_too(
    long_caption, open_inputs, caplog
):
    inputs = open_inputs(text_length="4", long_captions="skip", max_bad_share="0")
    Components(inputs).check(["transformer"])
    pairs = inputs.train.pairs
    assert captions_of(pairs) == [(f"picture {number}",) for number in (0, 1, 2, 4)]
    assert [int(pairs.image(index)[0, 0, 0]) for index in range(4)] == [0, 1, 2, 4]
    assert inputs.train.totals.num_pairs == pairs.skips.num_good == 4
    assert pairs.skips.counts[SkipReason.LONG_CAPTION] == 2
    assert "3.png: caption over text_length, 4 tokens: 'picture 3 is" in caplog.text
    assert len(inputs.validation.pairs) == 1


def test_a_job_whose_every_caption_is_too_long_is_refused(opt_ml, open_inputs):
    fill(opt_ml.add_channel("train"), 3)
    with pytest.raises(DataError, match="train: every caption is longer than text_length=1"):
        open_inputs(text_length="1", long_captions="skip")


def test_captions_are_not_cut_where_none_is_too_long(opt_ml, open_inputs):
    fill(opt_ml.add_channel("train"), 3)
    usual = open_inputs(text_length="4").train.totals.fingerprint
    for how in ("cut", "skip"):
        inputs = open_inputs(text_length="4", long_captions=how)
        assert inputs.train.totals.fingerprint == usual
        assert inputs.train.pairs.skips.counts == {}


@pytest.mark.slow
def test_a_component_whose_training_was_stopped_is_taken_with_a_warning_and_a_note(
    opt_ml, open_inputs, tiny_models, caplog
):
    fill(opt_ml.add_channel("train"), 4)
    put_artefact(opt_ml, replace(tiny_models, transformer=None), clip=7, transformer=5, dvae=1300)
    inputs = open_inputs(stage="transformer")
    Components(inputs).check(["transformer"])
    (warning,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert warning.startswith("The training of dvae was stopped at step 1,300, before its budget")
    assert warning.endswith(
        "run the job earlier-1 again with its hyperparameters, channels and checkpoints."
    )
    Output(inputs).finish()
    assert warning in (opt_ml.root / "output/data/report.html").read_text()


def test_a_component_that_is_trained_anew_is_not_warned_of(
    opt_ml, open_inputs, tiny_models, caplog
):
    fill(opt_ml.add_channel("train"), 4)
    put_artefact(opt_ml, replace(tiny_models, transformer=None), dvae=1300)
    Components(open_inputs()).check(["dvae"])
    assert "stopped" not in caplog.text


def test_a_stage_that_the_artefact_brings_is_said_to_begin_at_random_weights(
    opt_ml, open_inputs, tiny_models, caplog
):
    fill(opt_ml.add_channel("train"), 4)
    put_artefact(opt_ml, replace(tiny_models, transformer=None), dvae=1300)
    Components(open_inputs()).check(["dvae"])
    assert "brings a trained dvae; stage=dvae does not train it on: a new one" in caplog.text
    caplog.clear()
    Components(open_inputs()).check(["transformer"])
    assert "random weights" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "says"),
    [
        (["train"], "channel train, which was trained on: without the channel validation"),
        (["train", "validation"], "4 pairs of the channel validation, which this job did not"),
    ],
)
def test_the_report_says_whose_pictures_it_shows(
    opt_ml, open_inputs, tiny_artefact, channels, says
):
    for name in channels:
        fill(opt_ml.add_channel(name), 4)
    shutil.copytree(tiny_artefact, opt_ml.add_channel("artefact"), dirs_exist_ok=True)
    Output(open_inputs()).finish()
    assert says in (opt_ml.root / "output/data/report.html").read_text()


class StopAtAWarning(logging.Handler):
    """A stop that comes with the first warning of a damaged image: while images are decoded."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.stop = threading.Event()

    def emit(self, record):
        self.stop.set()


@pytest.fixture
def stop_at_a_warning():
    handler = StopAtAWarning()
    logger = logging.getLogger("training.data.skips")
    logger.addHandler(handler)
    yield handler.stop
    logger.removeHandler(handler)


def test_a_stop_ends_the_opening(opt_ml, open_inputs, stop_at_a_warning):
    channel = fill(opt_ml.add_channel("train"), 40)
    (channel / "7.png").write_bytes(b"no image")
    with pytest.raises(Stopped):
        open_inputs(stop_at_a_warning)
    assert stop_at_a_warning.is_set()


def stopped_with(opt_ml, open_inputs, artefact):
    """Inputs of a job that is stopped before its stage `transformer`."""
    fill(opt_ml.add_channel("train"), 4)
    artefacts.save(opt_ml.add_channel("artefact"), artefact)
    stop = threading.Event()
    inputs = open_inputs(stop)
    Components(inputs).check(["transformer"])
    assert Components(inputs).build("transformer") is not None
    stop.set()
    return inputs


@pytest.mark.slow
def test_after_a_stop_nothing_is_built_and_the_report_holds_what_takes_seconds(
    opt_ml, open_inputs, tiny_models
):
    inputs = stopped_with(opt_ml, open_inputs, replace(tiny_models, transformer=None))
    assert [Components(inputs).build(name) for name in ("dvae", "transformer")] == [None, None]
    with pytest.raises(Stopped):
        Components(inputs).check(["transformer"])
    Output(inputs).finish()
    assert artefacts.load(opt_ml.root / "model").components() == ["dvae", "clip", "tokenizer"]
    page = (opt_ml.root / "output/data/report.html").read_text("utf-8")
    assert "data:image" in page
    assert "The job was stopped" not in page, "nothing is lacking"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checks", "lacks"),
    [
        (0, "images, codebook usage, retrieval, memorisation"),
        (6, "generated images, memorisation, retrieval"),
    ],
)
def test_a_report_names_what_a_stop_leaves_out(
    opt_ml, open_inputs, tiny_models, monkeypatch, checks, lacks
):
    """checks: of whether the seconds after the stop are over, before they are."""
    times = itertools.chain(itertools.repeat(0.0, 1 + checks), itertools.repeat(1e9))
    monkeypatch.setattr(
        "training.report.job.DelayedStop", partial(DelayedStop, clock=lambda: next(times))
    )
    inputs = stopped_with(opt_ml, open_inputs, tiny_models)
    Output(inputs).finish()
    assert artefacts.load(opt_ml.root / "model").transformer is not None
    page = (opt_ml.root / "output/data/report.html").read_text("utf-8")
    assert f"The job was stopped: this report lacks {lacks}." in page
    assert ("data:image" in page) == (checks > 0)


@pytest.fixture
def nothing_is_small(monkeypatch):
    """No data set is decoded into memory."""
    monkeypatch.setattr("training.data.open.is_small", lambda dataset: False)


@pytest.mark.parametrize(
    ("budget", "is_ahead"), [({"epochs": "2"}, True), ({"max_steps": "3"}, False)]
)
def test_images_that_are_seen_twice_are_encoded_ahead_and_give_the_same_loss(
    opt_ml, open_inputs, tiny_models, nothing_is_small, budget, is_ahead
):
    fill(opt_ml.add_channel("train"), 8)
    artefacts.save(opt_ml.add_channel("artefact"), replace(tiny_models, transformer=None))
    stage = Components(open_inputs(num_workers="0", stage="transformer", **budget)).build(
        "transformer"
    )
    dataset = stage.batches.dataset
    assert isinstance(dataset, TokenCache) is is_ahead
    batch = stage.batches.batch(0)
    assert batch.images.numel() == (0 if is_ahead else 4 * 3 * 16 * 16)
    images = torch.stack([to_chw(dataset.image(index)) for index in batch.indices.tolist()])
    tokens = stage.dvae.encode(images.float() / 255)
    expected = stage.model.eval().loss(batch.text_tokens, tokens).total
    assert torch.equal(stage.loss(batch, 0.0)[0], expected)
    folder = opt_ml.root / "checkpoints" / "image-tokens"
    assert bool(list(folder.glob("*/part-*"))) is is_ahead


def test_a_channel_of_shards_is_trained_on_and_json_captions_are_found(
    opt_ml, open_inputs, tmp_path
):
    members = []
    for number in range(4):
        image = encode_image(np.full((16, 16, 3), number, dtype=np.uint8), "png")
        members += [(f"{number}.png", image), (f"{number}.json", b'{"alt": "picture"}')]
    tar_of(opt_ml.add_channel("train") / "a.tar", members)
    stage = Components(open_inputs(caption_key="alt")).build("dvae")
    assert stage.batches.batch(0).captions == ["picture"] * 4


def test_a_model_that_no_memory_holds_is_refused_before_it_is_built(opt_ml, open_inputs):
    fill(opt_ml.add_channel("train"), 4)
    inputs = open_inputs(transformer_width="65536", transformer_num_heads="1")
    says = (
        r"^transformer: the weights alone take [\d,.]+ GB, and [\d,.]+ GB of memory are free; set"
    )
    with pytest.raises(HyperparameterError, match=says):
        Components(inputs).check(["dvae", "transformer"])
