"""The session's table, and sessions in the simulated world: faults one by one, and schedules of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from world import Fault, Schedule, Tally, ViolationError, World, play, shrunk

from jwins.errors import UsageError
from jwins.net import events as ev
from jwins.net.neighbour_timeout import NeighbourTimeout
from jwins.net.peer_session import AWAITED, TRANSITIONS, PeerSession, Signal, State
from jwins.sharing.update import Update
from jwins.wire.frame import VERSION, Bye, Frame, Hello

BATCH = 50
QUICK, ALL = 300, 1500
"""Seeds of `make test`, and with those of `make test-slow`; `make simulate` plays a million."""

# --- The table --------------------------------------------------------------------------------------------


def test_every_state_but_removed_has_a_way_out_and_can_be_reached() -> None:
    assert set(TRANSITIONS) == set(State)
    reached, todo = {State.CONNECTING}, [State.CONNECTING]
    while todo:
        for target in TRANSITIONS[todo.pop()].values():
            if target not in reached:
                reached.add(target)
                todo.append(target)
    assert reached == set(State)
    for state, row in TRANSITIONS.items():
        assert (set(row.values()) - {state} == set()) == (state is State.REMOVED)
        assert Signal.DISCONNECTED in row, "a connection may break at any time"
        assert Signal.REMOVED in row, "the roster may change at any time"


def test_a_peer_that_is_not_waited_for_can_be_waited_for_again() -> None:
    for state in set(State) - AWAITED - {State.REMOVED}:
        reached, todo = {state}, [state]
        while todo:
            for target in TRANSITIONS[todo.pop()].values():
                if target not in reached:
                    reached.add(target)
                    todo.append(target)
        assert State.ACTIVE in reached


def test_what_the_table_does_not_list_is_a_mistake() -> None:
    session = PeerSession(NeighbourTimeout(1.0))
    with pytest.raises(UsageError, match="READMITTED while connecting"):
        session.apply(Signal.READMITTED)


def test_the_diagram_in_the_manual_is_that_of_the_table() -> None:
    pages = [page.read_text() for page in Path(__file__).parents[2].glob("docs/**/faults.md")]
    assert any(diagram() in page for page in pages), "write the output of diagram() into faults.md"


def diagram() -> str:
    """The table as a Mermaid diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {State.CONNECTING}"]
    for state, row in TRANSITIONS.items():
        by_target: dict[State, list[str]] = {}
        for signal, target in row.items():
            if target is not state:
                by_target.setdefault(target, []).append(signal.value)
        lines += [f"    {state} --> {target}: {' / '.join(names)}" for target, names in by_target.items()]
    return "\n".join([*lines, f"    {State.REMOVED} --> [*]"]) + "\n"


# --- One fault after the other ----------------------------------------------------------------------------

TWO = Schedule(seed=1, nodes=2, train_s=(1.0, 1.0))
THREE = Schedule(seed=1)


def with_faults(schedule: Schedule, *faults: Fault) -> Schedule:
    return replace(schedule, faults=faults)


def events(world: World, node: int, event: str) -> list[dict[str, object]]:
    return [fields for _, found, fields in world.reports[node] if found == event]


@pytest.mark.parametrize("seconds", [x / 10 for x in range(40, 240, 10)])
def test_restarted_from_its_checkpoint_a_node_takes_the_round_of_the_others_at_once(seconds: float) -> None:
    """Twenty times, each with another time away; nobody completes a round alone without a timeout."""
    world = play(with_faults(TWO, Fault(5.3, "kill", 0, seconds=seconds, how="newest")))
    alone = [at for at, merged in world.merges[0].items() if not merged]
    assert len(alone) <= 1, f"rounds {alone} were completed alone after the restart"


@pytest.mark.parametrize("seconds", [x / 10 for x in range(1, 101, 5)])
def test_restarted_from_scratch_a_node_begins_with_the_model_of_another(seconds: float) -> None:
    world = play(with_faults(TWO, Fault(8.3, "kill", 0, seconds=seconds, how="none")))
    (taken,) = events(world, 0, "bootstrapped")
    process = world.processes[0]
    assert process is not None
    assert process.session.skipped_rounds > 0
    assert min(world.merges[0], default=0) >= int(str(taken["round"])) - 1, (
        "it merged nothing of its own before"
    )


@pytest.mark.parametrize("kind", ["other_settings", "other_version"])
@pytest.mark.parametrize("seed", range(10))
def test_other_settings_and_versions_are_named_on_both_sides_within_seconds(seed: int, kind: str) -> None:
    schedule = Schedule(seed, 3, faults=(Fault(0.0, kind, seed % 3),))
    world = World(schedule)
    world.run(5.0)
    for node in range(3):
        for peer in range(3):
            process = world.processes[node]
            assert process is not None
            if peer != node and (node == seed % 3) != (peer == seed % 3):
                known = process.session.peers[peer]
                assert known.state is State.INCOMPATIBLE
                values = {"raw", "other"} if kind == "other_settings" else {str(VERSION), f"1{VERSION}"}
                assert values <= set(known.mismatch.replace(",", "").split()), known.mismatch


def test_a_wait_for_one_late_and_one_absent_neighbour_polls_at_deadlines_only() -> None:
    slow = Schedule(1, 3, train_s=(0.2, 30.0, 0.2), faults=(Fault(0.0, "late_start", 2, seconds=3600.0),))
    world = World(slow)
    world.run(100.0)
    assert max(world.wakes) < 40


def test_neither_start_up_nor_a_crash_makes_the_next_wait_longer() -> None:
    faults = (Fault(0.0, "late_start", 1, seconds=20.0), Fault(30.0, "kill", 1, seconds=3.0, how="newest"))
    world = World(with_faults(THREE, *faults))
    world.run(60.0)
    process = world.processes[0]
    assert process is not None
    assert (
        process.session.waiting.limit_s(1)
        == process.session.waiting.limit_s(2)
        == process.session.settings.timeout_s
    )


def test_a_pause_of_this_process_is_no_silence_of_others() -> None:
    world = play(with_faults(THREE, Fault(5.0, "pause", 0, seconds=60.0)))
    assert not events(world, 0, "suspect")


def test_a_node_that_is_forty_times_slower_keeps_merging() -> None:
    world = World(Schedule(3, 3, train_s=(40.0, 1.0, 1.0)))
    world.run(1200.0)
    newest = max(at for at, merged in world.merges[0].items() if merged)
    assert newest > max(world.merges[1]) - 400, "it has merged in the last minutes"


def test_a_member_that_claims_to_be_far_ahead_makes_no_node_jump() -> None:
    for how in ("far ahead", "early frames"):
        faults = (Fault(0.0, "hostile", 2, how=how), Fault(0.0, "late_start", 1, seconds=1.5))
        world = play(with_faults(THREE, *faults))
        for node in (0, 1):
            process = world.processes[node]
            assert process is not None
            assert process.session.skipped_rounds == 0
            assert process.session.end is None


def test_after_it_took_over_a_model_a_node_believes_no_round_that_cannot_be_reached() -> None:
    """It has no round of its own yet that shows how fast others can be."""
    faults = (Fault(0.0, "hostile", 1, 0, 1.4, "far ahead"), Fault(1.46, "quit", 0, 1, 11.7))
    world = play(Schedule(772, 2, sharing="choco", train_s=(2.0, 6.0), faults=faults))
    assert events(world, 0, "bootstrapped")


@pytest.mark.parametrize("seed", range(3))
def test_members_join_leave_and_renew_certificates_while_one_reads_its_file_late(seed: int) -> None:
    faults = (
        Fault(3.0, "join", 4, other=0, seconds=8.0, how="bootstraps"),
        Fault(6.0, "leave", 1, other=2, seconds=8.0),
        Fault(9.0, "new_certificate", 3, other=4, seconds=8.0),
        Fault(12.0, "kill", 2, seconds=1.0, how="newest"),
    )
    world = play(Schedule(seed, 5, train_s=(1.0,) * 5, faults=faults))
    assert world.ended == {1: "removed"}
    assert events(world, 4, "bootstrapped")
    for node in (0, 2, 3, 4):
        process = world.processes[node]
        assert process is not None
        assert process.rosters[-1].version == 3
        assert process.session.peers[1].state is State.REMOVED


def test_restarted_before_the_round_in_which_another_joins_a_node_sends_it_a_model() -> None:
    """The earlier process read the roster; this one knows of it from the file that it kept."""
    faults = (
        Fault(4.83, "join", 3, other=1, seconds=4.37, how="bootstraps"),
        Fault(9.22, "kill", 0, other=2, seconds=31.04, how="newest"),
    )
    world = play(Schedule(107, 4, ring=True, train_s=(2.0, 2.0, 2.6, 2.0), faults=faults))
    assert events(world, 3, "bootstrapped")


def test_back_from_before_a_change_of_the_graph_a_node_asks_its_neighbours_of_today_for_a_model() -> None:
    faults = (
        Fault(1.13, "quit", 2, seconds=42.62),
        Fault(5.64, "slow", 0, seconds=4.21),
        Fault(9.93, "join", 3, seconds=0.08, how="bootstraps"),
    )
    world = play(Schedule(648, 4, ring=True, train_s=(2.0, 2.6, 2.6, 2.0), faults=faults))
    assert not events(world, 2, "no model")


def test_a_joiner_asks_a_provider_that_was_away_again_and_no_incompatible_one() -> None:
    faults = (
        Fault(0.0, "other_version", 1, other=0),
        Fault(0.28, "join", 2, other=1, seconds=12.15, how="bootstraps"),
        Fault(5.68, "clock", 0, other=1, seconds=16.4, how="back"),  # restarts node 0 after that time
    )
    world = play(Schedule(51007493, 3, ring=True, train_s=(6.0, 2.0, 2.0), faults=faults))
    asked = [fields["peer"] for _, event, fields in world.reports[2] if event == "requesting state"]
    assert asked == [0, 0]
    assert any(event == "bootstrapped" for _, event, _ in world.reports[2])


def test_late_frames_do_not_keep_out_the_frame_that_a_node_waits_for() -> None:
    """After a silence of one direction four late frames came first; the two then waited for each other."""
    faults = (
        Fault(0.01, "silence", 0, other=1, seconds=39.54),
        Fault(2.62, "slow", 1, other=0, seconds=4.98, how="with a full queue"),
        Fault(5.95, "clock", 0, other=1, seconds=0.09, how="back"),
    )
    world = play(Schedule(90005441, 2, faults=faults))
    at = [process.toy.round for process in world.processes if process is not None]
    assert max(at) - min(at) <= 1


@pytest.mark.parametrize("tenths", range(0, 40, 4))
def test_a_full_queue_for_half_a_second_loses_nothing(tenths: int) -> None:
    play(with_faults(THREE, Fault(tenths / 10, "slow", 0, seconds=0.5, how="with a full queue")))


@pytest.mark.parametrize("commands", range(1, 6))
def test_killed_after_any_command_a_node_goes_on_from_its_checkpoint(commands: int) -> None:
    play(with_faults(THREE, Fault(4.0, "kill", 0, other=commands, seconds=1.0, how="newest")))


def test_who_has_said_bye_is_not_waited_for_again_on_the_same_connection() -> None:
    world = World(TWO)
    world.run(3.0)
    process = world.processes[0]
    assert process is not None
    world.said[1].add("finished")
    for message in (Bye(1, 2, "finished"), Hello(1, 2, 3, "raw", {}, b"x0", None)):
        world.feed(0, ev.MessageReceived(1, world.rules.wire.pack(message).data))
    assert process.session.peers[1].state is State.LEFT


def test_after_a_restart_a_node_waits_for_who_had_said_bye_before() -> None:
    """Both are ended by an operator, one after the other, and started again in the other order."""
    faults = (Fault(3.0, "quit", 1, seconds=5.0), Fault(5.0, "quit", 0, seconds=1.0))
    world = World(with_faults(TWO, *faults))
    world.run(5.0)
    process = world.processes[0]
    assert process is not None
    assert process.session.peers[1].state is State.LEFT
    before = len(events(world, 0, "merged with nobody"))
    world.run(20.0)
    process = world.processes[0]
    assert process is not None
    assert process.session.peers[1].state is State.ACTIVE
    assert len(events(world, 0, "merged with nobody")) == before


def test_a_node_that_has_ended_answers_a_late_frame_with_no_hello() -> None:
    world = World(replace(TWO, rounds=5, faults=(Fault(0.0, "late_start", 1, seconds=600.0),)))
    world.run(1.0)
    process = world.processes[0]
    assert process is not None
    world.run(590.0)
    session = process.session
    assert session.end is not None
    session.handle(ev.Connected(1, session.handshake.greeting), world.now)
    late = (Hello(1, 0, 3, "raw", {}, b"x0", 0), Frame(1, 0, Update(3, None, torch.zeros(3))))
    answers = [session.handle(ev.MessageReceived(1, world.rules.wire.pack(m).data), world.now) for m in late]
    assert session.peers[1].state is State.BEHIND
    first, second = [[c.label for c in answer if isinstance(c, ev.Transmit)] for answer in answers]
    assert first[-1] == "control", "a Bye comes last"
    assert second == []


def test_nothing_arrives_that_was_sent_into_a_connection_that_had_ended() -> None:
    """One side of it notices the end late; its messages do not arrive before the Hello of a later one."""
    faults = (
        Fault(0.0, "hostile", 2, how="bad models"),
        Fault(2.35, "silence", 1, seconds=21.69, how="breaks"),
        Fault(5.15, "half_open", 0, other=1, seconds=4.09),
    )
    play(Schedule(9006094, 3, ring=True, train_s=(2.6, 2.6, 2.0), faults=faults))


# --- Schedules --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first",
    [*range(0, QUICK, BATCH), *(pytest.param(i, marks=pytest.mark.slow) for i in range(QUICK, ALL, BATCH))],
)
def test_schedules_of_faults(first: int) -> None:
    """One that fails prints itself, without the faults that it fails without."""
    tally = Tally()
    for seed in range(first, first + BATCH):
        schedule = Schedule.drawn(seed)
        try:
            play(schedule, tally)
        except ViolationError:
            small = shrunk(schedule)
            with pytest.raises(ViolationError) as found:
                play(small)
            pytest.fail(f"{found.value}\nplay({small.script()})")
    assert tally.rounds > 10 * BATCH
