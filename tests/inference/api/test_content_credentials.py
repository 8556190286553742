"""Signed manifests: what is refused before the port is bound, and what C2PA's own reader finds."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from PIL import Image

from dalle.errors import PlatformError, UserError
from dalle.manifest import Manifest
from inference.api import content_credentials
from inference.api.content_credentials import MAX_CHAIN_BYTES, read_credentials, signer
from inference.api.marks import DIGITAL_SOURCE_TYPE, mark_of
from inference.api.rendering import Candidate, GenerateResult, Preview, render_best, render_preview
from inference.settings import MARK_BYTES, read_settings
from tests.inference.api.certificates import Files, write

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


@pytest.fixture
def installed(monkeypatch):
    """The check that the packages are there finds them: reading files needs only one of them."""
    monkeypatch.setattr(content_credentials, "find_spec", lambda name: name)


def refused_files(files: Files, folder) -> dict[str, Files]:
    (folder / "other").mkdir()
    (folder / "empty.pem").write_bytes(b"")
    (folder / "large.pem").write_bytes(b"x" * (MAX_CHAIN_BYTES + 1))
    other = write(folder / "other")
    return {
        "DALLE_C2PA_CERTIFICATE .*absent.pem cannot be read: No such file": replace(
            files, certificate=folder / "absent.pem"
        ),
        "DALLE_C2PA_KEY .* cannot be read: Is a directory": replace(files, key=folder),
        "DALLE_C2PA_CERTIFICATE .* must hold PEM certificates": replace(
            files, certificate=files.key
        ),
        "DALLE_C2PA_KEY .* must hold a private key in PEM form": replace(
            files, key=files.certificate
        ),
        "DALLE_C2PA_KEY .*empty.pem must hold a private key": replace(
            files, key=folder / "empty.pem"
        ),
        "DALLE_C2PA_CERTIFICATE .* has more than 16,000 bytes": replace(
            files, certificate=folder / "large.pem"
        ),
        "DALLE_C2PA_KEY .* is not the key of the first certificate": replace(files, key=other.key),
    }


def test_files_that_cannot_be_used_are_refused_in_words(installed, tmp_path):
    files = write(tmp_path)
    assert read_credentials(files.certificate, files.key).algorithm == "es256"
    for says, wrong in refused_files(files, tmp_path).items():
        with pytest.raises(UserError, match=says):
            read_credentials(wrong.certificate, wrong.key)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"password": "secret"}, "DALLE_C2PA_KEY .* has a password; give a key without one"),
        ({"days": -1}, "DALLE_C2PA_CERTIFICATE .* is valid from .*, and today is"),
        ({"private": ec.generate_private_key(ec.SECP256K1())}, "must be a key on the curve P-256"),
    ],
)
def test_credentials_that_cannot_sign_are_refused_in_words(installed, tmp_path, fields, says):
    files = write(tmp_path, **fields)
    with pytest.raises(UserError, match=says):
        read_credentials(files.certificate, files.key)


@pytest.mark.parametrize(
    ("private", "algorithm"),
    [
        (ec.generate_private_key(ec.SECP384R1()), "es384"),
        (ec.generate_private_key(ec.SECP521R1()), "es512"),
        (rsa.generate_private_key(65537, 2048), "ps256"),
        (ed25519.Ed25519PrivateKey.generate(), "ed25519"),
    ],
)
def test_the_key_decides_the_algorithm(installed, tmp_path, private, algorithm):
    files = write(tmp_path, private)
    assert read_credentials(files.certificate, files.key).algorithm == algorithm


def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr(content_credentials, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"c2pa-python, .* pip install 'dalle-sagemaker\[sign\]'"):
        read_credentials(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"DALLE_C2PA_KEY": "k"}, "DALLE_C2PA_CERTIFICATE is missing: it goes with DALLE_C2PA_KEY"),
        ({"DALLE_C2PA_CERTIFICATE": "c"}, "DALLE_C2PA_KEY is missing"),
        (
            {"DALLE_C2PA_CERTIFICATE": "c", "DALLE_C2PA_KEY": "k", "DALLE_MARK": "off"},
            "DALLE_MARK must be on with DALLE_C2PA_CERTIFICATE, got 'off'",
        ),
    ],
)
def test_variables_that_do_not_go_together_are_refused(variables, says):
    with pytest.raises(UserError, match=says):
        read_settings(variables)


@pytest.fixture(scope="module")
def mark(tmp_path_factory):
    """What files say of a model, signed."""
    pytest.importorskip("c2pa", reason="needs the package c2pa-python")
    files = write(tmp_path_factory.mktemp("signer"))
    sign = signer(read_credentials(files.certificate, files.key))
    return replace(mark_of(Manifest(library_version="0.1.0"), sign), seed=7)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_c2pas_own_reader_finds_the_manifest_whole_and_the_pixels_unchanged(mark, format):
    import c2pa

    candidate = Candidate(3, -1.0, 0.5, 0.5, PIXELS, mark)
    unsigned = replace(candidate, mark=replace(mark, sign=None))
    signed, plain = (
        render_best(GenerateResult([each], "clip", 7, 1, 0.0, 0.0, 0.0), format)[0]
        for each in (candidate, unsigned)
    )
    with c2pa.Reader(f"image/{format}", io.BytesIO(signed)) as reader:
        read = json.loads(reader.json())
    (active,) = read["manifests"].values()
    (assertion,) = active["assertions"]
    (action,) = assertion["data"]["actions"]
    assert (action["action"], action["digitalSourceType"]) == ("c2pa.created", DIGITAL_SOURCE_TYPE)
    assert action["parameters"] == {"seed": 7, "candidate": 3}
    assert action["softwareAgent"]["version"].startswith("0.1.0 weights")
    assert active["claim_generator_info"][0]["name"] == "dalle-sagemaker"
    assert read["validation_state"] == "Valid"
    pixels = [np.asarray(Image.open(io.BytesIO(file))) for file in (signed, plain)]
    assert (pixels[0] == pixels[1]).all()
    assert DIGITAL_SOURCE_TYPE.encode() in signed.replace(b"\0", b"")
    limits = read_settings({"DALLE_C2PA_CERTIFICATE": "c", "DALLE_C2PA_KEY": "k"}).limits
    assert len(signed) - len(plain) < limits.mark_bytes - MARK_BYTES


def test_a_changed_file_is_found_out(mark):
    import c2pa

    candidate = Candidate(3, -1.0, 0.5, 0.5, PIXELS, mark)
    result = GenerateResult([candidate], "clip", 7, 1, 0.0, 0.0, 0.0)
    file = bytearray(render_best(result, "png")[0])
    file[file.index(b"IDAT") + 40] ^= 1
    with c2pa.Reader("image/png", io.BytesIO(bytes(file))) as reader:
        assert json.loads(reader.json())["validation_state"] == "Invalid"


def test_a_file_that_cannot_be_signed_any_more_is_a_503_with_the_reason(mark, monkeypatch):
    import c2pa

    def sign(*arguments: object) -> None:
        raise c2pa.C2paError("the certificate was not valid at time of signing")

    monkeypatch.setattr(c2pa.Builder, "sign", sign)
    result = GenerateResult([Candidate(3, -1.0, 0.5, 0.5, PIXELS, mark)], "clip", 7, 1, 0, 0, 0)
    with pytest.raises(PlatformError, match="cannot be signed: the certificate was not") as error:
        render_best(result, "png")
    assert error.value.status == 503


def test_previews_are_marked_but_not_signed(mark):
    unsigned = replace(mark, sign=None)
    images = [render_preview(Preview(0, 2, PIXELS, each), "png").image for each in (mark, unsigned)]
    assert images[0] == images[1]


def test_a_certificate_that_may_not_sign_is_refused_with_the_reason(tmp_path):
    pytest.importorskip("c2pa", reason="needs the package c2pa-python")
    files = write(tmp_path, is_authority=True)
    with pytest.raises(UserError, match="DALLE_C2PA_CERTIFICATE: a file cannot be signed: "):
        signer(read_credentials(files.certificate, files.key))
