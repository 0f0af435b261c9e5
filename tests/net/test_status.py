"""The status page and the metrics of a node, for its operator."""

from __future__ import annotations

import contextlib
import html
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from members import forked, free_port
from prometheus_client.parser import text_string_to_metric_families
from wires import Running, Wires, World

from jwins.errors import UsageError
from jwins.net.handshake import Handshake, greeting_mismatch, pack_greeting
from jwins.net.journal import Journal, write_journal
from jwins.net.roster_versions import RosterVersions
from jwins.net.status import MAX_REQUESTS, serve
from jwins.topology import FullyConnected


def get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return str(answer.read().decode())


def test_the_page_is_not_for_a_site_whose_name_leads_here(wires: Wires) -> None:
    drivers = World(2, rounds=1, timeout_s=60.0).drivers(wires)
    with serve(drivers[0], 0) as port:
        for name in ("localhost", "127.0.0.1", "LOCALHOST"):
            asked = urllib.request.Request(f"http://127.0.0.1:{port}/", headers={"Host": f"{name}:{port}"})
            with urllib.request.urlopen(asked, timeout=10) as answer:
                assert answer.status == 200
        for name in ("attacker.example", "localhost.attacker.example", "127.0.0.1.nip.io", ""):
            asked = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Host": name})
            with pytest.raises(urllib.error.HTTPError, match="421"):
                urllib.request.urlopen(asked, timeout=10)
    for driver in drivers:
        driver.transport.close()


def test_half_open_requests_take_few_threads(wires: Wires, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jwins.net.status._FewAtOnce.request_queue_size", 100)  # no connection is tried twice
    drivers = World(2, rounds=1, timeout_s=60.0).drivers(wires)
    before = threading.active_count()
    with serve(drivers[0], 0) as port, contextlib.ExitStack() as open_ones:
        for _ in range(5 * MAX_REQUESTS):
            half_open = open_ones.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            with contextlib.suppress(OSError):  # those beyond the limit are closed
                half_open.sendall(b"GET / HTTP/1.1\r\n")
            assert threading.active_count() <= before + 1 + MAX_REQUESTS
    for driver in drivers:
        driver.transport.close()


def test_page_and_metrics_tell_where_the_node_is(wires: Wires) -> None:
    world = World(3, rounds=4, timeout_s=60.0)
    drivers = world.drivers(wires)
    running = Running()
    with serve(drivers[0], 0) as port:
        for node in (0, 1):
            running.start(node, drivers[node])
        running.wait_until(lambda: bool(drivers[0].progress().waiting_for == (2,)), "node 0 waits for node 2")
        page = get(port, "/")
        assert "waiting for node-2 for" in page
        assert "not connected" in page
        running.start(2, drivers[2])
        running.join_all()
        text = get(port, "/metrics")
        assert "finished" not in page
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(port, "/etc/passwd")
        with pytest.raises(UsageError, match="for metrics: Address already in use"), serve(drivers[1], port):
            pass
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["jwins_round",] == 4
    assert found["jwins_roster_version",] == 0
    assert found["jwins_sent_bytes_total", "values"] == drivers[0].sent.values > 0
    assert found["jwins_refused_total", "node-1"] == 0
    assert found["jwins_timed_out_total", "node-2"] == 0
    assert 0 <= found["jwins_metric", "accuracy"] <= 1


def test_the_version_of_the_roster_is_shown(wires: Wires) -> None:
    topology = RosterVersions(3, lambda count: FullyConnected(num_nodes=count, seed=1))
    topology.add(0, 0, (0, 1))
    driver = World(3, topology=topology).driver(0, wires)
    with serve(driver, 0) as port:
        assert "roster version" not in get(port, "/")
        topology.add(2, 0, (0, 2))
        assert '<th>roster version</th><td class="">2</td>' in get(port, "/")
        assert "jwins_roster_version 2.0" in get(port, "/metrics")
    assert driver.progress().roster_version == 2


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_process_does_not_keep_the_port(wires: Wires) -> None:
    driver, port = World(3).driver(0, wires), free_port()
    with contextlib.ExitStack() as lives:
        with serve(driver, port):
            assert lives.enter_context(forked([port])) == 0
        with serve(driver, port):
            assert "round 0" in get(port, "/")


def test_names_cannot_change_the_page(wires: Wires) -> None:
    world = World(2)
    driver = world.driver(0, wires, names=("<script>a", "<script>b"))
    driver.journal.error("broken", why="<script>c")
    with serve(driver, 0) as port:
        page = get(port, "/")
    assert "<script>" not in page
    assert page.count("&lt;script&gt;") == 4


def test_events_are_lines_of_json(tmp_path: Path) -> None:
    journal = Journal("alice")
    with write_journal(tmp_path / "log.jsonl"):
        journal.info("active", peer="bob", round=3)
        journal.error("no checkpoint", problem="No space left on device")
    first, second = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    time = first.pop("time")
    assert first == {"level": "info", "node": "alice", "event": "active", "peer": "bob", "round": 3}
    assert time.endswith("Z")
    assert second["level"] == "error"
    assert journal.last_error == 'no checkpoint: problem="No space left on device"'


def test_warnings_are_on_stderr_beside_the_file_unless_the_program_handles_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    journal = Journal("alice")
    with write_journal(tmp_path / "log.jsonl", "alice"):
        journal.info("active", peer="bob")
        journal.error("incompatible peer", peer="bob")
        assert capsys.readouterr().err == "alice: incompatible peer: peer=bob\n"
        monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])
        journal.error("incompatible peer", peer="carol")
        assert not capsys.readouterr().err
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("finished", "finished"),
        ("", ""),
        ("fertig-für-heute", "fertig-für-heute"),
        ("two words", '"two words"'),
        ("gone\nalice:\tmet:\tpeer=mallory", r'"gone\nalice:\tmet:\tpeer=mallory"'),
        ("\x1b[2Kgone", r'"\u001b[2Kgone"'),
        ("\u202egone", r'"\u202egone"'),
        ("a\xa0b", r'"a\u00a0b"'),
        ('"gone"', r'"\"gone\""'),
    ],
)
def test_what_a_peer_says_stays_one_word_of_one_line(
    text: str, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "jwins.net"):
        Journal("alice").info("bye", peer="bob", reason=text)
    assert caplog.messages == [f"alice: bye: peer=bob reason={line}"]
    ours = Handshake(3, "raw", b"", agreed={"sharing": "full"})
    hello = ours.hello(0, 0, None, True)
    for theirs in (replace(hello, codec=f"{text}."), replace(hello, versions={"sharing": f"{text}."})):
        assert ours.hello_mismatch(theirs).isprintable()
    theirs = pack_greeting(b"1", {f"{text}.": "1", "codec": f"{text}."})
    assert greeting_mismatch(theirs, pack_greeting(b"2", {"codec": "raw"})).isprintable()


# --- In a browser -----------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

FRAMED = """<!DOCTYPE html><html><body><iframe id="page" style="width:WIDTHpx;height:900px;border:0"
  srcdoc="PAGE"></iframe><pre id="found"></pre><script>
const frame = document.getElementById("page");
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement, problems = [];
  for (const part of [root, ...page.querySelectorAll(".scroll")])
    if (part.scrollWidth > part.clientWidth) problems.push(`${part.tagName} is ${part.scrollWidth} wide`);
  const inside = page.createRange();
  for (const block of page.querySelectorAll("h1,h2,p,td,th")) {
    inside.selectNodeContents(block);
    if (inside.getBoundingClientRect().right > block.getBoundingClientRect().right + 1.5)
      problems.push(`${block.textContent}: overflows`);
  }
  document.getElementById("found").textContent = JSON.stringify(problems);
};
</script></body></html>"""


def chromium(address: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-quic"]
    command += ["--enable-logging=stderr", "--v=0", f"--user-data-dir={folder / 'profile'}", *more, address]
    environment = {**os.environ, "HOME": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_it_and_has_nothing_to_say(wires: Wires, tmp_path: Path) -> None:
    """Every request and script is forbidden by the page's own header, and would leave a message."""
    world = World(4, rounds=400, timeout_s=60.0)
    long = "a-site-with-a-name-that-is-as-long-as-names-may-be-in-a-roster"
    drivers = world.drivers(wires, names=("alice", "bob", long, "dave"))
    running = Running()
    with serve(drivers[0], 0) as port:
        for node in (0, 1, 2):
            running.start(node, drivers[node])
        running.wait_until(lambda: bool(drivers[0].progress().waiting_for), "node 0 waits")
        drivers[0].journal.error("no checkpoint", problem="No space left on device: " + "x" * 200)
        address = f"http://127.0.0.1:{port}/"
        picture = tmp_path / "picture.png"
        shown = chromium(address, tmp_path, f"--screenshot={picture}", "--window-size=1280,900")
        assert picture.stat().st_size > 5000, shown.stderr[-500:]
        assert [line for line in shown.stderr.splitlines() if ":CONSOLE" in line] == []
        source = get(port, "/")
        for width in (390, 1280):
            assert overflows(source, width, tmp_path) == []
        wide = source.replace("<h1>", '<h1 style="width:2000px">')
        assert any("wide" in problem for problem in overflows(wide, 390, tmp_path))
        for driver in drivers:
            driver._stop = lambda: True
        running.join_all()


def overflows(source: str, width: int, folder: Path) -> list[Any]:
    """Return the elements that are wider than a page of this width."""
    source = re.sub('<meta http-equiv="refresh"[^>]*>', "", source)
    wrapper = folder / f"wrapper-{width}.html"
    wrapper.write_text(
        FRAMED.replace("WIDTH", str(width)).replace("PAGE", html.escape(source, quote=True)), "utf-8"
    )
    done = chromium(wrapper.as_uri(), folder, "--virtual-time-budget=5000", "--dump-dom")
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, f"the page did not load: {done.stderr[-500:]}"
    return list(json.loads(html.unescape(found[1])))
