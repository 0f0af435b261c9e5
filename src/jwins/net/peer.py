"""A peer for the user's own training loop: it merges the model with the neighbours' models."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, SupportsIndex, cast

from torch import Tensor, nn

from jwins.errors import ConfigError, JwinsError, PeerError, RemovedError, UsageError
from jwins.net.driver import NodeOutcome, RealTimeDriver
from jwins.net.journal import write_journal
from jwins.net.neighbour_timeout import DEFAULT_TIMEOUT_S
from jwins.net.peer_settings import from_environment
from jwins.net.peer_setup import Arguments, PeerSetup
from jwins.net.roster import Roster
from jwins.net.status import serve
from jwins.net.transport_interface import Transport
from jwins.run_folder.lock import locked
from jwins.run_folder.own_files import private_folder
from jwins.sharing import Nesterov, Sharing
from jwins.training.layout import BufferPolicy


@dataclass(frozen=True, slots=True)
class Exchanged:
    """Report of an exchange.

    Attributes:
        round: round of the shared parameters, from 0.
        merged_round: round of the merge that is in the model now; None without one.
        seconds: duration of the call.
        bytes_sent: bytes sent since the last exchange.
        bytes_total: bytes sent since the start.
        timed_out: names of the neighbours that timed out since the last exchange.
        suspect: names of the peers that the node does not wait for now.
        incompatible: names of the peers that cannot take part, each with the reason.
        roster_version: version of the roster whose graph the peer uses now.
        merged_with: names of the neighbours whose models are in the merge of ``merged_round``.
        partial: whether a neighbour of that round is not among them.
        received_bytes: bytes received since the last exchange.
        skipped_rounds: number of rounds in which the peer took no part, because it was behind or away.
        seconds_by: ``seconds`` by activity: ``waiting``, ``sharing and merging``, ``decoding``.
    """

    round: int
    merged_round: int | None
    seconds: float
    bytes_sent: int
    bytes_total: int
    timed_out: tuple[str, ...]
    suspect: tuple[str, ...]
    incompatible: tuple[str, ...]
    roster_version: int = 0
    merged_with: tuple[str, ...] = ()
    partial: bool = False
    received_bytes: int = 0
    skipped_rounds: int = 0
    seconds_by: Mapping[str, float] = field(default_factory=dict)


class Peer:
    """One member of a roster, whose model the user trains in a loop.

    ``exchange`` shares the current model, waits for the neighbours and writes the merged parameters into
    the model, in place. Other threads handle connections, late neighbours and checkpoints.

    The peer exchanges the parameters with ``requires_grad``, on any device. They are exchanged as float32, and
    written back in their own floating-point type. Buffers, such as BatchNorm's statistics, stay in the model
    (``buffers="local"``), or floating-point buffers are exchanged, too (``"shared"``; variances are then
    clamped at 0). The optimizer's state is not changed.

    All peers must begin with the same parameters, for example from the same ``torch.manual_seed``; a peer
    reports a difference. A peer that joins later, or cannot begin with the same parameters, names in
    ``bootstrap_from`` the members whose model and round it takes. If the algorithm measures from the common
    start (``closed_loop``, ``stateless``), ``model`` must still have the others' initial parameters. With
    ``folder`` the peer keeps a checkpoint after every round. A new peer with the same folder writes the newest
    one into the model, and its ``round`` is the round to continue with.

    A running peer follows changes of the roster file, as ``jwins node`` does: members join, leave, and change
    their certificates.

    Args:
        model: model to train.
        roster: roster with members, graph and seed; or its file, whose changes are followed.
            None for the file that ``JWINS_ROSTER`` names, as for a script of ``jwins launch --script``.
        key: the file of this member's private key; None for that of ``JWINS_KEY``.
        sharing: the algorithm, the same on all peers; None for JWINS.
        outer: step on the change since the last exchange, taken before sharing; the same on all peers. None to
            share the model as it was trained.
        params: parameters to exchange: their names, or a function that returns True for them; None for all
            with ``requires_grad``. The same on all peers.
        buffers: see above.
        bootstrap_from: names of members to request a model from, one after the other. None for ``model``
            itself, which is only possible for members from the first round on; one that finds most neighbours
            ahead before its first merge still takes the model of one. Not used if ``folder`` has a checkpoint.
        codec: "pco" or "raw".
        timeout_s: minimum time to wait for a neighbour, 30 by default; all other times are derived from it.
        folder: for checkpoints, ``log.jsonl`` and ``status.json``; None for that of ``JWINS_FOLDER``, or none.
        metrics_port: port for a status page and ``/metrics``, on loopback; None serves neither.
        listen: host:port to listen on, if it is not the roster's.
        mode: "async" for an exchange that does not wait, the same on all peers: it merges the updates that came
            since the last exchange into the model that was shared then, and adds the training since. Only the
            first exchange of a new peer waits for the neighbours' connections, for at most ``timeout_s``.
        max_staleness: with "async", an update is left out if its sender or this peer has completed more than
            this number of rounds since the sender's previous one was merged; the same on all peers.
        transport: a transport that replaces the connections of the roster; for tests.

    Attributes:
        round: number of complete rounds.
        name: name of this member.
        model: the model.

    Raises:
        ConfigError: roster, key or an argument cannot be used, or too little memory is free for the exchange.
        ResumeError: the folder belongs to a run with another model or algorithm, another process uses it, or
            its checkpoints cannot be read.
        UsageError: the model has nothing to exchange, the user's algorithm fails in a trial round
            on copies, or the address cannot be listened on.
        PeerError: no member sent a model.

    Example::

        with jwins.Peer(model, roster="roster.toml", key="alice.key", sharing=jwins.sharing.jwins()) as peer:
            for round in peer.rounds(100):
                train_locally(model, loader)
                report = peer.exchange()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        roster: Roster | Path | str | None = None,
        key: Path | str | None = None,
        sharing: Sharing[Any] | None = None,
        outer: Nesterov | None = None,
        params: Collection[str] | Callable[[str], bool] | None = None,
        buffers: BufferPolicy = "local",
        bootstrap_from: str | Sequence[str] | None = None,
        codec: str = "pco",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        folder: Path | str | None = None,
        metrics_port: int | None = None,
        listen: str | None = None,
        mode: Literal["sync", "async"] = "sync",
        max_staleness: int = 16,
        transport: Transport | None = None,
    ) -> None:
        roster, key, folder = from_environment(roster, key, folder)
        given = Arguments(
            model=model,
            roster=roster,
            key=key,
            sharing=sharing,
            outer=outer,
            params=params,
            buffers=buffers,
            bootstrap_from=bootstrap_from,
            codec=codec,
            timeout_s=timeout_s,
            folder=folder,
            metrics_port=metrics_port,
            listen=listen,
            mode=mode,
            max_staleness=max_staleness,
            transport=transport,
        )
        setup = PeerSetup(given)
        self.name: str = setup.me.name
        self.model: nn.Module = model
        self._layout, self._names = setup.layout, setup.names
        self._training, self._transport, self._status = setup.training, setup.transport, setup.status
        self._closing, self._farewell = False, "ended"
        self._driver = setup.make_driver(lambda: self._closing, lambda: self._farewell)
        self._under_way: Tensor | None = None
        self._reported_sent = self._reported_received = 0
        self._reported_wall_s: Mapping[str, float] = {}
        self._reported_timed_out = dict(self._driver.timed_out)
        self._exchanging = threading.Lock()
        self._served: Callable[[], None] = lambda: None
        self._folder = self._opened(setup)
        self._begin(setup, metrics_port)

    def _opened(self, setup: PeerSetup) -> contextlib.ExitStack:
        """Lock the folder, and write the log there until the end."""
        opened = contextlib.ExitStack()
        if setup.place is not None:
            try:
                private_folder(setup.place)
                opened.enter_context(locked(setup.place, "this peer"))
                opened.enter_context(write_journal(setup.place / "log.jsonl", self.name))
            except BaseException:
                setup.transport.close()
                raise
        return opened

    def _begin(self, setup: PeerSetup, metrics_port: int | None) -> None:
        """Start the driver, and take the model that the peer begins with."""
        self._thread = threading.Thread(
            target=self._run, args=(setup.going_on,), name="jwins-peer", daemon=True
        )
        self._thread.start()
        self._process = os.getpid()
        atexit.register(self._at_exit)
        try:
            self._next, merged = self._training.take_merged()
            if setup.going_on or setup.providers:
                self._layout.write(merged, self.model)
            self._reported_sent = self._driver.progress().bytes_total
            self._served = _serving(self._driver, metrics_port)
        except BaseException:
            self.close()
            raise

    def _run(self, resume: bool) -> None:
        try:
            outcome = self._driver.run(resume)
            self._write_end(self._farewell if outcome.status == "interrupted" else outcome.status)
            self._training.withdraw(_ended(outcome))
        except BaseException as error:
            self._write_end("failed")
            self._training.withdraw(error)

    def _write_end(self, status: str) -> None:
        if self._status is not None:
            self._status(self._driver.progress(), status)

    @property
    def round(self) -> int:
        """Return the number of completed rounds."""
        return self._next

    def rounds(self, count: int) -> Iterator[int]:
        """Yield the rounds that are left of ``count``. Exchange once in each.

        A new peer with an old folder begins with the round after its checkpoint. A peer that was away and
        takes over the others' round leaves out the rounds in between.

        Example::

            for round in peer.rounds(100):
                train_locally(model, loader)
                peer.exchange()

        Raises:
            ConfigError: ``count`` is not a whole number.
        """
        if isinstance(count, bool) or not isinstance(count, SupportsIndex):
            raise ConfigError("count", count, "expected the number of rounds, a whole number such as 100")
        return self._left(count)

    def _left(self, count: int) -> Iterator[int]:
        while self._next < count:
            at = self._next
            yield at
            if self._next == at and self._under_way is None:
                raise UsageError(
                    f"Peer.rounds: round {at} ended without an exchange; call exchange() once in each round"
                )
            if self._under_way is not None:
                self._next = max(self._next, at + 1)  # exchanged without waiting

    def exchange(self, *, wait: bool = True) -> Exchanged:
        """Share the current model, and merge the neighbours' updates into it, in place.

        Args:
            wait: True: return when the neighbours' updates have arrived or timed out. False: return at once;
                the next exchange adds the neighbours' change to the model, on top of training in between. The
                same applies if waiting is interrupted, for example by Ctrl-C. With ``mode="async"`` there is
                nothing to wait for.

        Raises:
            ConfigError: ``wait`` is neither True nor False.
            PeerError: no neighbour can take part, because its model, algorithm or start differs.
            RemovedError: the member was removed from the roster; the model is as trained here.
            UsageError: the peer is closed, or parameters are not finite.
        """
        return self._exchange(wait, threading.Event())

    def _exchange(self, wait: bool, given_up: threading.Event) -> Exchanged:
        """Exchange; after ``given_up`` is set, the model is not changed."""
        if not isinstance(wait, bool):
            raise ConfigError("wait", wait, "expected True or False")
        with self._exchanging:
            if self._closing:
                raise UsageError("Peer.exchange: the peer is closed")
            begun = time.perf_counter()
            trained = self._layout.flatten(self.model).cpu()
            merged_round: int | None = None
            if self._under_way is not None:
                self._next, merged = self._training.take_merged()
                merged_round = self._next - 1
                trained = trained + (merged - self._under_way)
                self._layout.write(trained, self.model)
            handed = self._next
            self._training.hand_over(trained)
            self._under_way = trained  # its merge is not in the model yet
            if wait:
                self._next, merged = self._training.take_merged()
                if not given_up.is_set():
                    merged_round = self._next - 1
                    self._layout.write(merged, self.model)
                    self._under_way = None
            return self._report(handed, merged_round, time.perf_counter() - begun)

    async def exchange_async(self, *, wait: bool = True) -> Exchanged:
        """Exchange on a thread, without blocking the event loop. Do not touch the model until it returns.

        If it is cancelled, the next exchange adds the neighbours' change to the model.
        """
        given_up = threading.Event()
        try:
            return await asyncio.to_thread(self._exchange, wait, given_up)
        except asyncio.CancelledError:
            given_up.set()
            raise

    def close(self) -> None:
        """Leave the run: send a Bye and pending frames, for at most ``timeout_s``.

        A second call does nothing. It is also called at the end of the program, even after an error.
        """
        atexit.unregister(self._at_exit)
        self._closing = True
        self._training.withdraw(UsageError("Peer.exchange: the peer is closed"))
        self._transport.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._served()
        self._folder.close()

    def _at_exit(self) -> None:
        """Leave the run at the end of the program, except in a forked process."""
        if os.getpid() == self._process:
            self.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            self._farewell = (
                "interrupted" if issubclass(kind, KeyboardInterrupt) else f"failed: {kind.__name__}"
            )
        self.close()

    def _is_alone(self, round: int) -> bool:
        """Return whether no compatible peer ever connected, and no neighbour of the round is awaited."""
        driver = self._driver
        neighbours = driver.rules.topology.at(round).senders[driver.node]
        connected = any(known.ever_connected and not known.mismatch for known in driver.peers.values())
        return not connected and all(not driver.peers[peer].is_awaited for peer in neighbours)

    def _report(self, handed: int, merged_round: int | None, seconds: float) -> Exchanged:
        driver = self._driver
        incompatible = {peer: known.mismatch for peer, known in driver.peers.items() if known.mismatch}
        if incompatible and self._is_alone(handed):
            problems = "; ".join(f"{self._names[peer]}: {why}" for peer, why in incompatible.items())
            raise PeerError(
                f"{self.name} is incompatible with all other peers ({problems}); "
                "all must use the same model, initial parameters, sharing and codec"
            )
        now = driver.progress()
        timed_out = dict(driver.timed_out)
        names = tuple(
            self._names[peer] for peer in timed_out if timed_out[peer] > self._reported_timed_out[peer]
        )
        sent, received = now.bytes_total - self._reported_sent, now.received_bytes - self._reported_received
        self._reported_received = now.received_bytes
        merge = None if merged_round is None else driver.session.rounds.merged.get(merged_round)
        self._reported_timed_out, self._reported_sent = timed_out, now.bytes_total
        return Exchanged(
            handed,
            None if merge is None else merged_round,  # a node that skips rounds merges nothing
            seconds,
            sent,
            now.bytes_total,
            names,
            tuple(self._names[peer] for peer in now.suspect),
            tuple(f"{self._names[peer]}: {why}" for peer, why in incompatible.items()),
            now.roster_version,
            () if merge is None else tuple(self._names[peer] for peer in merge.merged_with),
            merge is not None and bool(merge.without),
            received,
            now.skipped_rounds,
            self._split(seconds),
        )

    def _split(self, seconds: float) -> dict[str, float]:
        now_s = dict(self._driver.group.wall_s)
        spent = {name: now_s[name] - self._reported_wall_s.get(name, 0.0) for name in now_s}
        self._reported_wall_s = now_s
        busy = {"sharing and merging": spent["share and merge"], "decoding": spent["decoding"]}
        return {"waiting": max(0.0, seconds - sum(busy.values())), **busy}


def _ended(outcome: NodeOutcome) -> JwinsError:
    if outcome.status == "removed":
        where = f"Peer.exchange, round {outcome.round}"
        return RemovedError(f"{where}: this member was removed from the roster; the others continue without it")
    if outcome.status == "diverged":
        problem = "parameters are not finite, or beyond 1e30; a smaller learning rate may help"
        return UsageError(f"Peer.exchange, round {outcome.round}: {problem}")
    return UsageError("Peer.exchange: the peer is closed")


def _serving(driver: RealTimeDriver, port: int | None) -> Callable[[], None]:
    """Serve status and metrics; return the function that ends it."""
    if port is None:
        return lambda: None
    serving = serve(driver, port)
    serving.__enter__()
    return lambda: cast(None, serving.__exit__(None, None, None))
