"""Certificates of nodes and their private keys: making, reading, expiry."""

from __future__ import annotations

import datetime
import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jwins.errors import ConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

DAYS = 365
"""Default validity of a new certificate."""

SKEW = datetime.timedelta(hours=1)
"""A new certificate is valid from this time before it was made, for machines whose clocks are behind."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


@dataclass(frozen=True, slots=True)
class Certificate:
    """Content of an X.509 certificate.

    Attributes:
        name: common name of its subject.
        fingerprint: SHA-256 of its DER bytes, 64 hexadecimal digits.
        not_before: start of its validity, UTC.
        not_after: end of its validity, UTC.
        public_key: DER bytes of its public key.
    """

    pem: str
    name: str
    fingerprint: str
    not_before: datetime.datetime
    not_after: datetime.datetime
    public_key: bytes

    def problem(self, now: datetime.datetime | None = None) -> str | None:
        """Return the reason why peers refuse the certificate at ``now``, or None."""
        now = now or datetime.datetime.now(datetime.UTC)
        if now > self.not_after:
            return f"expired on {self.not_after:%Y-%m-%d %H:%M} UTC"
        if now < self.not_before:
            return f"not valid before {self.not_before:%Y-%m-%d %H:%M} UTC, and it is {now:%Y-%m-%d %H:%M} here"
        return None


def fingerprint_of(der: bytes) -> str:
    """Return the SHA-256 of a certificate's DER bytes as 64 hexadecimal digits."""
    return hashlib.sha256(der).hexdigest()


def check_name(path: str, name: str) -> None:
    """Raise a ConfigError unless ``name`` is valid as the name of a node, a file and a certificate."""
    if not _NAME.fullmatch(name):
        problem = "expected up to 63 letters, digits, dots, hyphens and underscores, a letter or digit first"
        raise ConfigError(path, name, problem)


def new_identity(name: str, folder: Path, days: int = DAYS) -> tuple[Path, Path, Certificate]:
    """Make a key (ECDSA on P-256, mode 0600) and a certificate signed with it.

    Returns:
        The files of key and certificate, and the certificate's content.

    Raises:
        ConfigError: not a name, no such folder, or one of the files is there already.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    check_name("NAME", name)
    if not 1 <= days <= 36500:
        raise ConfigError("--days", days, "expected a number of days from 1 to 36500")
    if not folder.is_dir():
        raise ConfigError("--folder", str(folder), "there is no such folder; make it first")
    key_file, certificate_file = folder / f"{name}.key", folder / f"{name}.crt"
    for file in (key_file, certificate_file):
        if os.path.lexists(file):
            raise ConfigError(
                str(file), name, "exists already and is not overwritten; choose another name, or move it away"
            )
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _self_signed(name, key, days)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _write_new(key_file, private, 0o600)
    _write_new(certificate_file, certificate.pem.encode(), 0o644)
    return key_file, certificate_file, certificate


def renewed(name: str, key_file: Path, days: int = DAYS) -> Certificate:
    """Make another certificate for an existing key.

    Raises:
        ConfigError: the key cannot be used, or is not one on P-256.
    """
    from cryptography.hazmat.primitives.asymmetric import ec

    key = _load_key(key_file)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            str(key_file), type(key).__name__, "expected an ECDSA key, as `jwins keys new` makes them"
        )
    return _self_signed(name, key, days)


def _self_signed(name: str, key: ec.EllipticCurvePrivateKey, days: int) -> Certificate:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    only_signs = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(only_signs, critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return read_certificate(made.public_bytes(serialization.Encoding.PEM).decode(), name)


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Write a new file, without following a link or overwriting; its permissions are at most ``mode``."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def read_certificate(pem: str, where: str) -> Certificate:
    """Read one certificate from a text; errors name it ``where``.

    Raises:
        ConfigError: there is no certificate, or more than one.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.x509.oid import NameOID

    begins = pem.count("-----BEGIN ")
    if begins != 1 or "-----BEGIN CERTIFICATE-----" not in pem:
        found = "a private key" if "PRIVATE KEY" in pem else f"{begins} PEM blocks"
        raise ConfigError(where, found, "expected one certificate in PEM form, as in the file NAME.crt")
    try:
        parsed = x509.load_pem_x509_certificate(pem.encode())
        names = parsed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        der = parsed.public_bytes(serialization.Encoding.DER)
        public = parsed.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    except Exception as error:  # the parser may raise anything on damaged bytes
        raise ConfigError(where, pem[:60], f"not a certificate that can be read ({error})") from None
    return Certificate(
        pem=parsed.public_bytes(serialization.Encoding.PEM).decode(),
        name=str(names[0].value) if names else "",
        fingerprint=fingerprint_of(der),
        not_before=parsed.not_valid_before_utc,
        not_after=parsed.not_valid_after_utc,
        public_key=public,
    )


def certificate_in(path: Path) -> Certificate:
    """Read the certificate in a file.

    Raises:
        ConfigError: the file does not exist, or does not hold exactly one certificate.
    """
    try:
        text = path.read_bytes().decode(errors="replace")
    except OSError as error:
        raise ConfigError("certificate", str(path), f"cannot be read ({error.strerror})") from None
    return read_certificate(text, str(path))


def read_key(path: Path) -> bytes:
    """Return the public key, as DER bytes, of the private key in a file.

    Raises:
        ConfigError: the file does not exist, other users may read it, it has a passphrase, or it holds no
            private key.
    """
    from cryptography.hazmat.primitives import serialization

    return (
        _load_key(path)
        .public_key()
        .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def sign(key_file: Path, data: bytes) -> bytes:
    """Return the signature of ``data`` with the private key in a file.

    Raises:
        ConfigError: as for :func:`read_key`.
    """
    key: Any = _load_key(key_file)
    return bytes(key.sign(data, *_scheme(key)))


def is_signature(signature: bytes, data: bytes, public_key: bytes) -> bool:
    """Return whether a signature of ``data`` was made with the private key of a public one, DER bytes."""
    from cryptography.hazmat.primitives.serialization import load_der_public_key

    try:
        key: Any = load_der_public_key(public_key)
        key.verify(signature, data, *_scheme(key))
    except Exception:  # not only InvalidSignature: a member's key may be of a kind that cannot sign
        return False
    return True


def _scheme(key: Any) -> tuple[Any, ...]:
    """Return the arguments by which this kind of key signs and verifies."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

    if isinstance(key, ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey):
        return (ec.ECDSA(hashes.SHA256()),)
    if isinstance(key, rsa.RSAPrivateKey | rsa.RSAPublicKey):
        return (padding.PKCS1v15(), hashes.SHA256())
    return ()  # Ed25519 and Ed448


def _load_key(path: Path) -> PrivateKeyTypes:
    from cryptography.hazmat.primitives import serialization

    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        data = path.read_bytes()
    except OSError as error:
        problem = f"cannot be read ({error.strerror}); `jwins keys new NAME` makes a key"
        raise ConfigError("key", str(path), problem) from None
    if mode & 0o077:
        raise ConfigError(
            "key", str(path), f"others may read it (mode {mode:04o}); run `chmod 600 {path}`, or make a new key"
        )
    try:
        return serialization.load_pem_private_key(data, password=None)
    except TypeError:
        raise ConfigError("key", str(path), "has a passphrase; a node needs a key without one") from None
    except Exception as error:
        raise ConfigError("key", str(path), f"not a private key in PEM form ({error})") from None
