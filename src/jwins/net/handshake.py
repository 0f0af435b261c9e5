"""Settings that two peers must share; each connection begins with them.

The transport exchanges greetings when a connection opens. A greeting has the settings of a run. So two peers
of different runs, which cannot read each other's messages, can still report their differences. The Hello has
the remaining facts: the model, its start, and the round.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from jwins.net.journal import plain
from jwins.net.limits import GREETING_BYTES
from jwins.wire.frame import DIGEST_BYTES, MAX_NAME_CHARS, MAX_VERSIONS, VERSION, Hello

BOOTSTRAPPED = b""
"""Replacement for the hash of the initial parameters if the model came from a neighbour."""

FORMAT = "wire format"
"""Setting of a greeting that has the version of all later messages."""

_MAX_VALUE_CHARS = 80
_MAX_NAMED = 4


@dataclass(frozen=True, slots=True)
class Handshake:
    """Settings that a node states and compares with those of its peers.

    Attributes:
        dim: length of its parameter vector.
        codec: name of the codec of its frames.
        x0: hash of its initial parameters, or :data:`BOOTSTRAPPED`.
        versions: names and numbers of libraries, for people.
        agreed: further settings that must be equal, by name.
        greeting: see :func:`pack_greeting`; b"" compares nothing.
    """

    dim: int
    codec: str
    x0: bytes
    versions: Mapping[str, str] = field(default_factory=dict)
    agreed: Mapping[str, str] = field(default_factory=dict)
    greeting: bytes = b""

    def with_x0(self, x0: bytes) -> Handshake:
        """Return a copy with other initial parameters."""
        return replace(self, x0=x0)

    def hello(self, sender: int, round: int, resend_from: int | None, settled: bool) -> Hello:
        """Return the node's Hello in a round."""
        every = {**self.agreed, **{str(name): str(number) for name, number in self.versions.items()}}
        short = {k[:MAX_NAME_CHARS]: v[:MAX_NAME_CHARS] for k, v in list(every.items())[:MAX_VERSIONS]}
        return Hello(sender, round, self.dim, self.codec, short, self.x0, resend_from, settled)

    def greeting_mismatch(self, theirs: bytes) -> str:
        """Return why a peer with this greeting cannot take part, or ""."""
        return greeting_mismatch(theirs, self.greeting) if theirs and self.greeting else ""

    def hello_mismatch(self, theirs: Hello) -> str:
        """Return why a peer with this Hello cannot take part, or ""."""
        if theirs.dim != self.dim:
            return f"it exchanges {theirs.dim} parameters, this node {self.dim}"
        if theirs.codec != self.codec:
            return f"it uses the codec {plain(theirs.codec)}, this node {self.codec}"
        for name, here in self.agreed.items():
            if (there := theirs.versions.get(name, "")) != here:
                return f"its {name} is {plain(there) or 'not known'}, here it is {here}"
        if BOOTSTRAPPED not in (theirs.x0, self.x0) and theirs.x0 != self.x0:
            libraries = {
                name: theirs.versions[name] for name in sorted(theirs.versions) if name not in self.agreed
            }
            versions = f"; its versions: {plain(str(libraries))}" if libraries else ""
            hashes = f"hash {theirs.x0.hex()[:16]}, here {self.x0.hex()[:16]}"
            return f"its initial parameters differ ({hashes}){versions}"
        return ""


def hash_of_parameters(params: Tensor) -> bytes:
    """Return the SHA-256 of a vector's little-endian float32 bytes, by which peers compare their start."""
    return hashlib.sha256(params.detach().cpu().numpy().astype("<f4", copy=False).tobytes()).digest()


def flat_settings(value: Any, name: str) -> dict[str, str]:
    """Return the settings of a dataclass or nested dict by dotted name, values as text.

    >>> flat_settings({"kind": "ring", "seed": 1}, "topology")
    {'topology.kind': 'ring', 'topology.seed': '1'}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {name: type(value).__name__}
        for own in dataclasses.fields(value):
            found |= flat_settings(getattr(value, own.name), f"{name}.{own.name}")
        return found
    if isinstance(value, Mapping):
        found = {}
        for key, item in value.items():
            found |= flat_settings(item, f"{name}.{key}" if name else str(key))
        return found
    return {name: _short(str(value))}


def _short(text: str) -> str:
    """Return the text, or its beginning and a hash of all of it."""
    if len(text) <= _MAX_VALUE_CHARS:
        return text
    return f"{text[: _MAX_VALUE_CHARS - 12]}... {hashlib.sha256(text.encode()).hexdigest()[:8]}"


def pack_greeting(digest: bytes, settings: Mapping[str, str]) -> bytes:
    """Return the greeting for connecting members: the digest of the run and its settings.

    >>> pack_greeting(b"8 bytes.", {"seed": "1"})
    b'{"digest":"382062797465732e","settings":{"wire format":"3","seed":"1"}}'
    """
    chosen = {FORMAT: str(VERSION)} | {name: _short(text) for name, text in settings.items()}
    while True:
        body = {"digest": digest.hex(), "settings": chosen}
        data = json.dumps(body, separators=(",", ":")).encode()
        if len(data) <= GREETING_BYTES:
            return data
        chosen = dict(list(chosen.items())[: len(chosen) * 3 // 4])


def greeting_mismatch(theirs: bytes, ours: bytes) -> str:
    """Return the settings in which two runs differ, with both values, as text; "" if they are the same run.

    Args:
        theirs: the peer's greeting; may be any bytes.
        ours: this node's greeting.

    >>> greeting_mismatch(pack_greeting(b"1", {"codec": "raw"}), pack_greeting(b"2", {"codec": "pco"}))
    'its codec is raw, here it is pco'
    """
    if theirs == ours:
        return ""
    here, there = _unpacked(ours), _unpacked(theirs)
    if there is None or here is None:
        return f"it runs another experiment (greeting {theirs[:8].hex() or 'empty'}, here {ours[:8].hex()})"
    names: list[str] = []
    if there[1] and here[1]:
        names = [name for name in {**here[1], **there[1]} if here[1].get(name) != there[1].get(name)]
    if there[0] == here[0] and FORMAT not in names:
        return ""
    if not names:
        return f"it runs another experiment (digest {plain(there[0][:16])} there, {here[0]} here)"
    differences = [
        f"its {plain(name)} is {plain(there[1].get(name, 'not set'))}, "
        f"here it is {plain(here[1].get(name, 'not set'))}"
        for name in names[:_MAX_NAMED]
    ]
    if len(names) > _MAX_NAMED:
        differences.append(f"and {len(names) - _MAX_NAMED} other settings differ")
    return "; ".join(differences)


def _unpacked(data: bytes) -> tuple[str, dict[str, str]] | None:
    if len(data) == DIGEST_BYTES:  # the digest alone
        return data.hex(), {}
    try:
        found = json.loads(data)
        settings = {str(name): str(value)[: 2 * _MAX_VALUE_CHARS] for name, value in found["settings"].items()}
        return str(found["digest"]), settings
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
