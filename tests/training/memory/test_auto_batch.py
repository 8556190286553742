"""training.memory.auto_batch and what the job makes of `batch_size=auto`."""

import threading

import pytest
import torch

from dalle.errors import DeviceError
from dalle.models.dvae import DVAEConfig
from dalle.platform.environment import read_job
from dalle.platform.outputs import prepare_outputs
from tests.training.pairs import channel_of
from training.config.hyperparameters import parse
from training.job.components import Components
from training.job.inputs import Inputs
from training.loop.checkpoints import Checkpoints, stored_run
from training.memory import auto_batch
from training.memory.estimate import Setting, StageMemory
from training.stopping import Stopped

CPU = torch.device("cpu")
NEVER = threading.Event()
DVAE = DVAEConfig(
    image_size=16, patch_size=4, num_downsamples=0, width=16, num_blocks=1, codebook_size=16
)


def trial(rates, asked=None):
    """Pairs a second by size; a size that is not there does not fit."""

    def run(size):
        if asked is not None:
            asked.append(size)
        return rates.get(size)

    return run


@pytest.mark.parametrize(
    ("rates", "largest", "chosen"),
    [
        ({16: 100, 32: 180, 64: 190, 128: 900}, 999, 32),  # the first doubling that is no gain
        ({16: 100, 32: 180}, 32, 32),  # as many as fit
        ({16: 100, 32: 180}, 999, 32),  # twice as many ran out of memory
        ({16: 100, 32: 105}, 999, 16),
        ({5: 100}, 5, 5),  # fewer fit than doubling begins with
    ],
)
def test_a_batch_is_doubled_while_that_brings_more_pairs_a_second(rates, largest, chosen):
    first = min(16, largest)
    assert auto_batch._worthwhile(trial(rates), first, largest, NEVER)[0] == chosen


def test_what_runs_out_of_memory_is_tried_again_a_little_smaller():
    asked = []
    fits_50 = dict.fromkeys(range(51), 1.0)
    assert auto_batch._largest(trial(fits_50, asked), 100, NEVER) == asked[-1]
    assert 42 <= asked[-1] <= 50
    assert asked == sorted(asked, reverse=True)


def test_a_stop_ends_the_trials():
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        auto_batch._worthwhile(trial({16: 1, 32: 9}), 16, 99, stop)
    with pytest.raises(Stopped):
        auto_batch._largest(trial({}), 99, stop)


@pytest.fixture
def find(monkeypatch):
    """Finds a share for a small dVAE, of so many pairs, with so many bytes free."""

    def find(*, num_pairs=10_000, free=1 << 30, rates=None, num_devices=1):
        monkeypatch.setattr(auto_batch, "free_host_memory", lambda: free)
        if rates is not None:
            monkeypatch.setattr(auto_batch, "Trial", lambda *_: trial(rates))
        return auto_batch.find_share(
            StageMemory("dvae", DVAE, device_type="cpu"),
            parse({"batch_size": "auto"}).dvae,
            Setting(num_devices=num_devices),
            CPU,
            num_pairs=num_pairs,
            stop=NEVER,
        )

    return find


ALWAYS_FASTER = {2**n: float(2**n) for n in range(20)}


@pytest.mark.slow
def test_an_epoch_keeps_sixteen_steps(find, caplog):
    caplog.set_level("INFO")
    assert find(num_pairs=64 * 16, rates=ALWAYS_FASTER) == 64
    assert "more would leave fewer than 16 steps to an epoch" in caplog.text
    assert find(num_pairs=64 * 16, rates=ALWAYS_FASTER, num_devices=4) == 16
    assert find(num_pairs=5, rates={1: 1.0}) == 1


@pytest.mark.slow
def test_no_more_than_the_free_memory_holds_is_tried(find):
    scarce = find(free=30 << 20, num_pairs=10**6, rates=ALWAYS_FASTER)
    assert 16 <= scarce < find(free=1 << 30, num_pairs=10**6, rates=ALWAYS_FASTER)


@pytest.mark.slow
def test_too_little_memory_for_one_pair_is_an_error_before_training(find):
    with pytest.raises(DeviceError, match="not even one pair of stage dvae fits cpu"):
        find(free=1 << 10)


@pytest.mark.slow
def test_the_trial_trains_and_says_how_fast(find):
    assert find(num_pairs=32 * 16) in (16, 32)


def test_a_checkpoints_identity_is_read_without_its_weights(tmp_path):
    directory = tmp_path / "dvae"
    assert stored_run(directory) is None
    saved = Checkpoints(directory, identity={"batch_size": 48})
    saved.save(1, {"model": torch.zeros(3)})
    saved.save(2, {"model": torch.zeros(3)})
    (directory / "step-000000003.pt").write_bytes(b"half")
    assert stored_run(directory).identity == {"batch_size": 48}


@pytest.fixture
def components_of(opt_ml, monkeypatch):
    """A function: the share that every trial finds -> the components of a job, and the job."""
    channel_of(opt_ml.add_channel("train"), 32)

    def components_of(share):
        job = read_job(opt_ml.root, {"DALLE_DEVICE": "cpu"})
        prepare_outputs(job.paths)
        raw = {"size": "tiny", "image_size": "16", "batch_size": "auto", "clip_batch_size": "4"}
        opened = Components(Inputs(job, parse(raw), CPU, NEVER))
        monkeypatch.setattr(opened, "_find_share", lambda name, settings: share)
        return opened, job

    return components_of


def test_found_sizes_take_autos_place_and_others_stay(components_of):
    opened, _ = components_of(12)
    settled = opened.settle_batch_sizes(["dvae", "clip"])
    assert (settled.dvae.batch_size, settled.clip.batch_size) == (12, 4)
    assert settled.transformer.batch_size == "auto", "this job does not train it"
    assert settled.dvae.identity()["batch_size"] == 12
    opened.check(["dvae"])
    assert len(opened.build("dvae").batches.batch(0).captions) == 12


def test_a_resumed_job_keeps_the_size_of_its_checkpoint(components_of):
    opened, job = components_of(12)
    identity = opened.settle_batch_sizes(["dvae"]).dvae.identity()
    Checkpoints(job.paths.checkpoints / "dvae", identity=identity).save(1, {})
    again, _ = components_of(99)
    assert again.settle_batch_sizes(["dvae"]).dvae.batch_size == 12


def test_a_stop_in_the_midst_of_it_is_passed_on_to_all_ranks(components_of, monkeypatch):
    def stopped(name, settings):
        raise Stopped

    opened, _ = components_of(12)
    monkeypatch.setattr(opened, "_find_share", stopped)
    gathered = []
    gather = opened._inputs.ranks.gather

    def noted(rows):
        gathered.append(rows.tolist())
        return gather(rows)

    monkeypatch.setattr(opened._inputs.ranks, "gather", noted)
    with pytest.raises(Stopped):
        opened.settle_batch_sizes(["dvae"])
    assert gathered == [[0.0]], "the others wait for this rank's answer"
