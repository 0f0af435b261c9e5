"""Settings that peers in users' loops must share: parameters, algorithm, and the head of the roster."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from torch import nn

from jwins.errors import ConfigError, ResumeError, UsageError
from jwins.experiment.field_types import identity_text
from jwins.net.handshake import flat_settings
from jwins.net.membership import common_of
from jwins.net.roster import Roster
from jwins.node import Staleness
from jwins.run_folder.own_files import private_folder
from jwins.run_folder.rows import StartRow, read_rows
from jwins.sharing import Nesterov, NoLoCo, Sharing
from jwins.sharing.base import NOT_ASYNCHRONOUS
from jwins.training.layout import BufferPolicy, Layout
from jwins.wire.frame import DIGEST_BYTES

ROSTER, KEY, FOLDER = "JWINS_ROSTER", "JWINS_KEY", "JWINS_FOLDER"
"""Variables of the environment in which ``jwins launch --script`` names a peer's roster, key and folder."""

_WRAPPERS = ("module.", "_orig_mod.")


def from_environment(
    roster: Roster | Path | str | None, key: Path | str | None, folder: Path | str | None
) -> tuple[Roster | Path | str, Path | str, Path | str | None]:
    """Return roster, key and folder as given, or else from the environment.

    Raises:
        ConfigError: neither has a roster, or a key.
    """
    roster, key = roster or os.environ.get(ROSTER), key or os.environ.get(KEY)
    for name, value, variable in (("roster", roster, ROSTER), ("key", key, KEY)):
        if value is None:
            problem = f"expected a path; without it {variable} has to be set, as `jwins launch --script` does"
            raise ConfigError(name, None, problem)
    assert roster is not None
    assert key is not None
    return roster, key, folder or os.environ.get(FOLDER)


def check_arguments(given: Mapping[str, Any]) -> None:
    """Refuse arguments of :class:`jwins.Peer` that are of a wrong type or out of range.

    Raises:
        ConfigError: for the first one that is wrong; it names the argument and the remedy.
    """
    for name, (fits, expected) in _ARGUMENTS.items():
        value = given[name]
        if not fits(value):
            raise ConfigError(name, value, f"expected {expected}")
    if given["outer"] is not None and isinstance(given["sharing"], NoLoCo):
        raise ConfigError("outer", given["outer"], "noloco has an outer step of its own; remove one of the two")
    if given["outer"] is not None and given["buffers"] == "shared":
        problem = "the outer step would extrapolate the shared statistics; use 'local', or remove outer"
        raise ConfigError("buffers", given["buffers"], problem)
    if (
        given["mode"] == "async"
        and given["sharing"] is not None
        and not getattr(given["sharing"], "asynchronous", False)
    ):
        raise ConfigError("mode", "async", NOT_ASYNCHRONOUS.format(name=type(given["sharing"]).__name__))
    if given["folder"] is not None:
        try:
            private_folder(Path(given["folder"]))
        except OSError as error:
            raise ConfigError(
                "folder", str(given["folder"]), f"cannot be made ({error.strerror}); choose another folder"
            ) from None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_path(value: object) -> bool:
    return isinstance(value, str | Path)


def _are_names(value: object) -> bool:
    return isinstance(value, str) or (
        isinstance(value, Collection) and all(isinstance(name, str) for name in value)
    )


_ARGUMENTS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda value: isinstance(value, nn.Module), "a torch.nn.Module"),
    "sharing": (
        lambda value: value is None or callable(getattr(value, "share", None)),
        "an algorithm, such as jwins.sharing.jwins()",
    ),
    "outer": (
        lambda value: value is None or isinstance(value, Nesterov),
        "an outer optimizer, such as jwins.sharing.Nesterov(lr=0.7, momentum=0.9)",
    ),
    "roster": (lambda value: isinstance(value, Roster) or _is_path(value), "a path or a Roster"),
    "key": (_is_path, "a path"),
    "params": (
        lambda value: value is None or callable(value) or _are_names(value),
        "names of parameters, or a function of a name",
    ),
    "buffers": (lambda value: value in get_args(BufferPolicy), "'local' or 'shared'"),
    "bootstrap_from": (
        lambda value: value is None or _are_names(value),
        "a member's name, or several in the order in which they are asked",
    ),
    "codec": (lambda value: isinstance(value, str), "the name of a codec, such as 'pco'"),
    "timeout_s": (
        lambda value: _is_number(value) and 0.0 < value < math.inf,
        "a time in seconds above 0",
    ),
    "folder": (lambda value: value is None or _is_path(value), "a path"),
    "metrics_port": (
        lambda value: value is None or (isinstance(value, int) and _is_number(value) and 0 <= value < 1 << 16),
        "a port from 0 (any free one) to 65535",
    ),
    "listen": (lambda value: value is None or isinstance(value, str), "an address, such as '0.0.0.0:7420'"),
    "mode": (lambda value: value in ("sync", "async"), "'sync' or 'async'"),
    "max_staleness": (
        lambda value: isinstance(value, int) and _is_number(value) and value > 0,
        "a number of rounds of at least 1",
    ),
}
"""By argument: a test of its value, and the description of a valid one."""


def selected(layout: Layout, wanted: Collection[str] | Callable[[str], bool] | None) -> Layout:
    """Return the layout of the chosen parameters and of all shared buffers."""
    if wanted is None:
        return layout
    if isinstance(wanted, str):
        wanted = (wanted,)
    known = [slot.name for slot in layout.slots if slot.kind == "parameter"]
    if callable(wanted):
        chosen = {name for name in known if wanted(name) or wanted(plain_name(name))}
    else:
        chosen = {name for name in known if name in wanted or plain_name(name) in wanted}
        if strange := sorted(set(wanted) - chosen - {plain_name(name) for name in chosen}):
            raise UsageError(
                f"Peer.params: the model has no trainable parameter {strange[0]!r}; it has {known}"
            )
    if not chosen:
        raise UsageError(f"Peer.params: chooses none of {known}")
    slots, offset = [], 0
    for slot in layout.slots:
        if slot.kind == "buffer" or slot.name in chosen:
            slots.append(replace(slot, offset=offset))
            offset += slot.size
    return replace(layout, slots=tuple(slots), size=offset)


def plain_name(name: str) -> str:
    """Return a parameter's name without the prefixes of DistributedDataParallel and ``torch.compile``.

    >>> plain_name("_orig_mod.module.head.weight")
    'head.weight'
    """
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name


def hash_of_layout(layout: Layout) -> str:
    """Return a hash of the names and shapes of the exchanged tensors."""
    text = ";".join(f"{plain_name(slot.name)}{list(slot.shape)}" for slot in layout.slots)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_of_run(
    roster: Roster,
    sharing: Sharing[Any],
    codec: str,
    outer: Nesterov | None = None,
    staleness: Staleness | None = None,
) -> bytes:
    """Return the digest of all settings that peers must share, except the model, which has its own check."""
    topology, seed = common_of(roster)
    text = identity_text((seed, sorted(topology.items()), roster.num_places, sharing, codec))
    text += "" if outer is None else repr(outer)
    text += "" if staleness is None else repr(staleness)
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()


def settings_of_run(
    roster: Roster,
    sharing: Sharing[Any],
    codec: str,
    outer: Nesterov | None = None,
    staleness: Staleness | None = None,
) -> dict[str, str]:
    """Return the settings of :func:`digest_of_run` by name, so that peers can report their differences."""
    topology, seed = common_of(roster)
    found = flat_settings(sharing, "sharing") | {"codec": codec, "roster.seed": str(seed)}
    found |= {} if outer is None else flat_settings(outer, "outer")
    found |= (
        {"mode": "sync"} if staleness is None else flat_settings(staleness, "staleness") | {"mode": "async"}
    )
    return found | flat_settings(topology, "roster.topology") | {"roster.places": str(roster.num_places)}


def check_resumable(folder: Path, digest: bytes, agreed: Mapping[str, str]) -> None:
    """Refuse a folder of a peer with other settings."""
    row = next(read_rows(folder / "metrics.jsonl"), None) if (folder / "metrics.jsonl").is_file() else None
    if not isinstance(row, StartRow):
        return  # resuming reports its problem
    differs = ""
    if row.digest != digest.hex():
        differs = "algorithm, codec, or head of the roster"
    elif row.fingerprints and row.fingerprints != agreed:
        differs = "model"
    if differs:
        raise ResumeError(
            f"Peer.folder = {str(folder)!r}: belongs to a run with another {differs}; "
            "choose another folder, or remove this one"
        )
