"""Signed C2PA manifests (Content Credentials) in generated files, by the operator's certificate.

    read_credentials  before the port is bound: certificate and key are read, and belong together
    signer            in the process that serves: a file is signed once, to try

The package `c2pa-python` is optional, and imported here alone.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle.errors import PlatformError, UserError
from dalle.versions import OURS, installed

if TYPE_CHECKING:
    from inference.api.rendering import Sign

CERTIFICATE, KEY = "DALLE_C2PA_CERTIFICATE", "DALLE_C2PA_KEY"
SIGNATURE_BYTES = 40_000  # of a file, at most; with a chain of two certificates it takes 3,100
MAX_CHAIN_BYTES = 16_000
_CANNOT = "a file cannot be signed"
_PACKAGES = ("c2pa", "cryptography")

# Nothing is fetched, neither time stamps nor revocation lists. No thumbnail: the files are small.
_SETTINGS = {
    "builder": {"thumbnail": {"enabled": False}},
    "verify": {"verify_after_sign": False, "ocsp_fetch": False, "remote_manifest_fetch": False},
}


@dataclass(frozen=True, slots=True)
class Credentials:
    """What files are signed with. chain: PEM, the signer's own certificate first."""

    chain: bytes
    key: bytes = field(repr=False)
    algorithm: str


def read_credentials(certificate: Path, key: Path) -> Credentials:
    """Return a certificate chain and its private key from two PEM files.

    Raises `UserError` for a file that cannot be read or is no such thing, a key of another
    certificate or of a kind that C2PA has not, a certificate out of date, and missing packages.
    """
    if not all(map(find_spec, _PACKAGES)):
        raise UserError(
            f"{CERTIFICATE} needs the package c2pa-python, which is not installed: "
            f"pip install '{OURS}[sign]'"
        )
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    chain, secret = _read(CERTIFICATE, certificate), _read(KEY, key)
    try:
        own = x509.load_pem_x509_certificates(chain)[0]
    except ValueError as error:
        raise UserError(
            f"{CERTIFICATE} {certificate} must hold PEM certificates, the signer's own first: "
            f"{error}"
        ) from None
    try:
        private = serialization.load_pem_private_key(secret, password=None)
    except TypeError:
        raise UserError(f"{KEY} {key} has a password; give a key without one") from None
    except (ValueError, UnsupportedAlgorithm):
        raise UserError(f"{KEY} {key} must hold a private key in PEM form") from None
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if private.public_key().public_bytes(*form) != own.public_key().public_bytes(*form):
        raise UserError(f"{KEY} {key} is not the key of the first certificate in {certificate}")
    now = datetime.now(UTC)
    if not own.not_valid_before_utc <= now <= own.not_valid_after_utc:
        raise UserError(
            f"{CERTIFICATE} {certificate} is valid from {own.not_valid_before_utc:%Y-%m-%d} to "
            f"{own.not_valid_after_utc:%Y-%m-%d}, and today is {now:%Y-%m-%d}"
        )
    return Credentials(chain, secret, _algorithm(private, key))


def _read(variable: str, path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CHAIN_BYTES + 1)
    except OSError as error:
        raise UserError(f"{variable} {path} cannot be read: {error.strerror}") from error
    if len(content) > MAX_CHAIN_BYTES:
        raise UserError(f"{variable} {path} has more than {MAX_CHAIN_BYTES:,} bytes")
    return content


def _algorithm(private: Any, path: Path) -> str:
    """Return C2PA's name of the algorithm that suits a private key."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(private, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(private, rsa.RSAPrivateKey) and private.key_size >= 2048:
        return "ps256"
    curves = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
    if isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.name in curves:
        return curves[private.curve.name]
    raise UserError(
        f"{KEY} {path} must be a key on the curve P-256, P-384 or P-521, of Ed25519, or of RSA "
        "with 2,048 bits or more"
    )


def signer(credentials: Credentials) -> Callable[[str, str], Sign]:
    """Return a function: name and version of a model -> what signs files of its images.

    What it returns may be called by any thread, and raises `PlatformError` when a file cannot be
    signed, as after the end of the certificate. Raises `UserError` when a file cannot be signed:
    the certificate is not one that C2PA allows to sign.
    """
    import c2pa

    from inference.api.marks import DIGITAL_SOURCE_TYPE

    context = c2pa.Context(c2pa.Settings.from_dict(_SETTINGS))
    info = c2pa.C2paSignerInfo(credentials.algorithm, credentials.chain, credentials.key, None)
    lock = threading.Lock()  # the library does not say that a signer may be shared
    tool = {"name": OURS, "version": installed(OURS) or "0"}

    def sign(name: str, version: str, file: bytes, format: str, seed: int, candidate: int) -> bytes:
        created = {
            "action": "c2pa.created",
            "digitalSourceType": DIGITAL_SOURCE_TYPE,
            "softwareAgent": {"name": name, "version": version},
            "parameters": {"seed": seed, "candidate": candidate},
        }
        manifest = {
            "claim_generator_info": [tool],
            "format": f"image/{format}",
            "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [created]}}],
        }
        signed = io.BytesIO()
        try:
            with lock, c2pa.Builder(manifest, context) as builder:
                builder.sign(by, f"image/{format}", io.BytesIO(file), signed)
        except c2pa.C2paError as error:  # such as a certificate that has gone out of date
            raise PlatformError(f"{_CANNOT}: {error}") from error
        return signed.getvalue()

    def of_model(name: str, version: str) -> Sign:
        return lambda file, format, seed, number: sign(name, version, file, format, seed, number)

    try:
        by = c2pa.Signer.from_info(info)
        sign(OURS, "", _trial(), "png", 0, 0)
    except (c2pa.C2paError, PlatformError) as error:
        raise UserError(
            f"{CERTIFICATE}: {_CANNOT}: {error.__cause__ or error}; C2PA asks for a certificate of "
            "an authority that allows digital signatures, for e-mail protection or documents"
        ) from error
    return of_model


def _trial() -> bytes:
    """Return a PNG of one pixel."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, format="PNG")
    return file.getvalue()
