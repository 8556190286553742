"""Artefacts: what is saved is what is loaded, and whatever is not whole is refused by name."""

import hashlib
import io
import json
import os
import resource
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save

from dalle import artefact as artefacts
from dalle.artefact import Artefact, Manifest, StageRecord
from dalle.errors import ArtefactError, DiskFullError, PlatformError

COMPONENTS = ["dvae", "transformer", "clip", "tokenizer"]
CAPTIONS = ["big filled red star", "small halftone cyan circle rotated twice"]


@pytest.fixture
def directory(tiny_artefact, tmp_path) -> Path:
    """A copy of the tiny artefact, to be spoilt."""
    copy: Path = shutil.copytree(tiny_artefact, tmp_path / "model")
    return copy


def read(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "manifest.json").read_text())
    return content


def rewrite(directory: Path, **fields: object) -> None:
    (directory / "manifest.json").write_text(json.dumps(read(directory) | fields))


def replace_file(directory: Path, name: str, content: bytes) -> None:
    """Other content, with the hash that belongs to it."""
    (directory / name).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    rewrite(directory, files=read(directory)["files"] | {name: digest})


def files_under(directory: Path) -> set[str]:
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}


def answers(artefact: Artefact) -> list[torch.Tensor]:
    """A number or more from every component."""
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    text_tokens = artefact.tokenizer.encode(CAPTIONS)
    image_tokens = artefact.dvae.encode(images)
    return [
        text_tokens,
        image_tokens,
        artefact.dvae.decode(image_tokens),
        artefact.transformer.text_logits(text_tokens),
        artefact.transformer.log_likelihood(text_tokens, image_tokens),
        artefact.clip.encode_image(images),
        artefact.clip.encode_text(text_tokens),
    ]


def test_what_is_loaded_answers_bit_for_bit_as_what_was_saved(tiny_models, directory):
    loaded = artefacts.load(directory)
    assert loaded.components() == COMPONENTS
    for one, other in zip(answers(tiny_models), answers(loaded), strict=True):
        assert torch.equal(one, other)
    for name in COMPONENTS[:3]:
        model, original = getattr(loaded, name), getattr(tiny_models, name)
        assert model.config == original.config
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        state = original.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_loaded_artefact_saves_to_the_same_files(directory, tmp_path):
    manifest = artefacts.save(tmp_path / "again", artefacts.load(directory))
    assert manifest.files == read(directory)["files"]


def test_configs_keep_their_tuples(tiny_models, make_dalle, tmp_path):
    transformer = make_dalle(attention_kinds=("axial_row", "conv_like"), layer_scale=0.1)
    artefacts.save(tmp_path, Artefact(transformer=transformer))
    assert artefacts.load(tmp_path).transformer.config == transformer.config


def test_the_directory_holds_the_components_and_the_manifest_their_hashes(directory):
    files = read(directory)["files"]
    weights = {
        f"{name}/{file}"
        for name in COMPONENTS[:3]
        for file in ("config.json", "weights.safetensors")
    }
    assert set(files) == weights | {"tokenizer/tokenizer.json"}
    assert files_under(directory) == set(files) | {"manifest.json"}
    for name, digest in files.items():
        assert hashlib.sha256((directory / name).read_bytes()).hexdigest() == digest


def test_the_manifest_keeps_how_it_came_about(tiny_models, tmp_path):
    record = StageRecord(
        stage="dvae",
        job_name="rainbow-1",
        finished_at="2026-01-02T03:04:05+00:00",
        steps=100,
        is_finished=True,
        wall_seconds=1.5,
        cpu_seconds=2.5,
        hyperparameters={"learning_rate": 0.001, "size": None},
        metrics={"validation_loss": 0.25},
        dataset_fingerprint="abc",
        dataset_counts={"train": 10},
    )
    manifest = Manifest(licence="MIT – ©", stages=[record])
    saved = artefacts.save(
        tmp_path, replace(tiny_models, manifest=manifest), git_revision="0123abc"
    )
    loaded = artefacts.load(tmp_path).manifest
    assert loaded == saved == artefacts.read_manifest(tmp_path)
    assert (loaded.licence, loaded.git_revision, loaded.format_version) == ("MIT – ©", "0123abc", 1)
    assert loaded.stages == [record]
    assert manifest.files == {}, "the one that was given is not changed"


@pytest.mark.parametrize("missing", COMPONENTS)
def test_a_component_may_be_missing(missing, tiny_models, tmp_path):
    artefacts.save(tmp_path, replace(tiny_models, **{missing: None}))
    loaded = artefacts.load(tmp_path)
    assert loaded.components() == [name for name in COMPONENTS if name != missing]
    assert getattr(loaded, missing) is None


def test_saving_over_an_older_artefact_leaves_nothing_of_it(tiny_models, directory, make_dalle):
    (directory / "report.html").write_text("somebody else's")
    other = make_dalle()
    artefacts.save(directory, Artefact(transformer=other, tokenizer=tiny_models.tokenizer))
    loaded = artefacts.load(directory)
    assert loaded.components() == ["transformer", "tokenizer"]
    assert loaded.transformer.config == other.config
    assert sorted(path.name for path in directory.iterdir()) == [
        "manifest.json",
        "report.html",
        "tokenizer",
        "transformer",
    ]


@pytest.mark.parametrize("survivors", range(6))
def test_an_interrupted_save_is_refused_and_can_be_repeated(
    survivors, tiny_models, directory, make_dalle, monkeypatch
):
    """The disk fails at each of the renames: four components and the manifest."""
    other = replace(tiny_models, transformer=make_dalle())
    really_replace, done = os.replace, []

    def fail(*arguments: object) -> None:
        if len(done) == survivors:
            raise OSError(5, "Input/output error")
        done.append(arguments)
        really_replace(*arguments)

    monkeypatch.setattr(os, "replace", fail)
    if survivors == 5:
        artefacts.save(directory, other)
    else:
        with pytest.raises(PlatformError, match="cannot write the artefact .*Input/output"):
            artefacts.save(directory, other)
        assert not (directory / ".staging").exists()
        with pytest.raises(ArtefactError, match=r"manifest.json is missing \(was its writing"):
            artefacts.load(directory)
    monkeypatch.undo()
    artefacts.save(directory, other)
    assert artefacts.load(directory).transformer.config == other.transformer.config
    assert sorted(path.name for path in directory.iterdir()) == sorted(
        [*COMPONENTS, "manifest.json"]
    )


@contextmanager
def small_disk() -> Iterator[None]:
    """No file may grow beyond 1000 bytes: the nearest to a small disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_artefact_and_nothing_else(tiny_models, directory):
    with small_disk(), pytest.raises(DiskFullError, match="no room to write the artefact"):
        artefacts.save(directory, tiny_models)
    assert artefacts.load(directory).components() == COMPONENTS
    assert not (directory / ".staging").exists()


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (SafetensorError("I/O error: No space left on device (os error 28)"), DiskFullError),
        (OSError(28, "No space left on device"), DiskFullError),
        (SafetensorError("I/O error: Input/output error (os error 5)"), PlatformError),
        (SafetensorError("an invalid tensor"), SafetensorError),
    ],
)
def test_a_save_that_fails_before_its_renames_leaves_the_old_one(
    error, raised, tiny_models, directory, monkeypatch
):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(artefacts, "save_file", fail)
    with pytest.raises(raised):
        artefacts.save(directory, tiny_models)
    assert artefacts.load(directory).components() == COMPONENTS
    assert not (directory / ".staging").exists()


FILES = [
    *[
        f"{name}/{file}"
        for name in COMPONENTS[:3]
        for file in ("config.json", "weights.safetensors")
    ],
    "tokenizer/tokenizer.json",
]


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_named(name, directory):
    content = bytearray((directory / name).read_bytes())
    content[-2] ^= 1
    (directory / name).write_bytes(content)
    with pytest.raises(ArtefactError, match=f"{name} does not match its sha256 in manifest.json"):
        artefacts.load(directory)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(name, directory):
    (directory / name).unlink()
    with pytest.raises(ArtefactError, match=f"{name} is missing, but manifest.json lists it"):
        artefacts.load(directory)


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_missing_component_that_the_manifest_lists_is_named(component, directory):
    shutil.rmtree(directory / component)
    with pytest.raises(ArtefactError, match=f"{component}/.* is missing, but manifest.json lists"):
        artefacts.load(directory)


@pytest.mark.parametrize("name", ["dvae/extra.bin", "clip/deep/down/code.py", "tokenizer/.hidden"])
def test_an_unlisted_file_is_named(name, directory):
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(b"?")
    with pytest.raises(ArtefactError, match=f"{name} is not in manifest.json"):
        artefacts.load(directory)


def test_a_component_that_is_not_in_the_manifest_is_not_loaded(directory):
    manifest = read(directory)
    files = {name: digest for name, digest in manifest["files"].items() if "clip" not in name}
    rewrite(directory, files=files)
    with pytest.raises(ArtefactError, match=r"clip/config.json is not in manifest.json"):
        artefacts.load(directory)


def test_a_symlink_is_refused_though_it_leads_to_the_right_file(directory, tmp_path):
    name = "dvae/weights.safetensors"
    (directory / name).rename(tmp_path / "elsewhere")
    (directory / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtefactError, match=f"{name} is missing"):
        artefacts.load(directory)
    (directory / name).unlink()
    (tmp_path / "elsewhere").rename(directory / name)
    (directory / "dvae" / "more").symlink_to(tmp_path)
    with pytest.raises(ArtefactError, match=r"dvae/more is not in manifest.json"):
        artefacts.load(directory)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "format_version must be 1, got None"),
        (b"{}", "format_version must be 1, got None"),
        (b'{"format_version": 2}', "format_version must be 1, got 2"),
        (b'{"format_version": "1"}', "format_version must be 1, got '1'"),
        (b'{"format_version": 1, "files": []}', "is not a manifest: .*files"),
        (b'{"format_version": 1, "colour": 3}', "is not a manifest: .*colour"),
        (b'{"format_version": 1, "stages": [{"stage": "x"}]}', "is not a manifest: .*stage"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_named(content, says, directory):
    (directory / "manifest.json").write_bytes(content)
    with pytest.raises(ArtefactError, match=f"(?s)manifest.json:? {says}"):
        artefacts.load(directory)


def test_a_directory_without_a_manifest_is_no_artefact(directory, tmp_path):
    for path in (tmp_path / "empty", tmp_path / "nowhere", directory / "dvae" / "config.json"):
        if path.name == "empty":
            path.mkdir()
        with pytest.raises(ArtefactError, match=f"{path} is not an artefact: manifest.json is"):
            artefacts.load(path)


def spoil(directory: Path, name: str, **fields: object) -> None:
    content = json.loads((directory / name).read_text()) | fields
    replace_file(directory, name, json.dumps(content).encode())


@pytest.mark.parametrize(
    ("component", "spoilt"),
    [
        ("dvae", {"width": "wide"}),
        ("dvae", {"width": 33}),
        ("dvae", {"patch_size": 0}),
        ("dvae", {"image_size": 17}),
        ("dvae", {"quantiser": "fsq"}),
        ("transformer", {"num_layers": 3}),
        ("transformer", {"num_heads": 0}),
        ("transformer", {"attention_kinds": ["half"]}),
        ("transformer", {"grid_size": -1}),
        ("clip", {"embed_size": None}),
        ("clip", {"vision_layers": [1, 1]}),
        ("clip", {"text_heads": 0}),
        ("clip", {"text_heads": 5}),
        ("clip", {"patch_size": 5}),
    ],
)
def test_a_config_that_does_not_fit_its_weights_is_named(component, spoilt, directory):
    spoil(directory, f"{component}/config.json", **spoilt)
    with pytest.raises(ArtefactError, match=f"{component} cannot be loaded as {component}"):
        artefacts.load(directory)


@pytest.mark.parametrize("content", [b"", b"[1", b"null", b"\xff" * 100, b"\x80\x02}q\x00."])
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_kind_is_named_though_its_hash_is_right(name, content, directory):
    replace_file(directory, name, content)
    with pytest.raises(ArtefactError, match=name.split("/")[0]):
        artefacts.load(directory)


def test_weights_that_lack_a_tensor_are_named(directory, tiny_models):
    state = tiny_models.transformer.state_dict()
    del state["text_position"]
    replace_file(directory, "transformer/weights.safetensors", save(state))
    with pytest.raises(ArtefactError, match=r"(?s)loaded as transformer.*text_position"):
        artefacts.load(directory)


def pack(path: Path, *entries: tarfile.TarInfo | tuple[Path, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                archive.addfile(entry, io.BytesIO(b"x" * entry.size))
            else:
                archive.add(entry[0], arcname=entry[1])
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    info.size = 3 if kind == tarfile.REGTYPE else 0
    return info


def test_an_artefact_is_located_in_a_directory_as_it_is(directory, tmp_path):
    pack(directory / "model.tar.gz", (directory / "dvae", "dvae"))
    assert artefacts.locate(directory, tmp_path / "scratch") == directory
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("name", ["model.tar.gz", "other.tar.gz"])
@pytest.mark.parametrize("root", [".", ""])
def test_an_artefact_is_located_in_an_archive(name, root, directory, tmp_path):
    entries = [(path, f"./{path.name}" if root else path.name) for path in directory.iterdir()]
    pack(tmp_path / "channel" / name, *entries)
    found = artefacts.locate(tmp_path / "channel", tmp_path / "scratch")
    assert found == tmp_path / "scratch"
    assert artefacts.load(found).components() == COMPONENTS


@pytest.mark.parametrize(
    "names", [[], ["a.tar.gz", "b.tar.gz"], ["picture.png"], ["model.tar", "model.zip"]]
)
def test_none_or_several_archives_are_refused_with_what_is_there(names, tmp_path):
    channel = tmp_path / "channel"
    channel.mkdir()
    for name in names:
        (channel / name).write_bytes(b"")
    with pytest.raises(ArtefactError, match="must hold manifest.json or exactly one") as caught:
        artefacts.locate(channel, tmp_path / "scratch")
    assert str(names) in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (member("../evil"), "cannot be unpacked"),
        (member("dvae/../../evil"), "cannot be unpacked"),
        (member("evil", tarfile.SYMTYPE, "/etc/passwd"), "evil is not a plain file"),
        (member("evil", tarfile.SYMTYPE, "dvae"), "evil is not a plain file"),
        (member("evil", tarfile.LNKTYPE, "/etc/passwd"), "evil is not a plain file"),
        (member("evil", tarfile.CHRTYPE), "evil is not a plain file"),
        (member("evil", tarfile.FIFOTYPE), "evil is not a plain file"),
    ],
)
def test_an_archive_that_reaches_outside_is_refused(entry, says, tmp_path):
    pack(tmp_path / "channel" / "model.tar.gz", entry)
    with pytest.raises(ArtefactError, match=says):
        artefacts.locate(tmp_path / "channel", tmp_path / "scratch")
    assert files_under(tmp_path) == {"channel/model.tar.gz"}


def test_an_absolute_path_in_an_archive_stays_within_the_scratch_directory(tmp_path):
    pack(tmp_path / "channel" / "model.tar.gz", member(f"{tmp_path}/evil"))
    found = artefacts.locate(tmp_path / "channel", tmp_path / "scratch")
    assert not (tmp_path / "evil").exists()
    with pytest.raises(ArtefactError, match="is not an artefact"):
        artefacts.load(found)


def test_nothing_in_an_archive_is_executable_by_others_or_setuid(directory, tmp_path):
    entry = member("tool")
    entry.mode = 0o6777
    pack(tmp_path / "channel" / "model.tar.gz", entry)
    artefacts.locate(tmp_path / "channel", tmp_path / "scratch")
    assert (tmp_path / "scratch" / "tool").stat().st_mode & 0o7022 == 0


@pytest.mark.parametrize("content", [b"", b"hello", b"\x1f\x8b\x08", b"PK\x03\x04" + b"\0" * 99])
def test_a_file_that_is_no_archive_is_named(content, tmp_path):
    path = tmp_path / "channel" / "model.tar.gz"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"model\.tar\.gz cannot be unpacked"):
        artefacts.locate(path.parent, tmp_path / "scratch")


def test_a_full_disk_is_not_the_archives_fault(directory, tmp_path):
    path = pack(tmp_path / "channel" / "model.tar.gz", (directory, "."))
    with small_disk(), pytest.raises(DiskFullError, match=r"no room to unpack .*model\.tar\.gz"):
        artefacts.locate(path.parent, tmp_path / "scratch")


@pytest.mark.parametrize("place", [0.01, 0.2, 0.4, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("damage", ["cut off", "overwritten"])
def test_a_damaged_archive_is_refused_when_it_is_unpacked_or_loaded(
    damage, place, directory, tmp_path
):
    path = pack(tmp_path / "channel" / "model.tar.gz", (directory, "."))
    content = bytearray(path.read_bytes())
    start = int(place * len(content))
    if damage == "cut off":
        del content[start:]
    else:
        content[start : start + 64] = b"\xff" * 64
    path.write_bytes(content)
    with pytest.raises(ArtefactError):
        artefacts.load(artefacts.locate(path.parent, tmp_path / "scratch"))
