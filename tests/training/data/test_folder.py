"""What is found in a channel, and what is skipped, counted and named."""

import json
import logging
import os
import socket
import threading

import pytest

from dalle.errors import DataError
from dalle.preprocess.images import encode_image
from tests.training.pairs import SIZE, channel_of, picture, put
from training.data.batching.preload import preload_if_small
from training.data.skips import SkipReason
from training.data.sources.channel import open_channel
from training.stopping import Stopped


def test_pairs_are_found_in_sub_folders_and_whatever_the_case_of_the_suffix(tmp_path):
    put(tmp_path, "a/b/one", encode_image(picture(1), "png"), b" a star \r\n\r\nthe star\r\n")
    (tmp_path / "two.JPG").write_bytes(encode_image(picture(2), "jpeg"))
    (tmp_path / "two.TXT").write_bytes("\ufeffein Stern über dem Haus".encode())
    (tmp_path / "a/three.webp").write_bytes(encode_image(picture(3), "webp"))
    (tmp_path / "a/three.txt").write_bytes(b"a square")
    folder = open_channel(tmp_path, image_size=SIZE)
    names = [folder.name(index) for index in range(len(folder))]
    assert names == ["a/b/one.png", "a/three.webp", "two.JPG"]
    assert folder.captions(0) == ("a star", "the star")
    assert folder.captions(2) == ("ein Stern über dem Haus",)
    assert (folder.image(0) == 1).all()
    assert folder.skips.counts.total() == 0


@pytest.mark.parametrize("target", ["nowhere.png", "x.png"])
def test_a_link_that_leads_nowhere_is_skipped_counted_and_named(tmp_path, target):
    (channel_of(tmp_path, 20) / "x.png").symlink_to(target)
    dataset = open_channel(tmp_path, image_size=SIZE)
    assert len(dataset) == 20
    assert dataset.skips.counts == {SkipReason.UNREADABLE: 1}
    assert dataset.skips.examples == {SkipReason.UNREADABLE: ["x.png"]}


def test_links_may_point_within_the_channel_but_not_out_of_it(tmp_path):
    put(tmp_path, "secret", encode_image(picture(9), "png"), b"secret")
    folder = channel_of(tmp_path / "train", 20)
    (folder / "inside.png").symlink_to("001.png")
    (folder / "inside.txt").symlink_to(folder / "001.txt")
    (folder / "outside.png").symlink_to(tmp_path / "secret.png")
    (folder / "outside.txt").symlink_to("../secret.txt")
    (folder / "all").symlink_to(tmp_path)
    (folder / "ring").symlink_to(folder)
    dataset = open_channel(folder, image_size=SIZE, max_bad_share=0.2)
    assert len(dataset) == 21
    assert dataset.skips.counts == {SkipReason.OUTSIDE: 3, SkipReason.IGNORED: 1}
    assert dataset.skips.examples[SkipReason.OUTSIDE] == ["all", "outside.png", "outside.txt"]


def test_foreign_files_are_counted_but_nobody_is_told(tmp_path, caplog):
    folder = channel_of(tmp_path / "train", 2)
    for name in ("_SUCCESS", ".DS_Store", "train_$folder$", "metadata.csv", "._000.png"):
        (folder / name).write_bytes(b"")
    (folder / ".ipynb_checkpoints").mkdir()
    put(folder, ".ipynb_checkpoints/000-checkpoint", b"", b"")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(folder / "s.png"))
        dataset = open_channel(folder, image_size=SIZE)
    assert len(dataset) == 2
    assert dataset.skips.counts == {SkipReason.IGNORED: 7}
    assert dataset.skips.num_bad == 0
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_only_the_first_few_of_a_reason_are_logged(tmp_path, caplog):
    folder = channel_of(tmp_path / "train", 20)
    for number in range(9):
        put(folder, f"x{number}", text=b"alone")
    dataset = open_channel(folder, image_size=SIZE, max_bad_share=0.5)
    assert dataset.skips.counts == {SkipReason.CAPTION_WITHOUT_IMAGE: 9}
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 3
    assert dataset.skips.describe() == "9 caption without image (x0.txt, x1.txt, x2.txt, …)"


def test_a_name_that_is_not_utf8_is_written_with_escapes(tmp_path, caplog):
    folder = channel_of(tmp_path / "train", 20)
    (folder / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"alone")
    dataset = open_channel(folder, image_size=SIZE)
    assert dataset.skips.examples == {SkipReason.CAPTION_WITHOUT_IMAGE: ["caf\\udce9.txt"]}
    assert len(dataset.fingerprint) == 64
    caplog.text.encode()


@pytest.mark.parametrize("make", ["missing", "empty", "only foreign", "a file"])
def test_a_channel_without_pairs_is_refused_with_what_it_must_look_like(tmp_path, make):
    root = tmp_path / "train"
    if make == "a file":
        root.write_bytes(b"")
    elif make != "missing":
        root.mkdir()
    if make == "only foreign":
        (root / "shard-0000.tar").write_bytes(b"x")
    with pytest.raises(DataError, match="train: .*0017.png, 0017.txt.* one caption a line"):
        open_channel(root, image_size=SIZE)


def test_a_channel_of_bad_pairs_only_says_what_was_wrong_with_them(tmp_path):
    put(tmp_path, "x", text=b"alone")
    with pytest.raises(DataError, match=r"skipped: 1 caption without image \(x.txt\)"):
        open_channel(tmp_path, image_size=SIZE)


def test_too_many_bad_pairs_stop_the_job_with_the_reasons(tmp_path):
    folder = channel_of(tmp_path / "train", 8)
    put(folder, "x", text=b"alone")
    put(folder, "y", b"GIF, honestly", b"a")
    with pytest.raises(DataError, match="train: 1 of 10 pairs .*max_bad_share 0.05 allows: 1 capt"):
        open_channel(folder, image_size=SIZE, max_bad_share=0.05)
    dataset = open_channel(folder, image_size=SIZE, max_bad_share=0.15)
    with pytest.raises(DataError, match="2 of 10 pairs .*1 caption without.*1 not an image") as no:
        preload_if_small(dataset)
    assert no.value.field == "max_bad_share"
    assert len(preload_if_small(open_channel(folder, image_size=SIZE, max_bad_share=0.2))) == 8


def test_the_fingerprint_tells_data_sets_apart_but_not_their_copies(tmp_path):
    def fingerprint(folder):
        return open_channel(folder, image_size=SIZE).fingerprint

    first = fingerprint(channel_of(tmp_path / "a", 3))
    assert fingerprint(channel_of(tmp_path / "b", 3)) == first
    (tmp_path / "b" / "000.txt").write_text("another caption")
    (tmp_path / "a" / "001.png").rename(tmp_path / "a" / "009.png")
    (tmp_path / "a" / "001.txt").rename(tmp_path / "a" / "009.txt")
    more = fingerprint(channel_of(tmp_path / "c", 4))
    assert len({first, fingerprint(tmp_path / "a"), fingerprint(tmp_path / "b"), more}) == 4


def test_a_read_only_channel_works_and_is_left_as_it_was(tmp_path):
    folder = channel_of(tmp_path / "train", 4)
    before = sorted(path.stat().st_mtime_ns for path in [folder, *folder.iterdir()])
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    try:
        assert len(preload_if_small(open_channel(folder, image_size=SIZE))) == 4
        after = sorted(path.stat().st_mtime_ns for path in [folder, *folder.iterdir()])
        assert after == before
    finally:
        folder.chmod(0o755)


class StopAtTheFirstWarning(logging.Handler):
    def __init__(self, stop):
        super().__init__(logging.WARNING)
        self.stop = stop

    def emit(self, record):
        self.stop.set()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder, name: (folder / f"{name}.gif").symlink_to("nowhere"),  # met when listed
        lambda folder, name: (folder / f"{name}.txt").write_bytes(b"caf\xe9"),  # met when read
    ],
)
def test_a_stop_ends_the_listing_and_the_reading_of_captions(tmp_path, caplog, spoil):
    folder = channel_of(tmp_path, 5)
    for name in ("001", "003"):
        spoil(folder, name)
    stop = threading.Event()
    handler = StopAtTheFirstWarning(stop)
    logger = logging.getLogger("training.data.skips")
    logger.addHandler(handler)
    try:
        with pytest.raises(Stopped):
            open_channel(folder, image_size=SIZE, max_bad_share=1, stop=stop)
    finally:
        logger.removeHandler(handler)
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


def json_of(folder, name, **content):
    (folder / f"{name}.json").write_text(json.dumps(content))


def test_json_beside_an_image_is_read_where_it_has_no_text_file(tmp_path):
    channel_of(tmp_path, 3)
    (tmp_path / "001.txt").unlink()
    json_of(tmp_path, "001", caption=["one", "two"], key="001")
    json_of(tmp_path, "002", caption="not this one")
    json_of(tmp_path, "00000_stats", successes=3)
    dataset = open_channel(tmp_path, image_size=SIZE)
    captions = [dataset.captions(number) for number in range(3)]
    assert captions == [("picture 0",), ("one", "two"), ("picture 2",)]
    assert dataset.skips.counts == {SkipReason.IGNORED: 1}


def test_the_caption_key_names_captions_in_json_beside_images(tmp_path, caplog):
    channel_of(tmp_path, 2)
    for name in ("000", "001"):
        json_of(tmp_path, name, alt=f"the {name}", caption="not this one")
    dataset = open_channel(tmp_path, image_size=SIZE, caption_key="alt")
    assert [dataset.captions(number) for number in range(2)] == [("the 000",), ("the 001",)]
    assert "no effect" not in caplog.text


def test_json_without_the_caption_key_is_counted_with_the_keys_it_has(tmp_path, caplog):
    channel_of(tmp_path, 30)
    (tmp_path / "001.txt").unlink()
    json_of(tmp_path, "001", label=[1, 2], shapes=[])
    dataset = open_channel(tmp_path, image_size=SIZE)
    assert dataset.skips.counts == {SkipReason.NO_CAPTION_KEY: 1}
    assert "001.json: no key 'caption', it has: label, shapes" in caplog.text


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_with_its_mark_is_read(tmp_path, encoding):
    put(tmp_path, "a", encode_image(picture(1), "png"), "\ufeffgrößer\r\n".encode(encoding))
    assert open_channel(tmp_path, image_size=SIZE).captions(0) == ("größer",)


def test_utf16_that_is_cut_off_is_named_as_such(tmp_path, caplog):
    put(tmp_path, "a", encode_image(picture(1), "png"), "größer".encode("utf-16") + b"x")
    with pytest.raises(DataError, match="no image-caption pair"):
        open_channel(tmp_path, image_size=SIZE)
    assert "a.txt: not UTF-16 at byte 14" in caplog.text
