"""State of a node for its operator: page and ``/metrics`` of Prometheus, on loopback, and ``status.json``."""

from __future__ import annotations

import contextlib
import html
import json
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jwins.errors import UsageError
from jwins.net.peer_session import State
from jwins.net.sockets import keep_from_children
from jwins.run_folder.atomic import write_atomically
from jwins.run_folder.rows import EvalRow

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from jwins.net.driver import NodeProgress, RealTimeDriver

ENDLESS = 2**31
"""Number of rounds of a peer whose run has no planned end."""

REQUEST_S = 5.0
"""A request that is not complete after this time is dropped."""

MAX_REQUESTS = 16

HOSTS = ("localhost", "127.0.0.1", "[::1]")
"""Host names in accepted requests. Otherwise a web site could let its own name point to this machine, and read
the page through the operator's browser."""


@contextmanager
def serve(driver: RealTimeDriver, port: int) -> Iterator[int]:
    """Answer on 127.0.0.1 until the end of the block.

    Args:
        driver: driver of the node whose state is shown.
        port: port to listen on; 0 for any free one.

    Yields:
        The port.

    Raises:
        UsageError: the port is taken.
    """
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.exposition import CONTENT_TYPE_LATEST

    registry = CollectorRegistry()
    registry.register(_Collector(driver))

    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_S

        def do_GET(self) -> None:
            if _host_of(self.headers.get("Host", "")) not in HOSTS:
                self.send_error(421, "this page is for requests to localhost")
            elif self.path == "/metrics":
                self._answer(generate_latest(registry), CONTENT_TYPE_LATEST)
            elif self.path == "/":
                self._answer(page(driver).encode(), "text/html; charset=utf-8")
            else:
                self.send_error(404)

        def _answer(self, data: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    try:
        server = _FewAtOnce(("127.0.0.1", port), Handler)
    except OSError as error:
        raise UsageError(f"port {port} for metrics: {error.strerror}; choose another") from None
    keep_from_children(server, lambda server: [server.fileno()])
    thread = threading.Thread(target=server.serve_forever, name="jwins-status", daemon=True)
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _FewAtOnce(ThreadingHTTPServer):
    """Server with a thread for each of a few requests at a time; :data:`REQUEST_S` ends those that stall."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._free = threading.BoundedSemaphore(MAX_REQUESTS)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()


def _host_of(header: str) -> str:
    """Return the name in a Host header, without its port.

    >>> _host_of("localhost:8080"), _host_of("[::1]:8080"), _host_of("attacker.example")
    ('localhost', '[::1]', 'attacker.example')
    """
    return re.sub(r":\d*$", "", header.strip().lower())


class _Collector:
    """Metrics for Prometheus, made on request."""

    def __init__(self, driver: RealTimeDriver) -> None:
        self._driver = driver

    def collect(self) -> Iterator[Metric]:
        """Yield every metric of the node."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        driver, now = self._driver, self._driver.progress()
        for name, value, what in (
            ("jwins_round", now.round, "Completed rounds"),
            ("jwins_roster_version", now.roster_version, "Roster version that the node uses"),
            ("jwins_waiting_seconds", now.waiting_s, "Seconds for which the node has waited for neighbours"),
            ("jwins_peers_connected", len(now.connected), "Connected peers with compatible settings"),
            ("jwins_received_bytes", now.received_bytes, "Bytes received since the process began"),
            ("jwins_skipped_rounds", now.skipped_rounds, "Rounds that the node skipped because it was behind"),
            ("jwins_peers_suspect", len(now.suspect), "Peers for which the node does not wait"),
            (
                "jwins_neighbour_timeout_seconds",
                max(map(driver.session.waiting.limit_s, driver.peers), default=0.0),
                "Timeout of the slowest peer in seconds",
            ),
        ):
            yield GaugeMetricFamily(name, what, value=value)
        sent = CounterMetricFamily("jwins_sent_bytes", "Bytes sent, by kind of content", labels=["kind"])
        for kind, size_bytes in driver.sent.by_kind().items():
            sent.add_metric([kind], size_bytes)
        yield sent
        timed_out = CounterMetricFamily("jwins_timed_out", "Rounds in which a peer timed out", labels=["peer"])
        refused = CounterMetricFamily("jwins_refused", "Messages of a peer that were refused", labels=["peer"])
        for peer, known in driver.peers.items():
            timed_out.add_metric([driver.names[peer]], driver.timed_out[peer])
            refused.add_metric([driver.names[peer]], known.refused)
        yield timed_out
        yield refused
        measured = GaugeMetricFamily("jwins_metric", "Metrics of the newest evaluation", labels=["name"])
        for metric, mean in _measured(driver).items():
            if mean is not None:
                measured.add_metric([metric], mean)
        yield measured


def _measured(driver: RealTimeDriver) -> dict[str, float | None]:
    rows = [row for row in driver.recorder.rows if isinstance(row, EvalRow)]
    return rows[-1].means if rows else {}


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 48rem; padding: 0 1rem;
  color: #222; background: #fff }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 1.5rem 0 .3rem }
.state { font-size: 1.1rem; margin: 0 0 1rem }
.note { color: #666; font-size: .9rem; margin: .3rem 0 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #ddd }
th { font-weight: normal } thead th { color: #666 }
.facts th { white-space: nowrap } .facts td, .name, .state { overflow-wrap: anywhere }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; padding-right: 0; padding-left: .8rem }
tr.sum { font-weight: 600 }
@media (max-width: 30rem) { body { font-size: 14px } th, td { padding-right: .5rem }
  td.n, th.n { padding-left: .3rem } }
.bad { color: #a40000 } .wait { color: #7a4b00 } .good { color: #1b6e20 }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818 } th, td { border-color: #444 }
  thead th, .note { color: #aaa } .bad { color: #ff8a80 } .wait { color: #ffcc80 } .good { color: #a5d6a7 } }
"""

_REFRESH_S = 5


def page(driver: RealTimeDriver) -> str:
    """Return the status page: progress, metrics and last error of the node, its peers, and the bytes sent."""
    now = driver.progress()
    title = html.escape(driver.names[driver.node])
    whole = "" if now.rounds >= ENDLESS else f" of {now.rounds:,}"
    facts = [_fact("rounds completed", f"{now.round:,}{whole}"), _fact("running for", _duration(now.time_s))]
    if now.roster_version:
        facts.append(_fact("roster version", f"{now.roster_version:,}"))
    facts += [_fact(name, f"{value:.4f}") for name, value in _measured(driver).items() if value is not None]
    error = driver.journal.last_error
    facts.append(_fact("last error", error or "none", "bad" if error else ""))
    peers = "".join(_peer_row(driver, now, peer) for peer in driver.peers)
    sent = driver.sent.by_kind()
    kinds = "".join(f'<tr><th>{kind}</th><td class="n">{count:,}</td></tr>' for kind, count in sent.items())
    kinds += f'<tr class="sum"><th>total</th><td class="n">{sum(sent.values()):,}</td></tr>'
    state, kind = _state(driver, now)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}: round {now.round}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="refresh" content="{_REFRESH_S}"><style>{_STYLE}</style></head><body>'
        f'<h1>{title}</h1><p class="state {kind}">{html.escape(state)}</p>'
        f'<table class="facts"><tbody>{"".join(facts)}</tbody></table>'
        f'<h2>Peers</h2><div class="scroll"><table><thead><tr><th>peer</th><th>state</th>'
        f'<th class="n">round</th>'
        f'<th class="n">timed out</th><th class="n">refused</th></tr></thead>'
        f"<tbody>{peers}</tbody></table></div>"
        f'<p class="note">timed out: rounds merged without the peer; refused: messages of the peer that '
        f"were not accepted.</p>"
        f"<h2>Bytes sent</h2><table><tbody>{kinds}</tbody></table>"
        f'<p class="note">This page reloads every {_REFRESH_S} seconds.</p></body></html>'
    )


def _fact(name: str, value: str, kind: str = "") -> str:
    return f'<tr><th>{html.escape(name)}</th><td class="{kind}">{html.escape(value)}</td></tr>'


def _state(driver: RealTimeDriver, now: NodeProgress) -> tuple[str, str]:
    if not now.waiting_for:
        return "training", "good"
    limit_s = max(map(driver.session.waiting.limit_s, now.waiting_for))
    names = ", ".join(driver.names[peer] for peer in now.waiting_for)
    return f"waiting for {names} for {now.waiting_s:.0f} s (timeout {limit_s:.0f} s)", "wait"


def _peer_row(driver: RealTimeDriver, now: NodeProgress, peer: int) -> str:
    known = driver.peers[peer]
    where = known.state
    if where is State.INCOMPATIBLE:
        state, kind = f"incompatible: {known.mismatch}", "bad"
    elif where in (State.LEFT, State.REMOVED):
        state, kind = where.value, ""
    elif where is State.SUSPECT:
        state, kind = "suspect, not waited for", "bad"
    elif where is State.SLOW:
        state, kind = "connected, too slow, not waited for", "bad"
    elif peer in now.waiting_for:
        state = f"waiting for {now.waiting_s:.0f} s" + ("" if known.is_introduced else ", not connected")
        kind = "wait"
    elif where is State.BEHIND:
        state, kind = "connected, behind", "wait"
    else:
        state, kind = ("connected", "good") if known.is_introduced else ("not connected", "wait")
    numbers = (known.round if known.ever_connected else "-", driver.timed_out[peer], known.refused)
    cells = "".join(f'<td class="n">{number}</td>' for number in numbers)
    name = f'<th class="name">{html.escape(driver.names[peer])}</th>'
    return f'<tr>{name}<td class="{kind}">{html.escape(state)}</td>{cells}</tr>'


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    counts = ((days, "d"), (hours, "h"), (minutes, "min"), (rest, "s"))
    first = next((at for at, (count, _) in enumerate(counts) if count), 3)
    return " ".join(f"{count} {unit}" for count, unit in counts[first : first + 2])


# --- The file -------------------------------------------------------------------------------------------------

EVERY_S = 0.5


class StatusFile:
    """Writer of the node's progress, at most twice a second."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self._path, self._names = path, names
        self._last = 0.0
        self._metrics: dict[str, float | None] = {}

    def __call__(self, now: NodeProgress, status: str = "running") -> None:
        """Write the file if it is time, or if the node has ended."""
        if now.row is not None:
            self._metrics = now.row.means
        if status == "running" and time.monotonic() - self._last < EVERY_S:
            return
        self._last = time.monotonic()
        found = asdict(now) | {"status": status, "metrics": self._metrics}
        del found["row"]
        for key in ("waiting_for", "connected", "suspect"):
            found[key] = [self._names[peer] for peer in found[key]]
        with contextlib.suppress(OSError):  # a full disk must not end the run
            write_atomically(self._path, (json.dumps(found) + "\n").encode(), sync=False, mode=0o600)
