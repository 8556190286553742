"""Held-out pictures among those to train on: refused by one rule in train, doctor and shard."""

import json
from functools import partial

import pytest

from dalle.errors import DataError
from dalle.platform.environment import Channel
from dalle.preprocess.images import encode_image
from infra.local.pipes import Pipe, objects
from tests.training.data import layouts
from tests.training.pairs import SIZE, channel_of, members_of, picture, put, tar_of
from training.data.__main__ import main
from training.data.held_out import find_held_out
from training.data.open import open_data
from training.distributed.process_group import SINGLE_PROCESS
from training.stopping import NEVER

PAIRS = [(f"{n}", encode_image(picture(n), "png"), (f"picture {n}",)) for n in range(3)]


def described(*names):
    found = find_held_out(names)
    return found and found.description


@pytest.mark.parametrize(
    ("folders", "says"),
    [
        (["train", "validation"], "validation beside train"),
        (["Training", "val"], "val beside Training"),
        (["images", "test"], "test"),
        (["test"], "test"),
        (["train-0001.tar", "val_0001.tar", "test.tar"], "val_0001.tar, test.tar beside train-0"),
        (["train-00000-of-00002.parquet", "validation-00000-of-00001.parquet"], "beside train-0"),
        (["data/train-00000.parquet", "data/test-00000.parquet"], "data/test-00000.parquet beside"),
        (["data/images", "data/validation"], "data/validation"),
        (["default/train/0000.parquet", "default/test/0000.parquet"], "default/test beside"),
        (["birds/train", "birds/test", "cats"], "birds/test beside birds/train"),
        (["train2017", "val2017"], "val2017 beside train2017"),
        (["images/train2014", "images/val_2014", "x"], "images/val_2014 beside images/train2014"),
        (["train", "test2015"], "test2015 beside train"),
        (["a.tar/train", "b.tar/val"], "val beside train"),
        (["train", "images"], None),
        (["train-0001.tar", "train-0002.tar"], None),
        (["tested-0001.tar", "validations"], None),
        (["birds/test", "cats"], None),
        (["val2017", "photos"], None),
        (["2017", "eval20170"], None),
    ],
)
def test_folders_and_files_are_held_out_by_their_names(folders, says):
    found = described(*(f"{folder}/1.png" for folder in folders))
    assert found is None if says is None else found is not None and says in found


def test_names_of_pictures_themselves_hold_nothing_out():
    assert described("validation.png", "train.png", "test.jpg") is None
    assert described("1.png", "test/2.png") == "test"


def job_opens(folder, mode="File"):
    channel = Channel("train", folder, mode)
    options = {"image_size": SIZE, "max_bad_share": 0.5, "caption_key": None, "num_hosts": 1}
    return open_data(channel, ranks=SINGLE_PROCESS, stop=NEVER, **options)


def doctor(folder, capsys):
    status = main(["doctor", str(folder), "--json", "--image-size", str(SIZE)])
    return status, "".join(json.loads(capsys.readouterr().out)["problems"])


def write_folders(root, *folders):
    for folder in folders:
        layouts.text_files(root / folder, [(f"{n}", *rest) for n, *rest in PAIRS])


def write_shards(root, *names):
    for number, name in enumerate(names):
        tar_of(root / name, members_of(range(number, number + 3)))


def write_parquet(root, *names):
    for name in names:
        layouts.parquet(root / name, PAIRS)
        (root / name / "train-00000-of-00001.parquet").rename(root / f"{name}.parquet")
        (root / name).rmdir()


def write_tables(root, *folders):
    for folder in folders:
        layouts.metadata_jsonl(root / folder, PAIRS)


@pytest.mark.parametrize(
    ("write", "names"),
    [
        (write_folders, ("train", "validation")),
        (write_folders, ("data/train", "data/validation")),
        (write_folders, ("train2017", "val2017")),
        (write_shards, ("train-0.tar", "val-0.tar")),
        (write_parquet, ("data/train-00000", "data/test-00000")),
        (write_tables, ("train", "test")),
    ],
)
def test_train_doctor_and_shard_refuse_the_same(tmp_path, capsys, write, names):
    root = tmp_path / "channel"
    write(root, *names)
    says = f"{names[1]}.* beside {names[0]}.*"
    with pytest.raises(DataError, match=f"channel train, {root}, holds {says}trained on. Make"):
        job_opens(root)
    status, problems = doctor(root, capsys)
    assert status == 1
    assert "pictures that are held out would be trained on" in problems
    assert main(["shard", str(root), "--out", str(tmp_path / "out")]) == 1
    assert "could no longer be told from those to train on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_pipe_is_refused_by_the_names_of_its_members(tmp_path):
    members = [
        (f"{folder}/{name}", data)
        for folder in ("train", "val")
        for name, data in members_of([folder == "val"])
    ]
    tar_of(tmp_path / "shards" / "a.tar", members)
    (tmp_path / "ml").mkdir()
    folder = tmp_path / "ml" / "train"
    with (
        Pipe(folder, partial(objects, tmp_path / "shards")),
        pytest.raises(DataError, match="holds val beside train"),
    ):
        job_opens(folder, "Pipe")


def test_pictures_that_no_table_names_may_be_held_out_beside_the_others(tmp_path, capsys):
    layouts.coco(tmp_path, PAIRS)
    for number in range(3):
        put(tmp_path / "val2017", f"v{number}", encode_image(picture(9 + number), "png"))
    assert len(job_opens(tmp_path).pairs) == 3
    assert doctor(tmp_path, capsys) == (0, "")


def test_what_is_held_out_may_be_packed_by_itself(tmp_path):
    channel_of(tmp_path / "data" / "val", 3)
    assert main(["shard", str(tmp_path / "data"), "--out", str(tmp_path / "out")]) == 0
