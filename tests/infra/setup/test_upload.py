"""`upload`: a folder to the bucket; what is there is skipped, what changed is sent again."""

import re

import pytest

from infra.setup import upload
from tests.infra.aws_account import BUCKET


@pytest.fixture
def folder(account, infra, tmp_path):
    infra("bootstrap")
    for name in ("train/0.txt", "train/sub/1.txt", "validation/2.txt", ".git/config", "train/.x"):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "pictures"


KEYS = [
    "data/pictures/train/0.txt",
    "data/pictures/train/sub/1.txt",
    "data/pictures/validation/2.txt",
]


def test_everything_that_is_not_hidden_is_uploaded(account, infra, folder):
    result = infra("upload", folder, "--json")
    assert result.code == 0, result.err
    assert account.keys_in() == KEYS
    assert result.json["uri"] == f"s3://{BUCKET}/data/pictures/"
    assert (result.json["uploaded"], result.json["unchanged"]) == (3, 0)
    body = account.client("s3").get_object(Bucket=BUCKET, Key=KEYS[1])["Body"].read()
    assert body == b"train/sub/1.txt"


def test_linked_files_and_folders_are_uploaded(account, infra, folder, tmp_path):
    (tmp_path / "disk/sub").mkdir(parents=True)
    (tmp_path / "disk/sub/3.txt").write_text("3")
    (folder / "linked").symlink_to(tmp_path / "disk")
    (folder / "train/4.txt").symlink_to(tmp_path / "disk/sub/3.txt")
    assert infra("upload", folder).code == 0
    linked = ["data/pictures/linked/sub/3.txt", "data/pictures/train/4.txt"]
    assert account.keys_in() == sorted(KEYS + linked)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("nowhere", "train/link is a link to .*nowhere, which is not there"),
        (".", "train/link is a link to .*pictures, a folder that it lies in"),
    ],
)
def test_a_link_that_cannot_be_followed_is_named_and_nothing_is_sent(
    account, infra, folder, target, says
):
    (folder / "train/link").symlink_to(folder / target)
    result = infra("upload", folder)
    assert result.code == 1
    assert re.search(says, result.err)
    assert account.keys_in() == []


def test_a_second_run_sends_only_what_changed(account, infra, folder):
    infra("upload", folder)
    (folder / "train/0.txt").write_text("TRAIN/0.txt")  # as long as before
    result = infra("upload", folder, "--json")
    assert (result.json["uploaded"], result.json["unchanged"]) == (1, 2)
    result = infra("upload", folder)
    assert result.out.splitlines()[0].split("  ")[0] == "0 files, 0 bytes"
    assert "3 files" in result.out.splitlines()[1]


def test_what_is_gone_here_is_deleted_there_only_when_asked(account, infra, folder):
    infra("upload", folder)
    (folder / "validation/2.txt").unlink()
    assert "left there (--delete removes them)" in infra("upload", folder).out
    assert account.keys_in() == KEYS
    assert infra("upload", folder, "--delete", "--json").json["deleted"] == 1
    assert account.keys_in() == KEYS[:2]


def test_another_data_set_is_not_touched(account, infra, folder):
    account.put_object("data/pictures-old/0.txt")
    infra("upload", folder, "--delete")
    assert "data/pictures-old/0.txt" in account.keys_in()


def test_objects_that_s3_kept_are_reported(account, infra, folder):
    infra("upload", folder)
    (folder / "validation/2.txt").unlink()
    account.refuse(f"POST /{BUCKET}", "AccessDenied", "not authorized to perform: s3:DeleteObject")
    assert "may not do s3:DeleteObject" in infra("upload", folder, "--delete").err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "nowhere is not a folder"),
        (["EMPTY"], "has no files in it"),
        (["FULL", "--name", "a/b"], "--name is letters, digits, dots, dashes and underscores"),
    ],
)
def test_a_folder_that_cannot_be_sent_is_reported(infra, folder, tmp_path, words, says):
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": tmp_path / "empty", "FULL": folder}
    result = infra("upload", *[places.get(word, word) for word in words])
    assert result.code == 1
    assert says in result.err


def test_a_file_too_large_for_one_object_is_refused_by_number(infra, folder):
    with (folder / "train/large.tar").open("wb") as file:
        file.truncate(upload.MAX_BYTES + 1)  # a hole: takes no room
    result = infra("upload", folder)
    assert result.code == 1
    assert "5,368,709,121 bytes, and an object is sent in one piece of at most" in result.err
