"""Tools of an attacker: sockets, keys and time."""

from __future__ import annotations

import datetime
import socket
import ssl
import struct
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from jwins.net.certificate import Certificate, read_certificate
from jwins.net.channel import VERSION
from jwins.net.limits import CHUNK_BYTES
from jwins.net.roster import Roster

DAY = datetime.timedelta(days=1)

UPGRADE = (
    "GET /jwins HTTP/1.1\r\nHost: victim\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n{more}\r\n"
)

TEXT, BINARY, CLOSE, PING = 0x81, 0x82, 0x88, 0x89


def forge(
    folder: Path,
    name: str,
    file: str,
    *,
    signed_by: tuple[Path, Path] | None = None,
    ca: bool = False,
    begins: datetime.timedelta = -DAY,
    ends: datetime.timedelta = DAY,
) -> tuple[Path, Path, Certificate]:
    """Files of a certificate and its key, for any name, signed with itself or with someone's certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    signer = key
    chain = b""
    if signed_by is not None:
        chain = signed_by[0].read_bytes()
        issuer = x509.load_pem_x509_certificate(chain).subject
        loaded = serialization.load_pem_private_key(signed_by[1].read_bytes(), None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        signer = loaded
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + begins)
        .not_valid_after(now + ends)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .sign(signer, hashes.SHA256())
    )
    pem = made.public_bytes(serialization.Encoding.PEM)
    certificate_file, key_file = folder / f"{file}.crt", folder / f"{file}.key"
    certificate_file.write_bytes(pem + chain)
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    key_file.chmod(0o600)
    return certificate_file, key_file, read_certificate(pem.decode(), file)


def client_context(files: tuple[Path, Path] | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # an attacker trusts anyone
    if files is not None:
        context.load_cert_chain(*files)
    return context


class Attacker:
    """A TLS connection to a member, on which anything may be said."""

    def __init__(
        self, port: int, files: tuple[Path, Path] | None, context: ssl.SSLContext | None = None
    ) -> None:
        plain = socket.create_connection(("127.0.0.1", port), timeout=10)
        try:
            self.sock = (context or client_context(files)).wrap_socket(plain)
        except BaseException:
            plain.close()
            raise

    def __enter__(self) -> Attacker:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def upgrade(self, more: str = "") -> str:
        """Become a WebSocket; the answer's head."""
        self.sock.sendall(UPGRADE.format(more=more).encode())
        head = b""
        while b"\r\n\r\n" not in head:
            data = self.sock.recv(1)
            if not data:
                raise ConnectionResetError
            head += data
        return head.decode()

    def frame(self, first: int, data: bytes, claimed: int | None = None) -> None:
        """Send a frame, perhaps one that claims another length than it has."""
        size = len(data) if claimed is None else claimed
        if size < 126:
            head = struct.pack("!BB", first, 0x80 | size)
        elif size < 65536:
            head = struct.pack("!BBH", first, 0xFE, size)
        else:
            head = struct.pack("!BBQ", first, 0xFF, size)
        self.sock.sendall(head + bytes(4) + data)  # the mask of zeros changes nothing

    def text(self, message: str) -> None:
        self.frame(TEXT, message.encode())

    def hello(self, id: int, to: int, **more: object) -> None:
        fields = {"type": "hello", "version": VERSION, "id": id, "to": to, "instance": "0" * 32} | more
        self.text(str(fields).replace("'", '"').replace("True", "true"))

    def begin(self, size: int) -> None:
        self.text(f'{{"type":"begin","size":{size}}}')

    def message(self, data: bytes) -> None:
        """A message as an honest member would send it."""
        self.begin(len(data))
        for start in range(0, len(data), CHUNK_BYTES):
            self.frame(BINARY, data[start : start + CHUNK_BYTES])

    def read(self) -> tuple[int, bytes]:
        """Opcode and data of the next frame of the victim."""
        first, size = self._exactly(2)
        if size == 126:
            (size,) = struct.unpack("!H", self._exactly(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", self._exactly(8))
        return first, self._exactly(size)

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.sock.recv(count - len(data))
            if not more:
                raise ConnectionResetError
            data += more
        return data

    def joined(self, id: int, to: int) -> Attacker:
        """Authenticated as a member whose key it has; the victim has the lower id and has said Go."""
        self.upgrade()
        self.hello(id, to)
        assert b'"hello"' in self.read()[1]
        assert b'"go"' in self.read()[1]
        return self

    def reason(self) -> str:
        """Read on until the victim ends the connection: the reason it gave, or how else it ended."""
        try:
            while True:
                first, data = self.read()
                if first == CLOSE:
                    return data[2:].decode()
        except ssl.SSLError as error:
            return str(error.reason)
        except ConnectionError:
            return "closed"


def files_of(roster: Roster, folder: Path, id: int) -> tuple[Path, Path]:
    """A member's certificate and key, which the attacker has."""
    return folder / f"{roster[id].name}.crt", folder / f"{roster[id].name}.key"
