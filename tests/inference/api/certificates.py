"""Certificates and keys for tests: an authority's, and a signer's below it."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID


@dataclass(frozen=True)
class Files:
    certificate: Path
    key: Path


def name(common: str) -> x509.Name:
    parts = {NameOID.ORGANIZATION_NAME: "Test", NameOID.COMMON_NAME: common}
    return x509.Name([x509.NameAttribute(oid, text) for oid, text in parts.items()])


def usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def certificate(
    subject: str, public: Any, issuer: str, issuer_key: Any, *, days: int, is_authority: bool
) -> x509.Certificate:
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=9))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
        .add_extension(usage(signs_certificates=is_authority), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
    )
    if not is_authority:
        purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(purpose, critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def write(
    folder: Path,
    private: Any = None,
    *,
    days: int = 9,
    is_authority: bool = False,
    password: str = "",
) -> Files:
    """Write the chain and the key of a signer.

    days: that its certificate is valid from now; is_authority: it may sign certificates, not files.
    """
    authority = ec.generate_private_key(ec.SECP256R1())
    private = private or ec.generate_private_key(ec.SECP256R1())
    own = certificate(
        *("signer", private.public_key(), "authority", authority),
        days=days,
        is_authority=is_authority,
    )
    above = certificate(
        *("authority", authority.public_key(), "authority", authority), days=9, is_authority=True
    )
    form = serialization.Encoding.PEM
    files = Files(folder / "chain.pem", folder / "key.pem")
    files.certificate.write_bytes(own.public_bytes(form) + above.public_bytes(form))
    secret: Any = serialization.NoEncryption()
    if password:
        secret = serialization.BestAvailableEncryption(password.encode())
    files.key.write_bytes(private.private_bytes(form, serialization.PrivateFormat.PKCS8, secret))
    return files
