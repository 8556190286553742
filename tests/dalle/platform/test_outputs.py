"""Output directories, and the failure file on a full disk, in 1,024 characters."""

from contextlib import suppress

import pytest

from dalle.errors import PlatformError
from dalle.platform.environment import Paths
from dalle.platform.outputs import (
    FAILURE_CHARACTERS,
    prepare_outputs,
    release_outputs,
    write_failure,
)
from tests.permissions import small_disk


def test_a_failure_begins_with_the_cause_and_ends_with_the_line_at_fault(tmp_path):
    paths = Paths(tmp_path)
    write_failure(paths, "epochs must be 1 or more", "Traceback\n" + "x" * 5000 + "\nlast line")
    text = paths.failure.read_text()
    assert text.startswith("epochs must be 1 or more\n")
    assert text.endswith("last line")
    assert len(text) <= FAILURE_CHARACTERS
    assert [path.name for path in paths.output.iterdir()] == ["failure"]


@pytest.mark.parametrize("length", [10, 900, 990, 1023, 1024, 1025, 100_000])
def test_a_failure_is_never_longer_than_sagemaker_shows(tmp_path, length):
    cause = "é" * length
    write_failure(Paths(tmp_path), cause, "Traceback " * 200)
    text = Paths(tmp_path).failure.read_text(encoding="utf-8")
    assert len(text) <= FAILURE_CHARACTERS
    assert text.startswith(cause[: FAILURE_CHARACTERS - 1])


def test_a_failure_file_that_cannot_be_written_raises_nothing(tmp_path):
    (tmp_path / "output").write_text("a file where the directory should be")
    write_failure(Paths(tmp_path), "cause")


def test_a_failure_file_fits_on_a_full_disk(tmp_path):
    paths = Paths(tmp_path)
    with small_disk(paths.output, 64_000):
        prepare_outputs(paths)
        with suppress(OSError), (paths.output / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 512)
        with pytest.raises(OSError, match="No space left"):
            (paths.output / "more").write_bytes(b"x")
        write_failure(paths, "\udc80" * FAILURE_CHARACTERS)
        assert paths.failure.read_text() == "\\udc80" * FAILURE_CHARACTERS


def test_the_reserved_space_is_freed_without_a_failure(tmp_path):
    paths = Paths(tmp_path)
    prepare_outputs(paths)
    release_outputs(paths)
    assert [path for path in paths.output.rglob("*") if path.is_file()] == []


def test_output_directories_are_made(tmp_path):
    paths = Paths(tmp_path)
    prepare_outputs(paths)
    for directory in (paths.model, paths.checkpoints, paths.output_data, paths.tensorboard):
        assert directory.is_dir()
        assert any(directory.is_relative_to(allowed) for allowed in paths.allowed)


def test_an_output_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(PlatformError, match=f"cannot make the directory {tmp_path}/model"):
        prepare_outputs(Paths(tmp_path))
