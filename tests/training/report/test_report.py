"""The report: complete without a network, and only about what the job did."""

import base64
import json
import math
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from html.parser import HTMLParser

import numpy as np
import pytest

from dalle.manifest import StageRecord
from dalle.preprocess.images import decode_image
from training.data.sources.channel import open_channel
from training.report.content import (
    CaptionAccuracy,
    CodebookUsage,
    DatasetSummary,
    Generated,
    Memorisation,
    Reconstructions,
    Report,
    Retrieval,
    read_curves,
)
from training.report.figures import Panel, plot_curves, plot_usage
from training.report.page import render_report, write_report

pytestmark = pytest.mark.slow

NOW = datetime(2026, 11, 22, 18, 5, tzinfo=UTC)
METHODS = {"greedy": 0.75, "single sample": 0.5, "best of 32": 0.875}


def picture(value, size=8):
    return np.full((size, size, 3), value, dtype=np.uint8)


def full_report(**changes):
    content = {
        "title": "Rainbow shapes",
        "generated_at": NOW,
        "notes": ["Two channels were read."],
        "stages": [
            StageRecord(
                stage="dvae",
                job_name="shapes-1",
                finished_at="2026-11-22T18:00:00+00:00",
                steps=3000,
                is_finished=True,
                wall_seconds=145.2,
                cpu_seconds=282,
                hyperparameters={},
                metrics={"loss": 0.0213},
                dataset_fingerprint="",
                dataset_counts={},
            )
        ],
        "curves": {
            "dvae/loss": [(step, 1 / (step + 1)) for step in range(100)],
            "dvae/validation_loss": [(0, 1.0), (50, 0.1), (99, math.nan)],
            "dvae/epoch": [(0, 0.0), (99, 3.0)],
        },
        "codebooks": [CodebookUsage(name="codebook 1", counts=np.array([4, 4, 0, 0]))],
        "reconstructions": Reconstructions(
            originals=[picture(10), picture(20)], reconstructions=[picture(11), picture(21)]
        ),
        "generated": [
            Generated(
                caption="big red star",
                images=[picture(1), picture(2)],
                scores=[0.93, 0.4],
                actual=picture(3),
                is_right=[True, False],
            )
        ],
        "accuracy": [
            CaptionAccuracy(
                scope="all held-out captions",
                num_captions=6451,
                overall=METHODS,
                per_attribute={"colour": METHODS, "shape": {"greedy": 0.625}},
            )
        ],
        "retrieval": Retrieval(top1=0.934, num_pairs=6451),
        "memorisation": Memorisation(share=0.047, num_captions=64, num_pictures=2765),
        "datasets": [
            DatasetSummary(
                channel="train",
                num_pairs=2765,
                num_captions=2770,
                image_size=32,
                fingerprint="ab" * 32,
                skipped={"truncated or damaged image": 2, "ignored file": 4},
                examples={"truncated or damaged image": ["a/17.png", "b/91.png"]},
            )
        ],
        "hyperparameters": {"batch_size": 64, "stage": "all"},
    }
    return Report(**{**content, **changes})


class Page(HTMLParser):
    """Text, headings, images and addresses of a page; fails on tags that do not match."""

    VOID = frozenset({"meta", "img", "br", "hr", "link"})

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.images, self.headings, self.ids = [], "", [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        for name in ("src", "href", "xlink:href"):
            assert values.get(name, "#").startswith(("#", "data:image/"))
        if tag == "img":
            self.images.append(base64.b64decode(values["src"].partition(",")[2]))
        self.ids += [values["id"]] if "id" in values else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and self.open[-1] != "style":
            self.text += f" {data.strip()}"
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_every_section_says_its_numbers():
    page = Page(render_report(full_report()))
    assert page.headings == [
        "Generated images",
        "Caption accuracy",
        "Reconstructions",
        "Codebook usage",
        "CLIP retrieval",
        "Training",
        "Data",
        "Hyperparameters",
    ]
    for text in (
        "2026-11-22 18:05 UTC",
        "Two channels were read.",
        "Caption accuracy, greedy 0.750 all held-out captions (6,451), ± 0.005; single sample 0.5",
        "colour 0.750 0.500 0.875",
        "shape 0.625 – –",
        "2 of 4 entries, perplexity 2",
        "2 min 25 s 4 min 42 s loss 0.0213 shapes-1",
        "2,770 captions; 2 skipped",
        "truncated or damaged image 2 a/17.png, b/91.png",
        "among 6,451; chance is 0.0002",
        "Memorised 0.047 of 64 images, one a caption: nearer to another caption's training picture",
        "batch_size 64",
    ):
        assert text in re.sub(r"\s+", " ", page.text)


def test_pictures_are_embedded_exactly():
    page = Page(render_report(full_report()))
    first_pixels = [decode_image(data, what="img").getpixel((4, 4))[0] for data in page.images]
    assert first_pixels == [3, 1, 2, 10, 20]
    assert decode_image(page.images[3], what="img").getpixel((4, 13)) == (11, 11, 11)


def test_the_nearest_training_picture_stands_between_the_real_one_and_the_generated_ones():
    row = Generated(
        caption="a",
        images=[picture(1)],
        scores=[0.5],
        actual=picture(3),
        nearest=picture(7),
        nearest_caption="another",
    )
    html = render_report(full_report(generated=[row], reconstructions=None))
    page = Page(html)
    first_pixels = [decode_image(data, what="img").getpixel((4, 4))[0] for data in page.images]
    assert first_pixels == [3, 7, 1]
    assert 'alt="nearest training picture: another"' in html
    assert "the second is the training picture that is nearest" in page.text


def test_the_step_whose_weights_were_kept_is_told_and_marked():
    (last,) = full_report().stages
    kept = last.model_copy(update={"kept_step": 50})
    page = Page(render_report(full_report(stages=[kept])))
    assert "3,000, kept 50 2 min 25 s" in page.text
    assert "The dashed line is the step whose weights were kept" in page.text
    assert "dashed line is the step" not in Page(render_report(full_report())).text
    curves = {"validation": [(0, 1.0), (50, 0.1)]}
    marked, plain = (plot_curves([Panel("loss", curves, step)]) for step in (50, None))
    assert marked.count("stroke-dasharray") == plain.count("stroke-dasharray") + 1


def test_small_pictures_are_shown_as_squares_by_whole_factors():
    text = render_report(full_report())
    assert text.count('<img class="pixelated" width="160"') == 5  # 8 pixels; 10 with the borders
    assert "image-rendering: pixelated" in text


def test_large_pictures_are_embedded_small():
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    blurred = (noise // 16 + 100).astype(np.uint8)
    row = Generated(caption="x", images=[blurred], scores=[0.1])
    page = Page(render_report(full_report(generated=[row], reconstructions=None)))
    assert page.images[0][8:12] == b"WEBP"


def test_nothing_is_fetched_and_no_two_charts_clash():
    html = render_report(full_report())
    page = Page(html)  # which looks at every address
    assert not re.search(r"@import|url\(\s*[\"']?(?!#)|<script|<link", html)
    shared_glyphs = [name for name in page.ids if "-" not in name]
    assert len(set(shared_glyphs)) == len(shared_glyphs)


def test_a_job_that_trained_only_the_dvae_reports_just_that():
    whole = full_report()
    report = Report(title="dvae", generated_at=NOW, stages=whole.stages, codebooks=whole.codebooks)
    page = Page(render_report(report))
    assert page.headings == ["Codebook usage", "Training"]
    assert "accuracy" not in page.text


def test_an_empty_report_is_still_a_page():
    assert Page(render_report(Report(title="nothing", generated_at=NOW))).headings == []


def test_captions_names_and_values_cannot_become_markup():
    evil = '<script>alert("1")</script>&'
    html = render_report(
        full_report(
            title=evil,
            notes=[evil],
            generated=[Generated(caption=evil, images=[picture(1)], scores=[0.5])],
            hyperparameters={evil: evil},
            curves={f"dvae/{evil}": [(0, 1.0), (1, 2.0)]},
            datasets=[
                DatasetSummary(
                    channel=evil,
                    num_pairs=1,
                    num_captions=1,
                    image_size=8,
                    fingerprint=evil,
                    skipped={evil: 1},
                    examples={evil: [evil]},
                )
            ],
        )
    )
    assert "<script" not in html
    assert Page(html).text.count("alert(") >= 6


def test_charts_take_their_colours_from_the_page_and_bear_odd_curves():
    panels = [
        Panel("loss", {"training": [(step, 1 / (step + 1)) for step in range(200)]}),
        Panel("one point", {"training": [(5, 0.5)]}),
        Panel("nothing finite", {"training": [(0, math.nan), (1, math.inf)]}),
        Panel("a cost of $\\oops$", {"training": [(0, 0.0), (1, -1.0)], "validation": []}),
    ]
    for svg in (plot_curves(panels), plot_usage({"all unused": np.zeros(4, dtype=np.int64)})):
        Page(svg)
        assert "var(--ink)" in svg
        assert "#01010" not in svg


def test_drawing_writes_nothing_into_the_home_directory(tmp_path):
    code = (
        "from training.report.figures import Panel, plot_curves\n"
        "plot_curves([Panel('loss', {'training': [(0, 1.0), (1, 0.5)]})])\n"
        "import sys; assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    kept = {name: value for name, value in os.environ.items() if name != "MPLCONFIGDIR"}
    paths = os.pathsep.join(path for path in sys.path if path)
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    home.mkdir()
    scratch.mkdir()
    environment = kept | {"HOME": str(home), "TMPDIR": str(scratch), "PYTHONPATH": paths}
    environment |= {"XDG_CONFIG_HOME": str(home / "c"), "XDG_CACHE_HOME": str(home / "d")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert list(home.iterdir()) == []
    assert list(scratch.iterdir()) == []


def test_a_report_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "output" / "report.html"
    write_report(full_report(), path)
    before = path.read_text("utf-8")
    mismatch = Generated(caption="x", images=[picture(1)], scores=[])
    with pytest.raises(ValueError, match="zip"):
        write_report(full_report(generated=[mismatch]), path)
    assert path.read_text("utf-8") == before
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_a_caption_with_half_a_surrogate_does_not_stop_the_report(tmp_path):
    row = Generated(caption="caf\udce9", images=[picture(1)], scores=[0.5])
    write_report(full_report(generated=[row]), tmp_path / "report.html")
    assert "caf\\udce9" in (tmp_path / "report.html").read_text("utf-8")


def test_curves_are_read_back_and_a_resumed_job_overwrites_its_steps(tmp_path):
    lines = [
        {"stage": "dvae", "step": 1, "loss": 5, "note": "hot", "is_resumed": False},
        {"stage": "dvae", "step": 2, "loss": 4.0, "dvae_validation_loss": 4.5},
        {"stage": "clip", "step": 1, "loss": 0.5, "accuracy": None},
        {"stage": "dvae", "step": 2, "loss": 3.0},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n[1]\n{"stage": "dvae", "step": 3, "lo'
    (tmp_path / "metrics.jsonl").write_text(text, "utf-8")
    assert read_curves(tmp_path / "metrics.jsonl") == {
        "dvae/loss": [(1, 5.0), (2, 3.0)],
        "dvae/validation_loss": [(2, 4.5)],
        "clip/loss": [(1, 0.5)],
    }
    assert read_curves(tmp_path / "absent.jsonl") == {}


def test_a_data_set_sums_itself_up(tmp_path):
    (tmp_path / "a.txt").write_text("x\ny")
    (tmp_path / "b.txt").write_text("alone")
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "a.png").write_bytes(b"not looked at yet")
    summary = DatasetSummary.of(open_channel(tmp_path, image_size=8, max_bad_share=0.5))
    assert (summary.num_pairs, summary.num_captions, summary.num_bad) == (1, 2, 1)
    assert summary.examples["caption without image"] == ["b.txt"]


def test_codebook_numbers_are_right_at_the_extremes():
    uniform = CodebookUsage(name="a", counts=np.full(16, 7))
    single = CodebookUsage(name="b", counts=np.array([9, 0, 0, 0]))
    unused = CodebookUsage(name="c", counts=np.zeros(4, dtype=np.int64))
    assert (uniform.used_share, round(uniform.perplexity, 6)) == (1.0, 16.0)
    assert (single.used_share, single.perplexity) == (0.25, 1.0)
    assert unused.used_share == 0.0


def test_a_run_that_was_stopped_is_said_to_be():
    (finished,) = full_report().stages
    run = {"stage": "clip", "job_name": "shapes-2", "steps": 41}
    record = finished.model_copy(update={**run, "wall_seconds": 1.5, "cpu_seconds": 2.5})
    stopped = record.model_copy(update={"is_finished": False})
    page = Page(render_report(full_report(stages=[stopped])))
    assert "clip 41 1.5 s 2.5 s loss 0.0213 shapes-2, stopped early" in page.text
    assert "stopped" not in Page(render_report(full_report(stages=[record]))).text
