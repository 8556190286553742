"""training.data.tools.check and findings: the doctor of channels, as a command."""

import json
import subprocess
import sys

import pytest

from dalle.preprocess.images import encode_image
from tests.training.pairs import SIZE, channel_of, members_of, picture, put, tar_of
from training.data.__main__ import main


def run(*arguments):
    return main(["doctor", *map(str, arguments), "--image-size", str(SIZE)])


def diagnosis(capsys, *arguments):
    status = run(*arguments, "--json")
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("layout", ["folder", "shards"])
def test_a_sound_channel_is_fit_for_training(tmp_path, capsys, layout):
    if layout == "folder":
        channel_of(tmp_path / "c", 20, captions=2)
    else:
        tar_of(tmp_path / "c" / "a.tar", members_of(range(20), captions=2))
    status, found = diagnosis(capsys, tmp_path / "c")
    assert status == 0
    assert found["is_fine"] is True
    (channel,) = found["channels"]
    assert (channel["num_pairs"], channel["num_captions"]) == (20, 40)
    assert channel["skipped"] == {}
    assert run(tmp_path / "c") == 0
    assert capsys.readouterr().out.endswith("fit for training\n")


def test_everything_that_training_would_skip_is_counted_by_its_name(tmp_path, capsys):
    folder = channel_of(tmp_path, 20)
    put(folder, "alone", text=b"a")
    put(folder, "x", b"no", b"a")
    put(folder, "y", encode_image(picture(99), "png"), b"caf\xe9")
    status, found = diagnosis(capsys, folder, "--max-bad-share", "0.2")
    assert status == 0
    (channel,) = found["channels"]
    assert channel["skipped"] == {
        "caption without image": 1,
        "not an image": 1,
        "caption file not UTF-8": 1,
    }
    assert channel["examples"]["not an image"] == ["x.png"]
    assert (channel["num_pairs"], channel["num_bad"]) == (20, 3)
    status, found = diagnosis(capsys, folder, "--max-bad-share", "0.1")
    assert status == 1
    (problem,) = found["problems"]
    assert problem.startswith("train: 3 of 23 pairs cannot be used")


def test_a_channel_without_one_good_image_is_unfit_whatever_the_share(tmp_path, capsys):
    put(tmp_path, "x", b"no", b"a")
    status, found = diagnosis(capsys, tmp_path, "--max-bad-share", "1")
    assert status == 1
    assert found["problems"] == ["train: not one image can be decoded: a job would fail"]


def test_a_channel_that_cannot_be_read_at_all_is_a_problem(tmp_path, capsys):
    tar_of(channel_of(tmp_path, 2) / "a.tar", members_of(range(3)))
    status, found = diagnosis(capsys, tmp_path)
    assert status == 1
    assert "tar shards or other files" in found["problems"][0]
    assert run(tmp_path) == 1
    assert "unreadable" in capsys.readouterr().out


def test_the_same_picture_under_another_name_or_format_is_found(tmp_path, capsys):
    folder = channel_of(tmp_path, 20)
    (folder / "again.webp").write_bytes(encode_image(picture(3), "png"))
    (folder / "again.txt").write_bytes(b"the same")
    status, found = diagnosis(capsys, folder)
    assert status == 0  # one of 21 is within the share
    assert found["channels"][0]["doubles"] == {"count": 1, "names": ["again.webp is 003.png"]}
    status, found = diagnosis(capsys, folder, "--max-bad-share", "0.01")
    assert status == 1
    assert "1 of 21 pictures are there more than once" in found["problems"][0]


def test_a_held_out_picture_that_is_trained_on_is_a_leak(tmp_path, capsys):
    train = channel_of(tmp_path / "train", 20)
    held_out = tmp_path / "validation"
    for number in (30, 31, 4):
        put(held_out, str(number), encode_image(picture(number), "png"), b"picture %d" % number)
    status, found = diagnosis(capsys, train, "--validation", held_out)
    assert status == 1
    assert found["leaks"] == {"count": 1, "names": ["4.png is 004.png"]}
    assert found["num_shared_captions"] == 1
    assert "1 of 3 pictures of validation are trained on too" in found["problems"][0]
    (held_out / "4.png").unlink()
    (held_out / "4.txt").unlink()
    assert diagnosis(capsys, train, "--validation", held_out)[0] == 0


def test_captions_that_training_would_refuse_are_named(tmp_path, capsys):
    folder = channel_of(tmp_path, 20)
    put(folder, "long", encode_image(picture(77), "png"), b"far " * 30)
    status, found = diagnosis(capsys, folder, "--text-length", "8", "--tokenizer-kind", "word")
    assert status == 1
    assert found["long_captions"]["count"] == 1
    assert found["long_captions"]["names"][0].startswith("train/long.png: caption must be at most")
    assert diagnosis(capsys, folder, "--text-length", "30", "--tokenizer-kind", "word")[0] == 0


@pytest.mark.parametrize(("how", "num_pairs"), [("cut", 21), ("skip", 20)])
def test_captions_that_the_job_is_to_cut_or_skip_are_counted_and_no_problem(
    tmp_path, capsys, how, num_pairs
):
    folder = channel_of(tmp_path, 20)
    put(folder, "long", encode_image(picture(77), "png"), b"far " * 30)
    options = ("--text-length", "8", "--tokenizer-kind", "word", "--long-captions", how)
    status, found = diagnosis(capsys, folder, *options)
    assert status == 0
    assert found["long_captions"]["count"] == 1
    assert found["channels"][0]["num_pairs"] == num_pairs


def test_a_channel_of_long_captions_alone_cannot_skip_them(tmp_path, capsys):
    put(tmp_path, "long", encode_image(picture(77), "png"), b"far " * 30)
    options = ("--text-length", "8", "--tokenizer-kind", "word", "--long-captions", "skip")
    status, found = diagnosis(capsys, tmp_path, *options)
    assert status == 1
    assert "every caption is longer than text_length=8" in found["problems"][0]


@pytest.mark.parametrize(
    ("command", "option", "value", "says"),
    [
        ("doctor", "--tokenizer-vocab-size", "100", "at least 258 with tokenizer_kind=bpe"),
        ("doctor", "--text-length", "0", "text_length must be"),
        ("doctor", "--image-size", "5000", "image_size must be"),
        ("doctor", "--long-captions", "drop", "long_captions must be"),
        ("doctor", "--max-bad-share", "5", "max_bad_share must be"),
        ("shard", "--max-bad-share", "nan", "max_bad_share must be"),
    ],
)
def test_settings_that_a_job_would_refuse_are_a_wrong_command(
    tmp_path, capsys, command, option, value, says
):
    channel_of(tmp_path / "c", 2)
    out = ["--out", str(tmp_path / "out")] if command == "shard" else []
    assert main([command, str(tmp_path / "c"), *out, option, value]) == 2
    assert says in capsys.readouterr().err


def test_the_page_holds_what_the_table_holds_and_escapes_names(tmp_path, capsys):
    folder = channel_of(tmp_path / "train", 20)
    put(folder, "<b>", text=b"a")
    page = tmp_path / "new" / "page.html"
    assert run(folder, "--html", page, "--validation", folder) == 1
    text, html = capsys.readouterr().out, page.read_text("utf-8")
    assert "&lt;b&gt;.txt" in html
    assert "<b>" not in html
    assert "src=" not in html
    for row in ("caption without image", "same picture again", "picture trained on too"):
        assert row in text
        assert row in html


def test_a_wrong_command_is_neither_fine_nor_bad(tmp_path):
    assert run(tmp_path / "missing") == 2
    with pytest.raises(SystemExit, match="2"):
        main(["doctor"])


def test_the_command_needs_no_torch_for_pictures(tmp_path):
    """On a laptop without torch everything is checked but the length of captions."""
    channel_of(tmp_path, 3)
    program = (
        "import sys; sys.modules['torch'] = None; from training.data.__main__ import main; "
        f"sys.exit(main(['doctor', {str(tmp_path)!r}]))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "not checked" in ended.stdout
