"""The artefact of a channel: a directory, or a model.tar.gz that is not trusted."""

import gzip
import io
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from dalle import archive
from dalle import artefact as artefacts
from dalle.errors import ArtefactError, DiskFullError
from dalle.types import COMPONENTS
from tests.dalle.artefact_files import files_under, small_disk
from tests.permissions import common_user, directory_for_all


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


def test_an_artefact_is_located_in_a_directory_as_it_is(artefact_copy, tmp_path):
    pack(artefact_copy / "model.tar.gz", (artefact_copy / "dvae", "dvae"))
    assert archive.locate(artefact_copy, tmp_path / "scratch") == artefact_copy
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("name", ["model.tar.gz", "other.tar.gz"])
@pytest.mark.parametrize("root", [".", ""])
def test_an_artefact_is_located_in_an_archive(name, root, artefact_copy, tmp_path):
    entries = [(path, f"./{path.name}" if root else path.name) for path in artefact_copy.iterdir()]
    pack(tmp_path / "channel" / name, *entries)
    found = archive.locate(tmp_path / "channel", tmp_path / "scratch")
    assert found == tmp_path / "scratch"
    assert artefacts.load(found).components() == [*COMPONENTS]


def test_the_report_of_the_job_may_lie_beside_its_model(artefact_copy, tmp_path):
    channel = tmp_path / "channel"
    pack(channel / "model.tar.gz", *((path, path.name) for path in artefact_copy.iterdir()))
    (channel / "output.tar.gz").write_bytes(b"no archive")
    found = archive.locate(channel, tmp_path / "scratch")
    assert artefacts.load(found).components() == [*COMPONENTS]


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["a.tar.gz", "b.tar.gz"],
        ["picture.png"],
        ["model.tar", "model.zip"],
        ["output.tar.gz"],
    ],
)
def test_none_or_several_archives_are_refused_naming_the_files(names, tmp_path):
    channel = tmp_path / "channel"
    channel.mkdir()
    for name in names:
        (channel / name).write_bytes(b"")
    with pytest.raises(ArtefactError, match="must hold manifest.json or exactly one") as caught:
        archive.locate(channel, tmp_path / "scratch")
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
        archive.locate(tmp_path / "channel", tmp_path / "scratch")
    assert files_under(tmp_path) == {"channel/model.tar.gz"}


def test_an_absolute_path_in_an_archive_stays_within_the_scratch_directory(tmp_path):
    pack(tmp_path / "channel" / "model.tar.gz", member(f"{tmp_path}/evil"))
    with pytest.raises(ArtefactError, match=r"has no manifest.json"):
        archive.locate(tmp_path / "channel", tmp_path / "scratch")
    assert not (tmp_path / "evil").exists()
    assert list((tmp_path / "scratch").rglob("evil"))


def test_nothing_in_an_archive_is_executable_by_others_or_setuid(artefact_copy, tmp_path):
    entry = member("tool")
    entry.mode = 0o6777
    pack(tmp_path / "channel" / "model.tar.gz", entry)
    with pytest.raises(ArtefactError, match=r"has no manifest.json"):
        archive.locate(tmp_path / "channel", tmp_path / "scratch")
    assert (tmp_path / "scratch" / "tool").stat().st_mode & 0o7022 == 0


@pytest.mark.parametrize("content", [b"", b"hello", b"\x1f\x8b\x08", b"PK\x03\x04" + b"\0" * 99])
def test_a_file_that_is_no_archive_is_named(content, tmp_path):
    path = tmp_path / "channel" / "model.tar.gz"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"model\.tar\.gz cannot be unpacked"):
        archive.locate(path.parent, tmp_path / "scratch")


def test_a_full_disk_is_no_artefact_error(artefact_copy, tmp_path):
    path = pack(tmp_path / "channel" / "model.tar.gz", (artefact_copy, "."))
    with small_disk(), pytest.raises(DiskFullError, match=r"no room to unpack .*model\.tar\.gz"):
        archive.locate(path.parent, tmp_path / "scratch")


@pytest.mark.parametrize("place", [0.01, 0.2, 0.4, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("damage", ["cut off", "overwritten"])
def test_a_damaged_archive_is_refused_when_it_is_unpacked_or_loaded(
    damage, place, artefact_copy, tmp_path
):
    path = pack(tmp_path / "channel" / "model.tar.gz", (artefact_copy, "."))
    content = bytearray(path.read_bytes())
    start = int(place * len(content))
    if damage == "cut off":
        del content[start:]
    else:
        content[start : start + 64] = b"\xff" * 64
    path.write_bytes(content)
    with pytest.raises(ArtefactError):
        artefacts.load(archive.locate(path.parent, tmp_path / "scratch"))


def test_a_channel_that_cannot_be_read_is_named(tmp_path):
    with directory_for_all() as folder:
        folder.chmod(0)
        with common_user(), pytest.raises(ArtefactError, match=f"{folder} cannot be read: Perm"):
            archive.locate(folder, tmp_path / "scratch")


def test_a_file_that_is_larger_than_the_free_disk_is_refused_before_it_is_written(tmp_path):
    channel, scratch = tmp_path / "channel", tmp_path / "scratch"
    channel.mkdir()
    giant = member("dvae/weights.safetensors")
    giant.size = 1 << 50
    with gzip.open(channel / "model.tar.gz", "wb") as file:
        file.write(giant.tobuf() + b"\0" * 10_240)  # a bomb: all but its beginning is missing
    says = r"dvae/weights.safetensors has 1,125,899,906,842,624 bytes, [\d,]+ are free; give it a"
    with pytest.raises(DiskFullError, match=says):
        archive.locate(channel, scratch)
    assert files_under(scratch) == set()


def with_headers(kind):
    """The bytes of an archive whose headers are hostile."""
    good = member("dvae/config.json").tobuf() + b"abc".ljust(512, b"\0")
    if kind == "negative size":
        info = tarfile.TarInfo("dvae/loop")
        info.size = -1024  # leads back to the member before it
        return good + info.tobuf(tarfile.GNU_FORMAT)
    if kind == "giant header":
        info = member("././@PaxHeader", tarfile.XHDTYPE)
        info.size = 200 << 30
        return info.tobuf() + bytes(1 << 20)
    chained = {"pax": tarfile.XHDTYPE, "global": tarfile.XGLTYPE, "name": tarfile.GNUTYPE_LONGNAME}
    if kind in chained:
        info = member("././@LongLink", chained[kind])
        info.size = 4
        return (info.tobuf() + b"a\0\0\0".ljust(512, b"\0")) * 1500 + good
    pax_headers = {"mtime": {"mtime": "inf"}, "NUL": {"path": "a\0b"}, "size": {"size": "x"}}[kind]
    info = member("dvae/config.json")
    info.pax_headers = pax_headers
    return info.tobuf(tarfile.PAX_FORMAT) + b"abc".ljust(512, b"\0")


@pytest.mark.parametrize(
    "kind", ["negative size", "giant header", "pax", "global", "name", "mtime", "NUL", "size"]
)
def test_an_archive_with_hostile_headers_is_refused(kind, tmp_path):
    (tmp_path / "channel").mkdir()
    with gzip.open(tmp_path / "channel" / "model.tar.gz", "wb") as file:
        file.write(with_headers(kind) + bytes(1024))
    with pytest.raises(ArtefactError, match=r"model\.tar\.gz (cannot be unpacked|has no manifest)"):
        archive.locate(tmp_path / "channel", tmp_path / "scratch")


def test_a_pipe_in_place_of_an_archive_is_refused_and_not_waited_for(tmp_path):
    (tmp_path / "channel").mkdir()
    os.mkfifo(tmp_path / "channel" / "model.tar.gz")
    with pytest.raises(ArtefactError, match=r"model\.tar\.gz is not a regular file"):
        archive.locate(tmp_path / "channel", tmp_path / "scratch")


@pytest.mark.slow
def test_more_files_than_an_artefact_can_have_are_refused(tmp_path):
    entries = [member(f"{number}") for number in range(archive.MAX_ENTRIES + 1)]
    pack(tmp_path / "channel" / "model.tar.gz", *entries)
    with pytest.raises(ArtefactError, match=r"model.tar.gz has more than 1,000 entries"):
        archive.locate(tmp_path / "channel", tmp_path / "scratch")


@pytest.mark.parametrize("is_packed", [True, False])
def test_a_manifest_one_folder_too_deep_is_named_with_its_file_and_the_remedy(
    is_packed, artefact_copy, tmp_path
):
    channel = tmp_path / "channel"
    if is_packed:
        pack(channel / "model.tar.gz", (artefact_copy, "model"))
        says = r"model.tar.gz has no manifest.json .*\['model'\].*in model/; .* -C model \."
    else:
        shutil.copytree(artefact_copy, channel / "model")
        says = r"channel must hold manifest.json .*found \['model'\]; it is one .* in model/"
        with pytest.raises(ArtefactError, match="is missing; it is one folder deeper, in model/"):
            artefacts.load(channel)
    with pytest.raises(ArtefactError, match=says):
        archive.locate(channel, tmp_path / "scratch")


def test_an_archive_of_something_else_is_named_with_what_it_holds(artefact_copy, tmp_path):
    pack(tmp_path / "channel" / "model.tar.gz", (artefact_copy / "dvae", "weights"))
    with pytest.raises(ArtefactError, match=r"model.tar.gz has no manifest.json .*\['weights'\]"):
        archive.locate(tmp_path / "channel", tmp_path / "scratch")


def test_hidden_files_beside_a_model_and_in_it_are_left_alone(artefact_copy, tmp_path):
    hidden = ("dvae/._config.json", "clip/.DS_Store", ".ipynb_checkpoints/a", "dvae/.x/b.json")
    for name in hidden:
        (artefact_copy / name).parent.mkdir(exist_ok=True)
        (artefact_copy / name).write_bytes(b"\0\5\x16\7")
    assert artefacts.load(artefact_copy).components() == [*COMPONENTS]
    channel = tmp_path / "channel"
    pack(channel / "model.tar.gz", (artefact_copy, "."))
    for name in ("._model.tar.gz", ".DS_Store"):
        (channel / name).write_bytes(b"\0\5\x16\7")
    found = archive.locate(channel, tmp_path / "scratch")
    assert artefacts.load(found).components() == [*COMPONENTS]
