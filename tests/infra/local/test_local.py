"""The image on this machine, what needs no engine: packing and unpacking, what is missing, and
command lines that are refused."""

import subprocess
import sys

import pytest

from infra.docker import why_no_docker
from infra.local.opt_ml import pack_model
from infra.local.pipes import Pipe, record, stream_of
from infra.local.serving import unpack_model, unpacked
from tests import REPOSITORY

pytestmark = pytest.mark.slow


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model" / "dvae").mkdir(parents=True)
    (tmp_path / "model" / "manifest.json").write_text("{}")
    (tmp_path / "model" / "dvae" / "weights").write_bytes(b"0" * 1000)
    return tmp_path / "model"


def test_what_is_packed_comes_out_the_same_and_cannot_be_written(model, tmp_path):
    archive = pack_model(model, tmp_path / "model.tar.gz")
    unpacked = unpack_model(archive, tmp_path / "there")
    assert (unpacked / "dvae" / "weights").read_bytes() == b"0" * 1000
    assert {path.stat().st_mode & 0o222 for path in [unpacked, *unpacked.rglob("*")]} == {0}


def test_a_symbolic_link_in_a_model_is_refused_by_name(model, tmp_path):
    (model / "link").symlink_to("manifest.json")
    archive = pack_model(model, tmp_path / "model.tar.gz")
    with pytest.raises(ValueError, match="link is neither a file nor a directory"):
        unpack_model(archive, tmp_path / "there")


def test_a_missing_docker_is_named(monkeypatch):
    monkeypatch.setenv("DOCKER", "docker-that-is-not-there")
    assert why_no_docker() == "the program docker-that-is-not-there is not installed"


def test_an_archive_is_unpacked_for_as_long_as_it_is_needed_and_a_directory_stays(model, tmp_path):
    archive = pack_model(model, tmp_path / "model.tar.gz")
    with unpacked(archive) as directory:
        assert (directory / "dvae" / "weights").is_file()
    assert not directory.exists()
    with unpacked(model) as directory:
        assert directory == model
    assert model.is_dir()


def test_the_commands_need_the_standard_library_only():
    code = (
        "import sys, infra.local.__main__\n"
        "foreign = {n.split('.')[0] for n in sys.modules} - sys.stdlib_module_names\n"
        "print(foreign - {'infra', '__main__', '__mp_main__'})"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append('.')\n{code}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "--data", "d", "--out", "o", "--set", "size"], "must be NAME=VALUE, got 'size'"),
        (["serve"], "--model"),
        (["deploy"], "invalid choice: 'deploy'"),
    ],
)
def test_a_wrong_command_line_is_refused(words, says):
    done = subprocess.run(
        [sys.executable, "-m", "infra.local", *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert says in done.stderr


def test_a_folder_is_streamed_as_it_is_or_by_its_manifest(tmp_path):
    (tmp_path / "b").write_bytes(b"second")
    (tmp_path / "a").write_bytes(b"first, ")
    content, wrapper = stream_of(tmp_path, "image-ref,caption")
    assert (b"".join(content()), wrapper) == (b"first, second", "None")
    (tmp_path / "all.manifest").write_text('{"image-ref": "a", "caption": "c", "other": 1}\n')
    content, wrapper = stream_of(tmp_path, "image-ref,caption")
    assert wrapper == "RecordIO"
    assert b"".join(content()) == record(b"first, ") + record(b"c")


def test_a_pipe_without_a_reader_is_removed_at_the_end(tmp_path):
    with Pipe(tmp_path / "train", lambda: [b"data"]):
        assert (tmp_path / "train_0").is_fifo()
    assert list(tmp_path.iterdir()) == []
