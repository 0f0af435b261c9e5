"""For the operator: a status page and ``/metrics`` in the format of Prometheus, on loopback only."""

from __future__ import annotations

import html
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

from jwins.errors import UsageError
from jwins.runfiles.rows import EvalRow

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from jwins.net.clock import WallClock

__all__ = ["page", "serve"]


@contextmanager
def serve(clock: WallClock, port: int) -> Iterator[int]:
    """Answer on 127.0.0.1 until the end of the block.

    Args:
        clock: whose state is shown.
        port: where; 0 for any that is free.

    Yields:
        The port.

    Raises:
        UsageError: the port is taken.
    """
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.exposition import CONTENT_TYPE_LATEST

    registry = CollectorRegistry()
    registry.register(_Collector(clock))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(generate_latest(registry), CONTENT_TYPE_LATEST)
            elif self.path == "/":
                self._answer(page(clock).encode(), "text/html; charset=utf-8")
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
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise UsageError(f"port {port} for metrics: {error.strerror}; choose another") from None
    thread = threading.Thread(target=server.serve_forever, name="jwins-status", daemon=True)
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Collector:
    """What Prometheus asks for, made when it asks."""

    def __init__(self, clock: WallClock) -> None:
        self._clock = clock

    def collect(self) -> Iterator[Metric]:
        """Every number of the node."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        clock, now = self._clock, self._clock.progress()
        for name, value, what in (
            ("jwins_round", now.round, "Completed rounds"),
            ("jwins_waiting_seconds", now.waiting_s, "How long the node has been waiting for neighbours"),
            ("jwins_peers_connected", len(now.connected), "Peers that are connected and fit"),
            ("jwins_peers_suspected", len(now.suspected), "Peers that are not waited for"),
            ("jwins_patience_seconds", clock.patience.limit_s, "How long a neighbour is waited for now"),
        ):
            yield GaugeMetricFamily(name, what, value=value)
        sent = CounterMetricFamily("jwins_sent_bytes", "Bytes sent, by what they carried", labels=["kind"])
        for kind, size_bytes in clock.sent.by_kind().items():
            sent.add_metric([kind], size_bytes)
        yield sent
        overdue = CounterMetricFamily("jwins_overdue", "Rounds merged without a peer", labels=["peer"])
        refused = CounterMetricFamily("jwins_refused", "Messages that were not accepted", labels=["peer"])
        for peer, known in clock.peers.items():
            overdue.add_metric([clock.names[peer]], clock.overdue[peer])
            refused.add_metric([clock.names[peer]], known.refused)
        yield overdue
        yield refused
        measured = GaugeMetricFamily("jwins_metric", "Of the newest evaluation", labels=["name"])
        for metric, mean in _measured(clock).items():
            if mean is not None:
                measured.add_metric([metric], mean)
        yield measured


def _measured(clock: WallClock) -> dict[str, float | None]:
    rows = [row for row in clock.recorder.rows if isinstance(row, EvalRow)]
    return {name: spread.mean for name, spread in rows[-1].metrics.items()} if rows else {}


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 52rem; padding: 0 1rem; color: #222;
  background: #fff }
table { border-collapse: collapse; width: 100%; margin: 0 0 1.5rem }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #ddd }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.bad { color: #a40000 }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818 } th, td { border-color: #444 }
  .bad { color: #ff8a80 } }
"""


def page(clock: WallClock) -> str:
    """The status page: where the node is, its neighbours, what it sent, what it measured, the last error."""
    now = clock.progress()
    names = clock.names
    title = html.escape(names[clock.node])
    state = "training" if not now.waiting_for else "waiting for " + ", ".join(names[i] for i in now.waiting_for)
    if now.waiting_for:
        limit_s = max(map(clock.limit_s, now.waiting_for))
        state += f" since {now.waiting_s:.0f} s (at most {limit_s:.0f} s)"
    facts = {"round": f"{now.round}", "state": state, "seconds": f"{now.time_s:.0f}"}
    facts |= {name: f"{value:.4f}" for name, value in _measured(clock).items() if value is not None}
    facts["last error"] = clock.journal.last_error or "none"
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    peers = "".join(_peer_row(clock, peer) for peer in clock.peers)
    kinds = "".join(
        f'<tr><td>{kind}</td><td class="n">{size_bytes:,}</td></tr>'
        for kind, size_bytes in clock.sent.by_kind().items()
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><h1>{title}</h1><table>{rows}</table><h2>Peers</h2><table><tr><th>peer</th><th>state</th>"
        f'<th class="n">round</th><th class="n">overdue</th><th class="n">refused</th></tr>{peers}</table>'
        f'<h2>Bytes sent</h2><table><tr><th>kind</th><th class="n">bytes</th></tr>{kinds}</table></body></html>'
    )


def _peer_row(clock: WallClock, peer: int) -> str:
    known = clock.peers[peer]
    state = (
        known.unfit
        or ("left" if known.left else "")
        or ("not waited for" if known.suspected else "")
        or ("connected" if known.met else "not connected")
    )
    bad = ' class="bad"' if known.unfit or known.suspected else ""
    numbers = (known.round, clock.overdue[peer], known.refused)
    cells = "".join(f'<td class="n">{number}</td>' for number in numbers)
    return f"<tr><td>{html.escape(clock.names[peer])}</td><td{bad}>{html.escape(state)}</td>{cells}</tr>"
