"""TLS 1.3 with certificates on both sides, and texts of its errors."""

from __future__ import annotations

import socket
import ssl
import tempfile
from dataclasses import dataclass
from pathlib import Path

from jwins.errors import ConfigError, PeerError
from jwins.net.certificate import fingerprint_of, read_key
from jwins.net.roster import Member, Roster


@dataclass(frozen=True, slots=True)
class Contexts:
    """TLS contexts to accept and to dial.

    Attributes:
        server: context of connections that others dial.
        client: context of connections that this node dials.
    """

    server: ssl.SSLContext
    client: ssl.SSLContext

    @staticmethod
    def of(roster: Roster, member: Member, key_file: Path) -> Contexts:
        """Return the contexts of a member; all certificates of the roster are trust anchors.

        Trust anchors alone do not identify the other end: a member could sign a certificate for another.
        Compare :func:`presented_fingerprint` on every connection.

        Raises:
            ConfigError: the key does not belong to the member's certificate, or the certificate is not valid
                now.
        """
        certificate = member.x509
        if read_key(key_file) != certificate.public_key:
            problem = (
                f"is not the key of {member.name}'s certificate in the roster; pass the right one, or add its "
            )
            raise ConfigError("key", str(key_file), problem + "certificate with `jwins roster add --replace`")
        if (why := certificate.problem()) is not None:
            remedy = f"make a new one with `jwins keys renew {member.name}` and give it to the others"
            raise ConfigError("certificate", member.name, f"{why}; {remedy}")
        anchors = "".join(other.x509.pem for other in roster.members)
        sides = ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT
        # The library takes certificates from files only.
        with tempfile.NamedTemporaryFile("w", suffix=".crt") as file:
            file.write(certificate.pem)
            file.flush()
            return Contexts(*(_context(side, anchors, Path(file.name), key_file) for side in sides))


def _context(side: int, anchors: str, certificate_file: Path, key_file: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # names are not what identifies a member
    context.verify_mode = ssl.CERT_REQUIRED
    # Certificates that an authority issued are anchors, too.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    if side == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # no resumption: every connection presents its certificate
    context.load_verify_locations(cadata=anchors)
    context.load_cert_chain(certificate_file, key_file)
    return context


def presented_fingerprint(ssl_object: ssl.SSLObject) -> str:
    """Return the fingerprint of the certificate at the other end.

    Raises:
        PeerError: no certificate was presented.
    """
    der = ssl_object.getpeercert(binary_form=True)
    if der is None:
        raise PeerError("no certificate was presented")
    return fingerprint_of(der)


_NOT_ACCEPTED = (
    "ALERT_UNKNOWN_CA",
    "ALERT_BAD_CERTIFICATE",
    "ALERT_CERTIFICATE_UNKNOWN",
    "ALERT_DECRYPT_ERROR",
)


def in_words(error: BaseException) -> str:
    """Return the reason of a failed connection as text for a log, without a full stop."""
    if isinstance(error, PeerError):
        return str(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code == 10:
            return "its certificate has expired"
        if error.verify_code == 9:
            return "its certificate is not valid yet: one of the two clocks is wrong"
        return f"its certificate is not in the roster ({error.verify_message})"
    if isinstance(error, ssl.SSLError):
        reason = str(error.reason or error)
        if "CERTIFICATE_REQUIRED" in reason or "PEER_DID_NOT_RETURN" in reason:
            return "no certificate was presented"
        if "CERTIFICATE_EXPIRED" in reason:
            return "it says that our certificate has expired"
        if any(alert in reason for alert in _NOT_ACCEPTED):
            return "it does not accept our certificate: its roster has another one, or none"
        if "UNSUPPORTED_PROTOCOL" in reason or "PROTOCOL_VERSION" in reason or "VERSION_TOO_LOW" in reason:
            return "it does not speak TLS 1.3"
        if "HTTP_REQUEST" in reason or "WRONG_VERSION" in reason or "PACKET_LENGTH" in reason:
            return "it does not speak TLS"
        return f"TLS failed ({reason})"
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, socket.gaierror):
        return f"its host name has no address ({error.strerror})"
    if isinstance(error, ConnectionResetError | BrokenPipeError | EOFError):
        return "the other side broke the connection"
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    return f"{type(error).__name__}: {error}"
