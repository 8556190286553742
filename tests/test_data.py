"""Channels and batches: what is found, what is skipped and named, and the order of everything."""

import io
import logging
import os
import socket

import numpy as np
import pytest
import torch
from PIL import Image

from dalle.errors import CaptionTooLong, DataError
from dalle.images import encode_image
from training.data.batches import Batches
from training.data.folder import open_folder
from training.data.loader import LoaderSettings, loader_settings
from training.data.memory import InMemory, decode_if_small, first_usable
from training.data.order import Order
from training.data.pairs import SkipReason
from training.data.subset import Subset

SIZE = 8


def picture(number):
    """A picture whose every pixel tells its number."""
    return np.full((SIZE, SIZE, 3), number, dtype=np.uint8)


def put(folder, name, image=None, text=None):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if image is not None:
        path.with_name(f"{path.name}.png").write_bytes(image)
    if text is not None:
        path.with_name(f"{path.name}.txt").write_bytes(text)


def channel_of(folder, num_pairs, captions=1):
    for number in range(num_pairs):
        lines = [f"picture {number}" + " again" * version for version in range(captions)]
        put(folder, f"{number:03}", encode_image(picture(number), "png"), "\n".join(lines).encode())
    return folder


def pixel_numbers(batch):
    """The numbers of the pictures in a batch, read from their pixels."""
    assert (batch.images == batch.images[:, :1, :1, :1]).all()
    return (batch.images[:, 0, 0, 0] * 255).round().int().tolist()


def caption_numbers(batch):
    return [int(caption.split()[1]) for caption in batch.captions]


# --- folder


def test_pairs_are_found_in_sub_folders_and_whatever_the_case_of_the_suffix(tmp_path):
    put(tmp_path, "a/b/one", encode_image(picture(1), "png"), b" a star \r\n\r\nthe star\r\n")
    (tmp_path / "two.JPG").write_bytes(encode_image(picture(2), "jpeg"))
    (tmp_path / "two.TXT").write_bytes("\ufeffein Stern über dem Haus".encode())
    (tmp_path / "a/three.webp").write_bytes(encode_image(picture(3), "webp"))
    (tmp_path / "a/three.txt").write_bytes(b"a square")
    folder = open_folder(tmp_path, image_size=SIZE)
    names = [folder.name(index) for index in range(len(folder))]
    assert names == ["a/b/one.png", "a/three.webp", "two.JPG"]
    assert folder.captions(0) == ("a star", "the star")
    assert folder.captions(2) == ("ein Stern über dem Haus",)
    assert (folder.image(0) == 1).all()
    assert folder.skips.counts.total() == 0


@pytest.mark.parametrize(
    ("make", "reason", "named"),
    [
        (lambda f: put(f, "x", text=b"alone"), SkipReason.CAPTION_WITHOUT_IMAGE, "x.txt"),
        (
            lambda f: put(f, "x", encode_image(picture(1), "png")),
            SkipReason.IMAGE_WITHOUT_CAPTION,
            "x.png",
        ),
        (lambda f: put(f, "x", b"", b"a"), SkipReason.EMPTY_IMAGE, "x.png"),
        (
            lambda f: put(f, "x", encode_image(picture(1), "png"), b"caf\xe9"),
            SkipReason.NOT_UTF8,
            "x.txt",
        ),
        (
            lambda f: put(f, "x", encode_image(picture(1), "png"), b" \n\t\n"),
            SkipReason.EMPTY_CAPTION,
            "x.txt",
        ),
        (
            lambda f: put(f, "x", encode_image(picture(1), "png"), b"a" * (1 << 20) + b"b"),
            SkipReason.GIANT_CAPTION,
            "x.txt",
        ),
        (lambda f: put(f, "x", b"<html>", b"a"), SkipReason.NOT_AN_IMAGE, "x.png"),
        (
            lambda f: put(f, "x", encode_image(picture(1), "png")[:48], b"a"),
            SkipReason.DAMAGED_IMAGE,
            "x.png",
        ),
        (
            lambda f: (f / "000.jpg").write_bytes(encode_image(picture(1), "jpeg")),
            SkipReason.SECOND_IMAGE,
            "000.png",
        ),
        (lambda f: (f / "x.png").symlink_to("nowhere.png"), SkipReason.UNREADABLE, "x.png"),
        (lambda f: (f / "x.png").symlink_to("x.png"), SkipReason.UNREADABLE, "x.png"),
    ],
)
def test_what_cannot_be_a_pair_is_skipped_counted_and_named(tmp_path, caplog, make, reason, named):
    make(channel_of(tmp_path / "train", 20))
    dataset = decode_if_small(open_folder(tmp_path / "train", image_size=SIZE))
    assert len(dataset) == 20
    assert dataset.skips.counts == {reason: 1}
    assert dataset.skips.examples == {reason: [named]}
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert named in record.getMessage()


def test_a_100_megapixel_png_is_a_counted_skip(tmp_path):
    file = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(file, format="PNG")
    put(channel_of(tmp_path / "train", 20), "x", file.getvalue(), b"huge")
    dataset = decode_if_small(open_folder(tmp_path / "train", image_size=SIZE))
    assert len(dataset) == 20
    assert dataset.skips.counts == {SkipReason.GIANT_IMAGE: 1}


def test_links_may_point_within_the_channel_but_not_out_of_it(tmp_path):
    put(tmp_path, "secret", encode_image(picture(9), "png"), b"secret")
    folder = channel_of(tmp_path / "train", 20)
    (folder / "inside.png").symlink_to("001.png")
    (folder / "inside.txt").symlink_to(folder / "001.txt")
    (folder / "outside.png").symlink_to(tmp_path / "secret.png")
    (folder / "outside.txt").symlink_to("../secret.txt")
    (folder / "all").symlink_to(tmp_path)
    (folder / "ring").symlink_to(folder)
    dataset = open_folder(folder, image_size=SIZE, max_bad_share=0.2)
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
        dataset = open_folder(folder, image_size=SIZE)
    assert len(dataset) == 2
    assert dataset.skips.counts == {SkipReason.IGNORED: 7}
    assert dataset.skips.num_bad == 0
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_only_the_first_few_of_a_reason_are_logged(tmp_path, caplog):
    folder = channel_of(tmp_path / "train", 20)
    for number in range(9):
        put(folder, f"x{number}", text=b"alone")
    dataset = open_folder(folder, image_size=SIZE, max_bad_share=0.5)
    assert dataset.skips.counts == {SkipReason.CAPTION_WITHOUT_IMAGE: 9}
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 3
    assert dataset.skips.describe() == "9 caption without image (x0.txt, x1.txt, x2.txt, …)"


def test_a_name_that_is_not_utf8_is_written_with_escapes(tmp_path, caplog):
    folder = channel_of(tmp_path / "train", 20)
    (folder / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"alone")
    dataset = open_folder(folder, image_size=SIZE)
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
        open_folder(root, image_size=SIZE)


def test_a_channel_of_bad_pairs_only_says_what_was_wrong_with_them(tmp_path):
    put(tmp_path, "x", text=b"alone")
    with pytest.raises(DataError, match=r"skipped: 1 caption without image \(x.txt\)"):
        open_folder(tmp_path, image_size=SIZE)


def test_too_many_bad_pairs_stop_the_job_with_the_reasons(tmp_path):
    folder = channel_of(tmp_path / "train", 8)
    put(folder, "x", text=b"alone")
    put(folder, "y", b"GIF, honestly", b"a")
    with pytest.raises(DataError, match="train: 1 of 10 pairs .*max_bad_share 0.05 allows: 1 capt"):
        open_folder(folder, image_size=SIZE, max_bad_share=0.05)
    dataset = open_folder(folder, image_size=SIZE, max_bad_share=0.15)
    with pytest.raises(DataError, match="2 of 10 pairs .*1 caption without.*1 not an image") as no:
        decode_if_small(dataset)
    assert no.value.field == "max_bad_share"
    assert len(decode_if_small(open_folder(folder, image_size=SIZE, max_bad_share=0.2))) == 8


def test_a_read_only_channel_works_and_is_left_as_it_was(tmp_path):
    folder = channel_of(tmp_path / "train", 4)
    before = sorted(path.stat().st_mtime_ns for path in [folder, *folder.iterdir()])
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    try:
        Batches(open_folder(folder, image_size=SIZE), batch_size=2, seed=0).batch(0)
        after = sorted(path.stat().st_mtime_ns for path in [folder, *folder.iterdir()])
        assert after == before
    finally:
        folder.chmod(0o755)


def test_the_fingerprint_tells_data_sets_apart_but_not_their_copies(tmp_path):
    def fingerprint(folder):
        return open_folder(folder, image_size=SIZE).fingerprint

    first = fingerprint(channel_of(tmp_path / "a", 3))
    assert fingerprint(channel_of(tmp_path / "b", 3)) == first
    (tmp_path / "b" / "000.txt").write_text("another caption")
    (tmp_path / "a" / "001.png").rename(tmp_path / "a" / "009.png")
    (tmp_path / "a" / "001.txt").rename(tmp_path / "a" / "009.txt")
    more = fingerprint(channel_of(tmp_path / "c", 4))
    assert len({first, fingerprint(tmp_path / "a"), fingerprint(tmp_path / "b"), more}) == 4


@pytest.mark.parametrize("options", [{}, {"max_decoded_bytes": 0, "num_workers": 0}])
def test_a_sample_of_a_healthy_channel_is_not_held_to_have_all_its_bad_pairs(tmp_path, options):
    folder = channel_of(tmp_path, 40)
    for number in range(3):
        (folder / f"x{number}.txt").write_text("alone")
    dataset = open_folder(folder, image_size=SIZE, max_bad_share=0.1)
    sample = Subset(dataset, 10)
    (folder / sample.name(0)).write_bytes(b"no")
    batches = Batches(sample, batch_size=10, seed=0, **options)
    batches.batch(0)
    assert dataset.skips.num_bad == 4  # of 43, but 4 of 13 would be too many
    assert batches.dataset.captions(0)[0].split()[1] == batches.dataset.name(0)[:3].lstrip("0")


def test_the_first_usable_images_come_with_their_own_captions(tmp_path):
    dataset = open_folder(channel_of(tmp_path, 6), image_size=SIZE)
    (tmp_path / "001.png").write_bytes(b"no")
    images, captions = first_usable(dataset, 3)
    assert images[:, 0, 0, 0].tolist() == [0, 2, 3]
    assert captions == ["picture 0", "picture 2", "picture 3"]
    assert dataset.skips.counts == {SkipReason.NOT_AN_IMAGE: 1}


# --- order


@pytest.mark.parametrize("num_pairs", [16, 19])
def test_an_epoch_shows_no_pair_twice_and_as_many_as_fill_batches(num_pairs):
    order = Order(num_pairs=num_pairs, batch_size=4, seed=3)
    assert order.num_per_epoch == 4
    for epoch in range(3):
        steps = range(4 * epoch, 4 * epoch + 4)
        seen = [order.indices(step, order.permutation(epoch)).tolist() for step in steps]
        assert len({index for batch in seen for index in batch}) == 16


def test_epochs_and_seeds_have_their_own_order():
    orders = {
        tuple(Order(num_pairs=50, batch_size=5, seed=seed).permutation(epoch))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_the_order_is_the_same_on_every_machine_and_release():
    order = Order(num_pairs=8, batch_size=4, seed=7)
    assert order.permutation(0).tolist() == [4, 3, 6, 2, 1, 0, 5, 7]
    assert order.permutation(1).tolist() == [7, 6, 1, 4, 3, 2, 5, 0]


def test_a_set_smaller_than_a_batch_goes_round_again():
    order = Order(num_pairs=3, batch_size=8, seed=0)
    counts = np.bincount(order.indices(0, order.permutation(0)))
    assert order.num_per_epoch == 1
    assert sorted(counts.tolist()) == [2, 3, 3]


def test_ranks_share_out_the_same_global_batch():
    whole = Order(num_pairs=21, batch_size=6, seed=1)
    ranks = [Order(num_pairs=21, batch_size=6, seed=1, rank=r, world_size=3) for r in range(3)]
    for step in range(9):
        permutation = whole.permutation(whole.epoch(step))
        parts = [rank.indices(step, permutation) for rank in ranks]
        assert [len(part) for part in parts] == [2, 2, 2]
        assert np.concatenate(parts).tolist() == whole.indices(step, permutation).tolist()


def test_validation_sees_every_pair_once_in_order():
    order = Order(num_pairs=7, batch_size=3, seed=1, shuffle=False, last="keep")
    seen = [order.indices(step, order.permutation(0)).tolist() for step in range(3)]
    assert order.num_per_epoch == 3
    assert seen == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"num_pairs": 0}, "num_pairs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be a positive multiple"),
        ({"batch_size": 3, "world_size": 2}, "multiple of world_size 2, got 3"),
        ({"rank": 1}, "rank must be 0 to 0, got 1"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"last": "keep", "world_size": 2}, "world_size 1"),
    ],
)
def test_an_impossible_order_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        Order(**{"num_pairs": 10, "batch_size": 4, "seed": 0, **wrong})


# --- batches


class NumberEncoder:
    """Encodes `picture 12 again` as its number and its count of words."""

    def encode(self, captions):
        words = [caption.split() for caption in captions]
        if any(len(parts) > 5 for parts in words):
            raise CaptionTooLong("a caption has 6 tokens; the limit is 5")
        return torch.tensor([[int(parts[1]), len(parts)] for parts in words])


def large(**options):
    """Options under which a data set counts as too large for memory."""
    return {"max_decoded_bytes": 0, **options}


@pytest.mark.parametrize("options", [{}, large(num_workers=0), large(num_workers=1)])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 warns of threads
def test_images_captions_and_tokens_of_a_batch_belong_together(tmp_path, options):
    dataset = open_folder(channel_of(tmp_path, 10, captions=2), image_size=SIZE)
    with Batches(dataset, batch_size=4, seed=1, tokenizer=NumberEncoder(), **options) as batches:
        assert isinstance(batches.dataset, InMemory) == (not options)
        for step in range(5):
            batch = batches.batch(step)
            assert batch.images.dtype == torch.float32
            assert batch.images.shape == (4, 3, SIZE, SIZE)
            assert batch.text_tokens.dtype == torch.int64
            assert pixel_numbers(batch) == caption_numbers(batch) == batch.indices.tolist()
            words = [len(caption.split()) for caption in batch.captions]
            assert batch.text_tokens[:, 0].tolist() == pixel_numbers(batch)
            assert batch.text_tokens[:, 1].tolist() == words


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_batch_depends_on_its_step_alone(tmp_path):
    dataset = open_folder(channel_of(tmp_path, 11, captions=3), image_size=SIZE)
    through = Batches(dataset, batch_size=4, seed=5)
    expected = [through.batch(step) for step in range(8)]
    resumed = Batches(dataset, batch_size=4, seed=5)
    with Batches(dataset, batch_size=4, seed=5, **large(num_workers=2)) as streamed:
        for step in (5, 6, 7, 0, 1):
            for batches in (resumed, streamed):
                batch = batches.batch(step)
                assert torch.equal(batch.images, expected[step].images)
                assert batch.captions == expected[step].captions


def test_images_are_in_the_unit_range(tmp_path):
    for number in (0, 255):
        put(tmp_path, str(number), encode_image(picture(number), "png"), b"picture %d" % number)
    batch = Batches(open_folder(tmp_path, image_size=SIZE), batch_size=2, seed=0).batch(0)
    assert sorted(batch.images.unique().tolist()) == [0.0, 1.0]


def test_a_pair_shows_all_its_captions_in_time(tmp_path):
    dataset = open_folder(channel_of(tmp_path, 2, captions=3), image_size=SIZE)
    batches = Batches(dataset, batch_size=2, seed=0)
    seen = {caption for step in range(30) for caption in batches.batch(step).captions}
    assert len(seen) == 6


def test_one_too_long_caption_stops_the_job_before_it_begins(tmp_path):
    dataset = open_folder(channel_of(tmp_path, 2, captions=5), image_size=SIZE)
    with pytest.raises(CaptionTooLong):
        Batches(dataset, batch_size=2, seed=0, tokenizer=NumberEncoder())


def test_taking_batches_leaves_the_global_random_state_alone(tmp_path):
    dataset = open_folder(channel_of(tmp_path, 4), image_size=SIZE)
    before = torch.get_rng_state()
    for options in ({}, large(num_workers=0)):
        with Batches(dataset, batch_size=2, seed=0, **options) as batches:
            batches.batch(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_may_be_changed_without_harm_to_the_next(tmp_path):
    batches = Batches(open_folder(channel_of(tmp_path, 4), image_size=SIZE), batch_size=4, seed=0)
    batches.batch(0).images.zero_()
    assert sorted(pixel_numbers(batches.batch(0))) == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_in_a_large_set_the_next_pair_stands_in_for_a_damaged_one(tmp_path, num_workers):
    folder = channel_of(tmp_path, 20)
    (folder / "003.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    dataset = open_folder(folder, image_size=SIZE)
    options = large(num_workers=num_workers)
    with Batches(dataset, batch_size=20, seed=0, tokenizer=NumberEncoder(), **options) as batches:
        for step in range(2):
            batch = batches.batch(step)
            numbers = pixel_numbers(batch)
            assert sorted(numbers) == sorted([*range(3), 4, *range(4, 20)])
            assert numbers == caption_numbers(batch) == batch.text_tokens[:, 0].tolist()
    assert dataset.skips.counts == {SkipReason.DAMAGED_IMAGE: 1}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_large_set_that_turns_out_bad_stops_the_job_with_the_reasons(tmp_path):
    folder = channel_of(tmp_path, 10)
    for number in range(4):
        (folder / f"00{number}.png").write_bytes(b"no")
    dataset = open_folder(folder, image_size=SIZE, max_bad_share=0.2)
    with (
        Batches(dataset, batch_size=10, seed=0, **large(num_workers=1)) as batches,
        pytest.raises(DataError, match="4 of 10 pairs cannot be used.*4 not an image"),
    ):
        batches.batch(0)


def test_a_file_that_vanishes_is_an_unreadable_one(tmp_path):
    folder = channel_of(tmp_path, 20)
    dataset = open_folder(folder, image_size=SIZE)
    (folder / "003.png").unlink()
    decoded = decode_if_small(dataset)
    assert len(decoded) == 19
    assert decoded.name(3) == "004.png"
    assert decoded.captions(3) == ("picture 4",)
    assert (decoded.image(3) == 4).all()
    assert dataset.skips.counts == {SkipReason.UNREADABLE: 1}


MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("batch_bytes", "shared_memory_bytes", "num_cpus", "expected"),
    [
        (12 * MIB, 8 * GIB, 8, LoaderSettings(4, "file_descriptor")),
        (12 * MIB, 8 * GIB, 2, LoaderSettings(1, "file_descriptor")),
        (12 * MIB, 8 * GIB, 1, LoaderSettings(0, "file_descriptor")),
        (MIB, 64 * MIB, 8, LoaderSettings(4, "file_system")),
        (10 * MIB, 64 * MIB, 8, LoaderSettings(1, "file_system")),
        (50 * MIB, 64 * MIB, 8, LoaderSettings(0, "file_system")),
        (MIB, 0, 8, LoaderSettings(0, "file_system")),
    ],
)
def test_workers_follow_the_machine(batch_bytes, shared_memory_bytes, num_cpus, expected):
    settings = loader_settings(
        batch_bytes, shared_memory_bytes=shared_memory_bytes, num_cpus=num_cpus
    )
    assert settings == expected
