"""training.loop.checkpoints: atomic files, the newest kept, foreign ones refused."""

import pickle
import random
import resource
import zipfile

import numpy as np
import pytest
import torch

from dalle.errors import CheckpointError, DiskFullError, PlatformError
from training.loop.checkpoints import Checkpoints, seed_everything

IDENTITY = {"width": 8, "kinds": ["full"], "data": "abc"}


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "dvae", identity=IDENTITY, kept=2)


def state_of(step):
    return {"step": step, "weights": torch.full((4,), float(step))}


def names(checkpoints):
    return sorted(path.name for path in checkpoints.directory.iterdir())


def test_what_was_saved_is_loaded(checkpoints):
    checkpoints.save(3, state_of(3))
    loaded = checkpoints.load_newest()
    assert loaded["step"] == 3
    assert torch.equal(loaded["weights"], torch.full((4,), 3.0))


def test_an_empty_or_missing_directory_is_a_fresh_start(checkpoints):
    assert checkpoints.load_newest() is None
    checkpoints.directory.mkdir()
    assert checkpoints.load_newest() is None


def test_only_the_newest_are_kept(checkpoints):
    for step in (9, 10, 11, 100):
        checkpoints.save(step, state_of(step))
    assert names(checkpoints) == ["step-000000011.pt", "step-000000100.pt"]
    assert checkpoints.load_newest()["step"] == 100


def test_a_half_written_file_is_ignored_and_removed(checkpoints):
    checkpoints.save(1, state_of(1))
    (checkpoints.directory / "step-000000002.pt.tmp").write_bytes(b"half")
    assert checkpoints.load_newest()["step"] == 1
    assert names(checkpoints) == ["step-000000001.pt"]


def test_a_damaged_file_is_skipped_for_the_one_before(checkpoints, caplog):
    checkpoints.save(1, state_of(1))
    newest = checkpoints.save(2, state_of(2))
    newest.write_bytes(newest.read_bytes()[:-200])
    assert checkpoints.load_newest()["step"] == 1
    assert "skipping the damaged checkpoint" in caplog.text


@pytest.mark.parametrize("kept", [1, 2])
def test_a_checkpoint_saved_after_a_damaged_one_is_kept(checkpoints, kept):
    checkpoints.save(5, state_of(5))
    checkpoints.save(9, state_of(9)).write_bytes(b"damaged")
    again = Checkpoints(checkpoints.directory, identity=IDENTITY, kept=kept)
    assert again.load_newest()["step"] == 5
    again.save(6, state_of(6))
    again.save(7, state_of(7))
    good = ["step-000000006.pt", "step-000000007.pt"][-kept:]
    assert names(again) == [*good, "step-000000009.pt.damaged"]
    assert again.load_newest()["step"] == 7


def test_when_all_are_damaged_they_are_named_with_what_to_do(checkpoints):
    for step in (1, 2):
        checkpoints.save(step, state_of(step)).write_bytes(b"damaged")
    for _ in range(2):  # a second start is no fresh one either
        with pytest.raises(
            CheckpointError, match=r"only step-000000001\.pt\.damaged, step-.*; delete the direc"
        ):
            checkpoints.load_newest()


@pytest.mark.parametrize(
    ("error", "raised", "says"),
    [
        (OSError(5, "Input/output error"), PlatformError, "cannot read the checkpoint .*Input/out"),
        (MemoryError("too little"), MemoryError, "too little"),
        (RuntimeError("DefaultCPUAllocator: can't allocate"), MemoryError, "not enough memory"),
    ],
)
def test_what_cannot_be_read_just_now_is_not_called_damaged(
    checkpoints, monkeypatch, error, raised, says
):
    checkpoints.save(1, state_of(1))

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(raised, match=says):
        checkpoints.load_newest()
    assert names(checkpoints) == ["step-000000001.pt"]


def test_foreign_files_are_left_alone(checkpoints):
    checkpoints.save(1, state_of(1))
    (checkpoints.directory / "notes.txt").write_text("mine")
    checkpoints.save(2, state_of(2))
    checkpoints.save(3, state_of(3))
    assert "notes.txt" in names(checkpoints)


def test_a_checkpoint_of_another_run_is_refused_and_the_difference_named(checkpoints):
    checkpoints.save(1, state_of(1))
    other = Checkpoints(checkpoints.directory, identity={**IDENTITY, "width": 16, "seed": 1})
    with pytest.raises(CheckpointError) as caught:
        other.load_newest()
    assert "width was 8, this job has 16" in str(caught.value)
    assert "seed was None, this job has 1" in str(caught.value)
    assert "kinds" not in str(caught.value)


def test_a_full_disk_keeps_the_checkpoint_before(checkpoints):
    checkpoints.save(1, state_of(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the nearest to a small disk
    try:
        with pytest.raises(DiskFullError, match="the one before it is kept"):
            checkpoints.save(2, {"weights": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(checkpoints) == ["step-000000001.pt"]
    assert checkpoints.load_newest()["step"] == 1


def test_a_directory_that_cannot_be_written_is_the_platforms_fault(tmp_path):
    (tmp_path / "dvae").write_text("a file")
    with pytest.raises(PlatformError, match="cannot write the checkpoint"):
        Checkpoints(tmp_path / "dvae", identity={}).save(1, state_of(1))


class Evil:
    def __reduce__(self):
        return (print, ("code in a checkpoint was run",))


def test_code_in_a_checkpoint_is_never_run(checkpoints, capsys):
    path = checkpoints.save(1, state_of(1))
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, pickle.dumps(Evil()) if name.endswith("data.pkl") else data)
    with pytest.raises(CheckpointError, match=r"step-000000001\.pt\.damaged"):
        checkpoints.load_newest()
    assert capsys.readouterr().out == ""


def draw():
    return random.random(), np.random.rand(), np.random.randn(), torch.rand(1).item()


def test_every_step_of_every_rank_has_its_own_random_numbers_again():
    def drawn(**where):
        seed_everything(**where)
        np.random.randn()  # leaves a second normal number in the generator
        return draw()

    places = [
        {"seed": seed, "step": step, "rank": rank}
        for seed in (0, 7, 2**32 - 1)
        for step in (0, 1, 1_000_000)
        for rank in (0, 1)
    ]
    first = [drawn(**place) for place in places]
    assert [drawn(**place) for place in places] == first
    for numbers in zip(*first, strict=True):
        assert len(set(numbers)) == len(places)
