"""What the operator sees."""

from __future__ import annotations

import json
import logging
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from wires import Running, Wires, World

from jwins.errors import UsageError
from jwins.net.journal import Journal, write_journal
from jwins.net.status import serve


def get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return str(answer.read().decode())


def test_page_and_metrics_tell_where_the_node_is(wires: Wires) -> None:
    world = World(3, rounds=4, patience_s=60.0)
    clocks = world.clocks(wires)
    running = Running()
    with serve(clocks[0], 0) as port:
        for node in (0, 1):
            running.start(node, clocks[node])
        running.wait_until(lambda: bool(clocks[0].progress().waiting_for == (2,)), "node 0 waits for node 2")
        page = get(port, "/")
        assert "waiting for node-2 since" in page
        assert "not connected" in page
        running.start(2, clocks[2])
        running.join_all()
        text = get(port, "/metrics")
        assert "finished" not in page
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(port, "/etc/passwd")
        with pytest.raises(UsageError, match="for metrics: Address already in use"), serve(clocks[1], port):
            pass
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["jwins_round",] == 4
    assert found["jwins_sent_bytes_total", "values"] == clocks[0].sent.values > 0
    assert found["jwins_refused_total", "node-1"] == 0
    assert found["jwins_overdue_total", "node-2"] == 0
    assert 0 <= found["jwins_metric", "accuracy"] <= 1


def test_names_cannot_change_the_page(wires: Wires) -> None:
    world = World(2)
    clock = world.clock(0, wires, names=("<script>a", "<script>b"))
    clock.journal.error("broken", why="<script>c")
    with serve(clock, 0) as port:
        page = get(port, "/")
    assert "<script>" not in page
    assert page.count("&lt;script&gt;") == 4


def test_events_are_lines_of_json(tmp_path: Path) -> None:
    handler = write_journal(tmp_path / "log.jsonl")
    journal = Journal("alice")
    journal.info("met", peer="bob", round=3)
    journal.error("no checkpoint", problem="No space left on device")
    logging.getLogger("jwins.net").removeHandler(handler)
    handler.close()
    first, second = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    time = first.pop("time")
    assert first == {"level": "info", "node": "alice", "event": "met", "peer": "bob", "round": 3}
    assert time.endswith("Z")
    assert second["level"] == "error"
    assert journal.last_error == 'no checkpoint: problem="No space left on device"'
