"""Replay: order, time, flags, what is left out on a live broker and why, refusals, and the command."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from broker.base import Broker
from broker.configuration import Listener, Setup
from broker.embedded import EmbeddedBroker
from broker.mosquitto import INSTALL_HINT, find_mosquitto
from edge.recording import Gap, Message, part_path
from edge.replay import Replay, Report, Selection, nodes_there_now
from protocol.errors import NotAuthorized
from protocol.messages import NodeState
from tests.support.mosquittos import ME, PASSWORD, Mosquitto
from tests.support.ports import free_port
from tests.support.recordings import (
    START_US,
    Program,
    hear,
    json_of,
    message,
    publish,
    recording_process,
    wire,
    write_recording,
)

ASK = "mindstream/v1/sprout/ask/tomato/memory_store/put"
REPLY = "mindstream/v1/tomato/reply/sprout/cli"
STATE = "mindstream/v1/{}/state"


def state(name: str) -> bytes:
    return msgspec.json.encode(NodeState(state=name, time_us=1))


@contextlib.contextmanager
def listening(broker: Broker) -> Iterator[Any]:
    with wire(broker.url, "ear") as ear:
        ear.subscribe("mindstream/v1/#")
        yield ear


def replayed(broker: Broker, *paths: Path, speed: float = math.inf, **selection: Any) -> Report:
    with wire(broker.url, "replay") as client:
        return Replay(client, paths, Selection(**selection), speed).run()


def test_what_was_recorded_is_published_in_exactly_its_order(broker: Broker, tmp_path: Path) -> None:
    path = tmp_path / "a.msrec"
    topics = [f"mindstream/v1/node{number % 5}/event/test" for number in range(3_000)]
    sent = [(topic, b"%d" % number, 1, False) for number, topic in enumerate(topics)]
    with wire(broker.url, "mouth") as mouth, recording_process(path, broker.url, "--count", len(sent)) as program:
        publish(mouth, sent)
        assert program.end()[0] == 0
    with EmbeddedBroker() as other, listening(other) as ear:
        report = replayed(other, path)
        found = hear(ear, len(sent))
    assert [(each.topic, each.payload) for each in found] == [(topic, payload) for topic, payload, _, _ in sent]
    assert (report.published, report.unacknowledged, report.stopped) == (3_000, 0, False)


def test_retain_and_expiry_are_kept_and_can_be_taken_back(broker: Broker, tmp_path: Path) -> None:
    path = tmp_path / "a.msrec"
    items = [
        message(0, STATE.format("tomato"), payload=state("lost"), flags=2),  # the topic table retains it
        message(1, "mindstream/v1/tomato/other", payload=b"kept", flags=3, expiry_s=1000),
        message(2, payload=b"gone", flags=2, expiry_s=777),
    ]
    write_recording(path, [items])
    with listening(broker) as ear:
        replayed(broker, path)
        found = hear(ear, 3)
    assert [each.payload for each in found] == [each.payload for each in items]
    assert 700 < (found[2].expiry_s or 0) <= 777
    with listening(broker) as ear:
        late = {each.topic: each for each in hear(ear, 2)}
        assert set(late) == {items[0].topic, items[1].topic}
        assert 900 < (late[items[1].topic].expiry_s or 0) <= 1000
    with wire(broker.url, "replay") as client:
        report = Replay(client, [path], Selection(), math.inf).run(clear_retained=True)
    assert report.cleared == 2
    with listening(broker) as ear:
        assert not hear(ear, 1, timeout_s=0.5)


def test_time_is_kept_and_scaled(embedded_broker: EmbeddedBroker, tmp_path: Path) -> None:
    path = tmp_path / "a.msrec"
    write_recording(path, [[message(number * 500) for number in range(5)]])  # 2 s, 0.5 s apart
    with listening(embedded_broker) as ear, ThreadPoolExecutor(1) as other:
        began_s = time.monotonic()
        running = other.submit(replayed, embedded_broker, path, speed=4)
        times_s = []
        for _ in range(5):
            assert hear(ear, 1)
            times_s.append(time.monotonic() - began_s)
        report = running.result()
    # Late it may be on a busy machine; what it never is, is early.
    assert all(time_s >= number * 0.125 - 0.001 for number, time_s in enumerate(times_s)), times_s
    assert report.took_s >= 0.499
    assert report.behind_s == pytest.approx(report.took_s - 0.5)


def test_files_of_one_recording_and_of_others_follow_each_other(embedded_broker: Broker, tmp_path: Path) -> None:
    path = tmp_path / "a.msrec"
    write_recording(part_path(path, 1), [[message(0), message(100)]], "rotated", part=1)
    write_recording(part_path(path, 2), [[message(300)]], part=2)
    later = tmp_path / "b.msrec"
    # Another recording, begun 0.4 s after the first: its own clock begins at 0 again.
    other = [Message(START_US + 400_000, 0, "mindstream/v1/tomato/x", b"b", 2)]
    write_recording(later, [other], recording="another", started_us=START_US + 400_000)
    with listening(embedded_broker) as ear:
        report = replayed(embedded_broker, part_path(path, 1), part_path(path, 2), later, speed=2)
        found = hear(ear, 4)
    assert [each.payload for each in found] == [b"message 0", b"message 100", b"message 300", b"b"]
    assert report.took_s >= 0.199


def test_only_some_topics_and_times(embedded_broker: Broker, tmp_path: Path) -> None:
    path = tmp_path / "a.msrec"
    items = [message(number, f"mindstream/v1/{('tomato', 'sprout')[number % 2]}/event/x") for number in range(100)]
    write_recording(path, [items[:50], items[50:]])
    with listening(embedded_broker) as ear:
        report = replayed(
            embedded_broker,
            path,
            only=["mindstream/v1/sprout/#"],
            from_us=START_US + 20_000,
            to_us=START_US + 60_000,
        )
        found = hear(ear, report.published)
    assert [each.payload for each in found] == [b"message %d" % number for number in range(21, 60, 2)]


def test_commands_of_the_past_and_states_of_those_who_are_there_are_left_out(broker: Broker, tmp_path: Path) -> None:
    path = tmp_path / "a.msrec"
    items = [
        message(0, ASK),
        message(1, REPLY),
        message(2, "mindstream/v1/sprout/ask/tomato"),  # no shape of the table, and still an ask
        message(3, STATE.format("tomato"), payload=state("ready"), flags=3),
        message(4, STATE.format("gone"), payload=state("ready"), flags=3),
        message(5, STATE.format("old"), payload=state("ready"), flags=3),
        message(6, "mindstream/v1/tomato/event/x"),
    ]
    write_recording(path, [items])
    with wire(broker.url, "mouth") as mouth:
        publish(
            mouth,
            [(STATE.format("tomato"), state("ready"), 1, True), (STATE.format("gone"), state("lost"), 1, True)],
        )
        with wire(broker.url, "look") as look:
            there = nodes_there_now(look)
        assert there == {"tomato"}
        with wire(broker.url, "ear") as ear:
            ear.subscribe("mindstream/v1/#")
            assert len(hear(ear, 2)) == 2
            report = replayed(broker, path, asks=False, live_nodes=there)
            assert [each.payload for each in hear(ear, 3)] == [items[4].payload, items[5].payload, items[6].payload]
            assert (report.published, report.left_out_asks, report.left_out_retained) == (3, 3, 1)
            assert replayed(broker, path, asks=True).published == 7
            assert [each.topic for each in hear(ear, 7)] == [each.topic for each in items]


def test_gaps_and_damage_are_reported_and_the_rest_is_replayed(embedded_broker: Broker, tmp_path: Path) -> None:
    path = tmp_path / "a.msrec"
    gap = Gap("queue full", START_US, START_US, 5)
    write_recording(path, [[message(0), message(1)], [message(2)], [gap, message(3)]])
    data = bytearray(path.read_bytes())
    position = data.index(b"\x89MSREC", data.index(b"\x89MSREC", 10) + 10) + 70  # in the second block's body
    data[position] ^= 0x10
    path.write_bytes(data)
    with listening(embedded_broker) as ear:
        report = replayed(embedded_broker, path)
        assert [each.payload for each in hear(ear, 3)] == [b"message 0", b"message 1", b"message 3"]
    assert (report.gaps, report.missing, len(report.damage)) == (1, 6, 1)
    assert "damaged block 1" in report.damage[0]


def test_a_broker_that_lets_a_name_write_its_own_branch_only_says_so(tmp_path: Path) -> None:
    if find_mosquitto() is None:
        pytest.skip(f"Mosquitto is not installed: {INSTALL_HINT}")
    own, foreign = tmp_path / "own.msrec", tmp_path / "foreign.msrec"
    write_recording(own, [[message(0, "mindstream/v1/sprout/event/x")]])
    write_recording(foreign, [[message(0, "mindstream/v1/tomato/event/x")]])
    setup = Setup("device", tmp_path / "etc", tmp_path / "data", ME, (Listener(free_port()),))
    with Mosquitto(setup, "sprout", "tomato") as broker:
        url = f"mqtt://127.0.0.1:{broker.port}"
        for path in (own, foreign):
            with wire(url, "replay", username="sprout", password=PASSWORD) as client:
                replay = Replay(client, [path], Selection(), math.inf)
                if path is own:
                    assert replay.run().published == 1
                    continue
                with pytest.raises(NotAuthorized, match="Not authorized") as error:
                    replay.run()
                assert "own branch only" in error.value.hint


def test_the_command_replays_onto_a_private_broker(tmp_path: Path) -> None:
    path = tmp_path / "a.msrec"
    write_recording(path, [[message(0), message(1, ASK)]])
    program = Program("replay", path, "--private", "--json", "--delay", 2, "--hold")
    try:
        url = program.wait_for("private broker at ").split()[-1]
        with wire(url, "ear") as ear:
            ear.subscribe("mindstream/v1/#")
            assert [each.payload for each in hear(ear, 2)] == [b"message 0", b"message 1"]
        program.wait_for("stays")
        code, out, _ = program.stop()
    finally:
        program.kill()
    report = json_of(out)
    assert code == 0
    assert (report["url"], report["published"], report["left_out_asks"]) == (url, 2, 0)


def test_the_command_replays_onto_a_live_broker_and_ctrl_c_ends_it(broker: Broker, tmp_path: Path) -> None:
    path = tmp_path / "a.msrec"
    write_recording(path, [[message(0, ASK), message(1), message(600_000)]])
    with listening(broker) as ear:
        program = Program("replay", path, "--broker", broker.url, "--json")
        try:
            assert [each.payload for each in hear(ear, 1)] == [b"message 1"]
            code, out, _ = program.stop()
        finally:
            program.kill()
        assert code == 130
        report = json_of(out)
        assert (report["published"], report["left_out_asks"], report["stopped"]) == (1, 1, True)
        program = Program("replay", path, "--broker", broker.url, "--speed", "max", "--to", "10s", "--with-asks")
        code, out, _ = program.end()
        assert code == 0
        assert "2 messages published" in out
        assert [each.payload for each in hear(ear, 2)] == [b"message 0", b"message 1"]


def test_a_connection_that_breaks_ends_the_replay_with_what_was_done(
    embedded_broker: EmbeddedBroker, tmp_path: Path
) -> None:
    path = tmp_path / "a.msrec"
    write_recording(path, [[message(number * 20) for number in range(2_000)]])
    program = Program("replay", path, "--broker", embedded_broker.url, "--json")
    try:
        with listening(embedded_broker) as ear:
            assert hear(ear, 3)
        embedded_broker.stop()
        code, _, err = program.end()
    finally:
        program.kill()
    assert code == 3
    assert "mindstream doctor" in err


@pytest.mark.slow
def test_the_benchmark_runs_and_nothing_is_lost_or_out_of_order() -> None:
    from bench.record import run

    figures = run(quick=True)
    assert figures["replay_order_errors"] == figures["recorded_messages_lost"] == 0
    size = figures["bytes_per_message"]
    assert isinstance(size, float)
    assert 20 < size < 200


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--speed", "0"), "neither a number above 0 nor max"),
        (("--speed", "fast"), "neither a number above 0 nor max"),
        (("--from", "tomorrow"), "is no time"),
        (("--private", "--broker", "mqtt://127.0.0.1:1"), "not both"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    options: tuple[str, ...], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from edge.cli import main

    path = tmp_path / "a.msrec"
    write_recording(path, [[message(0)]])
    with pytest.raises(SystemExit) as ended:
        main(["replay", str(path), *options])
    assert ended.value.code == 2
    assert text in capsys.readouterr().err.replace("\n", " ")


def test_times_are_offsets_or_dates(tmp_path: Path) -> None:
    from edge.cli.record import _time_us

    assert _time_us("90s", START_US, "--from") == START_US + 90_000_000
    assert _time_us("1.5min", START_US, "--from") == START_US + 90_000_000
    assert _time_us("2026-11-21T10:15:00Z", 0, "--from") == 1_795_256_100_000_000
    assert _time_us("2026-11-21T11:15:00+01:00", 0, "--to") == 1_795_256_100_000_000
    assert _time_us("", START_US, "--to") is None
