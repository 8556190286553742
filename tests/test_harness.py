"""The harness's own work on files: packing and unpacking a model as SageMaker does."""

import pytest

import harness


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model" / "dvae").mkdir(parents=True)
    (tmp_path / "model" / "manifest.json").write_text("{}")
    (tmp_path / "model" / "dvae" / "weights").write_bytes(b"0" * 1000)
    return tmp_path / "model"


def test_what_is_packed_comes_out_the_same_and_cannot_be_written(model, tmp_path):
    archive = harness.pack_model(model, tmp_path / "model.tar.gz")
    unpacked = harness.unpack_model(archive, tmp_path / "there")
    assert (unpacked / "dvae" / "weights").read_bytes() == b"0" * 1000
    assert {path.stat().st_mode & 0o222 for path in [unpacked, *unpacked.rglob("*")]} == {0}


def test_a_symbolic_link_in_a_model_is_refused_by_name(model, tmp_path):
    (model / "link").symlink_to("manifest.json")
    archive = harness.pack_model(model, tmp_path / "model.tar.gz")
    with pytest.raises(ValueError, match="link is neither a file nor a directory"):
        harness.unpack_model(archive, tmp_path / "there")


def test_a_missing_docker_is_named(monkeypatch):
    monkeypatch.setattr(harness, "DOCKER", "docker-that-is-not-there")
    assert harness.why_no_docker() == "the program docker-that-is-not-there is not installed"
