"""What a generated file says of its origin, read back by Pillow and, where it is, by exiftool."""

import base64
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from dalle.errors import UserError
from dalle.manifest import Manifest, StageRecord
from dalle.preprocess.images import encode_image
from inference.api.marks import DIGITAL_SOURCE_TYPE, NAMESPACE, mark_of
from inference.api.rendering import Candidate, GenerateResult, Preview, render_best, render_preview
from inference.settings import MARK_BYTES, read_settings

FORMATS = ["png", "jpeg", "webp"]
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
EXTENSION = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
RECORD = StageRecord(
    stage="transformer",
    job_name='stars {0} & "bars" <b>',
    finished_at="",
    steps=1,
    is_finished=True,
    wall_seconds=1.0,
    cpu_seconds=1.0,
    hyperparameters={},
    metrics={},
    dataset_fingerprint="",
    dataset_counts={},
)
MANIFEST = Manifest(library_version="0.1.0", stages=[RECORD], files={"dvae/config.json": "ab"})


def file_of(format: Any, *, seed: int = 7, number: int = 3, manifest: Manifest = MANIFEST) -> bytes:
    mark = replace(mark_of(manifest), seed=seed)
    candidate = Candidate(number, -1.0, 0.5, 0.5, PIXELS, mark)
    return render_best(GenerateResult([candidate], "clip", seed, 1, 0.0, 0.0, 0.0), format)[0]


def packet(file: bytes) -> str:
    with Image.open(io.BytesIO(file)) as image:
        xmp = image.info["xmp"]
    return xmp.decode() if isinstance(xmp, bytes) else xmp


def facts(file: bytes) -> dict[str, str]:
    (description,) = ElementTree.fromstring(packet(file)).iter(
        "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
    )
    return dict(description.attrib)


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_says_that_a_model_made_it_which_one_and_by_which_seed(format):
    said = facts(file_of(format))
    assert said[f"{EXTENSION}DigitalSourceType"] == DIGITAL_SOURCE_TYPE
    assert said[f"{EXTENSION}AISystemUsed"] == f"dalle-sagemaker {RECORD.job_name}"
    assert re.fullmatch(r"0\.1\.0 weights [0-9a-f]{12}", said[f"{EXTENSION}AISystemVersionUsed"])
    assert (said[f"{{{NAMESPACE}}}seed"], said[f"{{{NAMESPACE}}}candidate"]) == ("7", "3")


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="needs libimage-exiftool-perl")
@pytest.mark.parametrize("format", FORMATS)
def test_exiftool_reads_a_mark(format, tmp_path):
    path = tmp_path / f"x.{format}"
    path.write_bytes(file_of(format))
    command = ["exiftool", "-json", "-XMP:all", "-validate", "-warning", path]
    (said,) = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    # Newer versions of exiftool show the type's name for its address.
    assert "rained" in said["DigitalSourceType"]
    assert (str(said["Seed"]), str(said["Candidate"])) == ("7", "3")
    assert "Warning" not in said


@pytest.mark.parametrize("format", FORMATS)
def test_a_mark_changes_no_pixel(format):
    marked, plain = (
        np.asarray(Image.open(io.BytesIO(file)))
        for file in (file_of(format), encode_image(PIXELS, format))
    )
    assert (marked == plain).all()


@pytest.mark.parametrize("format", FORMATS)
def test_files_of_equal_seeds_are_equal_to_the_byte_and_others_differ(format):
    assert file_of(format) == file_of(format)
    assert file_of(format) != file_of(format, seed=8)
    assert file_of(format) != file_of(format, number=4)
    assert file_of(format) != file_of(format, manifest=Manifest(files={"dvae/config.json": "cd"}))


def test_an_unfinished_picture_is_marked_too():
    line = render_preview(Preview(0, 2, PIXELS, mark_of(MANIFEST)), "png")
    assert DIGITAL_SOURCE_TYPE in packet(base64.b64decode(line.image))


def test_what_xml_cannot_hold_is_left_out():
    manifest = MANIFEST.model_copy(update={"library_version": "1.0\u0001\ud800 b"})
    assert facts(file_of("png", manifest=manifest))[f"{EXTENSION}AISystemVersionUsed"].startswith(
        "1.0 b weights"
    )


def test_a_file_without_a_mark_says_nothing():
    candidate = Candidate(0, -1.0, 0.5, 0.5, PIXELS)
    file = render_best(GenerateResult([candidate], "clip", 7, 1, 0.0, 0.0, 0.0), "png")[0]
    assert file == encode_image(PIXELS, "png")


@pytest.mark.parametrize("format", FORMATS)
def test_a_mark_takes_no_more_bytes_than_the_reply_limit_reserves(format):
    record = RECORD.model_copy(update={"job_name": "<>\"'&" * 100})
    long = Manifest(library_version="0" * 500, stages=[record])
    file = file_of(format, manifest=long, seed=2**53 - 1, number=511)
    assert len(file) - len(encode_image(PIXELS, format)) <= MARK_BYTES


def test_marks_are_on_unless_a_variable_turns_them_off():
    assert read_settings({}).mark
    assert not read_settings({"DALLE_MARK": "off"}).mark
    assert read_settings({"DALLE_MARK": "off"}).limits.mark_bytes == 0
    with pytest.raises(UserError, match="DALLE_MARK must be on or off, got 'no'"):
        read_settings({"DALLE_MARK": "no"})
