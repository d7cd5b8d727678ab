"""Recordings under faults: a killed recorder, a broker that dies, a full disk; and a past that is replayed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from broker.base import Broker
from broker.embedded import EmbeddedBroker
from edge.recording import Recording
from protocol import codec
from protocol.messages import Event, MemoryPut, MemoryRecall
from tests.support.nodes import Node, Watcher, kill_broker, wait_for
from tests.support.recordings import Program, json_of, publish, read_all, recording_process, wire
from tests.support.waiting import DEADLINE_S, TTL_MS

TOPIC = "mindstream/v1/tomato/event/test"


def said(number: int) -> bytes:
    return codec.encode(Event("note", "info", f"number {number}"), source="tomato/test")


def test_a_killed_recorder_leaves_all_but_the_last_second(embedded_broker: Broker, tmp_path: Path) -> None:
    broker = embedded_broker
    path = tmp_path / "killed.msrec"
    with wire(broker.url, "mouth") as mouth, recording_process(path, broker.url) as program:
        publish(mouth, [(TOPIC, said(number), 1, False) for number in range(300)])

        def recorded() -> int:
            with Recording(path) as source:
                return source.index.messages

        wait_for(lambda: recorded() == 300, "the first messages are not in the file")
        publish(mouth, [(TOPIC, said(number), 1, False) for number in range(300, 400)])
        program.process.send_signal(signal.SIGKILL)
        program.process.wait()
    messages, _, damage = read_all(path)
    assert 300 <= len(messages) <= 400
    assert [each.payload[-10:] for each in messages] == [said(number)[-10:] for number in range(len(messages))]
    assert all(each.what == "cut" for each in damage)
    code, out, _ = Program("recordings", path).end()
    assert code == (1 if damage else 0)
    assert "never closed" in out


def test_a_broker_that_dies_is_a_gap_and_the_recording_goes_on(broker: Broker, tmp_path: Path) -> None:
    path = tmp_path / "gap.msrec"
    with recording_process(path, broker.url, "--json") as program:
        with wire(broker.url, "mouth") as mouth:
            publish(mouth, [(TOPIC, said(number), 1, False) for number in range(50)])
            wait_for(lambda: _recorded(path) == 50, "the first messages are not in the file")
        kill_broker(broker)
        broker.start()
        with wire(broker.url, "mouth") as mouth:

            def heard_again() -> bool:
                publish(mouth, [(TOPIC, b"again", 1, False)])
                return _recorded(path) > 50

            wait_for(heard_again, "it did not come back")
        code, out, _ = program.stop()
    assert code == 0
    assert json_of(out)["reconnects"] == 1
    messages, gaps, _ = read_all(path)
    assert {each.payload for each in messages[50:]} == {b"again"}
    assert [(gap.gap, gap.messages) for gap in gaps] == [("disconnected", None)]
    assert gaps[0].first_us < gaps[0].last_us
    assert messages[49].time_us <= gaps[0].first_us


def _recorded(path: Path) -> int:
    with Recording(path) as source:
        return source.index.messages


def test_a_full_disk_is_said_and_the_recording_is_whole_up_to_it(embedded_broker: Broker, tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "mindstream-test", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        path = folder / "full.msrec"
        url = embedded_broker.url
        with wire(url, "mouth") as mouth, recording_process(path, url) as program:
            deadline_s = time.monotonic() + DEADLINE_S
            while program.process.poll() is None:
                assert time.monotonic() < deadline_s
                publish(mouth, [(TOPIC, os.urandom(20_000), 1, False) for _ in range(20)])
            code, out, err = program.end()
        assert code == 1
        assert "No space left on device" in err
        assert "free some space" in err
        assert "LOST" in out
        messages, gaps, _ = read_all(path)
        assert len(messages) > 100
        with Recording(path) as source:
            # The index, or even a gap, may have found room; else the file is as one that was cut.
            assert source.index.lost or not source.closed_whole
            assert sum(gap.messages or 0 for gap in gaps) <= source.index.lost
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_past_that_is_replayed_commands_nobody_and_does_nothing_twice(
    embedded_broker: EmbeddedBroker, tmp_path: Path
) -> None:
    """Onto the very broker that it was recorded from, with its node there: the worst place for it."""
    url, path = embedded_broker.url, tmp_path / "past.msrec"
    node = Node(tmp_path, "tomato", url, ("memory_store",))
    watcher = Watcher(url)
    node.start()
    try:
        watcher.wait_node_ready("tomato", ("memory_store",))
        with recording_process(path, url) as program:
            for number in range(3):
                watcher.bus.ask("tomato", MemoryPut(f"plum {number}"), ttl_ms=TTL_MS)
            watcher.bus.ask("tomato", MemoryRecall("plum"), ttl_ms=TTL_MS)
            wait_for(lambda: _recorded(path) >= 9, "the recording has not all of it")
            assert program.stop()[0] == 0
        code, out, _ = Program("replay", path, "--broker", url, "--speed", "max", "--json").end()
        report = json_of(out)
        assert (code, report["live_nodes"], report["left_out_asks"]) == (0, ["tomato"], 8)
        assert report["left_out_retained"] > 0
        watcher.bus.ask("tomato", MemoryPut("plum 3"), ttl_ms=TTL_MS)
        assert sorted(text for _, text in node.memories()) == [f"plum {number}" for number in range(4)]
        # Even commanded again, each is one memory: their ids are known.
        code, out, _ = Program("replay", path, "--broker", url, "--speed", "max", "--with-asks", "--json").end()
        assert (code, json_of(out)["left_out_asks"]) == (0, 0)
        watcher.bus.ask("tomato", MemoryPut("plum 4"), ttl_ms=TTL_MS)
        assert sorted(text for _, text in node.memories()) == [f"plum {number}" for number in range(5)]
        assert watcher.state("tomato", "memory_store") == "ready"
    finally:
        watcher.bus.stop()
        node.stop()
