"""Bad input on the bus: counted, answered where someone asked, and the service goes on within its memory.

The receiver is a live bus with hearings, in this process for what it counts and in a child for what it allocates;
the sender is a plain paho client of another program.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from typing import Any

import msgpack
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.base import Broker
from edge.bus import Bus
from protocol.ids import uuid7
from protocol.messages import Event, MemoryPut, SnapshotAnnounce
from tests.edge.bus_support import (
    PUT_TOPIC,
    Answers,
    Child,
    RawClient,
    envelope,
    put_envelope,
    wait_for,
)

MARS_PUT = PUT_TOPIC.format(node="mars")
MAX_GROWTH_BYTES = 160 * 1024 * 1024
"""What a flood may add to a receiver that may queue 200 messages and 64 MiB: the queue, and each decoded once."""


@pytest.fixture
def raw(broker: Broker) -> Iterator[RawClient]:
    client = RawClient(broker)
    yield client
    client.close()


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def service(broker: Broker, answers: Answers) -> Iterator[Bus]:
    bus = Bus(url=broker.url, node="sprout", client="memory_store")
    bus.hear(MemoryPut, answers)
    bus.hear(Event, lambda message: None, service="raw")
    bus.hear(SnapshotAnnounce, lambda message: None)
    bus.start()
    yield bus
    bus.stop(timeout_s=2.0)


@pytest.fixture
def child(broker: Broker) -> Iterator[Child]:
    made = Child("puts", broker.url)
    made.wait_for("ready")
    yield made
    made.kill()


def assert_it_still_answers(raw: RawClient) -> None:
    identifier = uuid7()
    raw.put(put_envelope("good", id=identifier))
    assert raw.answer_to(identifier)["type"] == "memory.stored"


def with_data(data: bytes) -> bytes:
    """A put whose data are these bytes."""
    return put_envelope("x", data=None).replace(b"\xa4data\xc0", b"\xa4data" + data)


PUT = {"text": "x"}
BAD_ASKS: dict[str, tuple[dict[str, Any], str, str, str, str]] = {
    # what is changed, then the error's code, its type, its field, and a part of its reason
    "text of the wrong type": ({"data": {"text": 5}}, "malformed", "memory.put", "text", "Expected `str`"),
    "text missing": ({"data": {}}, "malformed", "memory.put", "text", "missing required field"),
    "text empty": ({"data": {"text": ""}}, "malformed", "memory.put", "text", "length >= 1"),
    "scope no name": ({"data": {**PUT, "scope": "A/#"}}, "malformed", "memory.put", "scope", "regex"),
    "time negative": ({"data": {**PUT, "time_us": -1}}, "malformed", "memory.put", "time_us", ">= 0"),
    "data a list": ({"data": [1, 2]}, "malformed", "memory.put", "", "Expected `object`"),
    "data nil": ({"data": None}, "malformed", "memory.put", "", "Expected `object`"),
    "another version": ({"v": 2}, "unsupported_version", "memory.put", "v", "unsupported version"),
    "unknown type": ({"type": "memory.teleport"}, "unknown_type", "memory.teleport", "type", "unknown"),
    "type of another topic": ({"type": "event", "data": {}}, "wrong_topic", "event", "type", "wrong topic"),
    "type of another verb": (
        {"type": "memory.recall", "data": {"query": "x"}},
        "wrong_topic",
        "memory.recall",
        "type",
        "wrong topic",
    ),
    "source of another node": ({"source": "sprout/raw"}, "wrong_topic", "memory.put", "source", "not the owner"),
}


@pytest.mark.parametrize("name", BAD_ASKS)
def test_a_bad_ask_is_counted_and_its_asker_told_where_and_why(
    service: Bus, answers: Answers, raw: RawClient, name: str
) -> None:
    changes, code, type, field, reason = BAD_ASKS[name]
    identifier = uuid7()
    raw.put(put_envelope("x", id=identifier, **changes))
    answer = raw.answer_to(identifier)
    assert answer["type"] == "error"
    error = answer["data"]
    assert (error["code"], error["topic"], error.get("field", "")) == (code, MARS_PUT, field)
    assert error["type"] == type
    assert reason in error["reason"]
    assert service.counters[f"refused.{code}"] == 1
    assert service.counters["event.refused-message"] == 1
    assert answers.texts == []
    assert_it_still_answers(raw)


NO_ASKS = {
    "empty": b"",
    "no msgpack": b"\xc1",
    "cut": put_envelope("x")[:-3],
    "not a map": msgpack.packb([1, 2, 3]),
    "an int": b"\x01",
    "text, not bytes": b"hello",
    "id missing": put_envelope("x", id=...),
    "id a number": put_envelope("x", id=7),
    "id as long as a book": put_envelope("x", id="x" * 200_000),
    "reply_to as long as a book": put_envelope("x", reply_to="x" * 200_000),
    "type a list": put_envelope("x", type=[1]),
    "source missing": put_envelope("x", source=...),
    "data missing": put_envelope("x", data=...),
    "time to live a text": put_envelope("x", ttl_ms="soon"),
    "time to live misspelt": put_envelope("x").replace(b"\xa6ttl_ms", b"\xa6ttl_xx"),
    "invalid UTF-8 in the type": put_envelope("x").replace(b"memory.put", b"memory\xff\xfeut"),
    "invalid UTF-8 in the text": put_envelope("xyz").replace(b"\xa3xyz", b"\xa3\xff\xfe\xfd"),
    "a list that says it has four billion items": put_envelope("x", data=...)[:-1] + b"\xa4data\xdd\xff\xff\xff\xff",
    "a map that says it has four billion items": b"\xdf\xff\xff\xff\xff\xa1v\x01",
    "a text that says it has four gigabytes": b"\x81\xa1v\xdb\xff\xff\xff\xff",
    "bytes that say they are four gigabytes": b"\x81\xa4data\xc6\xff\xff\xff\xff",
    "lists a hundred thousand deep": b"\x91" * 100_000 + b"\xc0",
    "maps a hundred thousand deep in data": with_data(b"\x81\xa1a" * 100_000 + b"\xc0"),
    "keys that are no text": msgpack.packb({1: 2, b"v": 1, None: 0}),
    "the same key twice": b"\x82\xa1v\x01\xa1v\x02",
    "an extension type": msgpack.packb(msgpack.ExtType(5, b"x" * 100)),
    "a timestamp that is none": b"\xc7\x0c\xff" + b"\xff" * 12,
}


@pytest.mark.parametrize(("name", "payload"), NO_ASKS.items(), ids=list(NO_ASKS))
def test_what_is_no_ask_at_all_is_counted_and_survived(
    service: Bus, answers: Answers, raw: RawClient, name: str, payload: bytes
) -> None:
    before = sum(count for key, count in service.counters.snapshot().items() if key.startswith("refused."))
    raw.put(payload)
    wait_for(
        lambda: (
            sum(count for key, count in service.counters.snapshot().items() if key.startswith("refused.")) == before + 1
        ),
        f"{name}: it is counted",
    )
    assert service.counters["failed.receive"] == 0
    assert answers.texts == []
    assert_it_still_answers(raw)


@pytest.mark.parametrize(
    "level",
    [
        "ü",
        "\U0001f345",
        "A",
        "-x",
        "a b",
        "a" * 64,
        "a" * 20_000,
        "",
        "..",
        "$sys",
        "\u202e",
        "%2f",
        "x\u00ad",
        "\u200b",
    ],
)
def test_a_hostile_name_in_a_topic_is_refused_and_counted(
    service: Bus, answers: Answers, raw: RawClient, level: str
) -> None:
    raw.publish(f"mindstream/v1/{level}/ask/sprout/memory_store/put", put_envelope("x"))
    wait_for(lambda: service.counters["refused.wrong_topic"] == 1, "it is refused")
    assert answers.texts == []
    assert_it_still_answers(raw)


def test_an_answer_cannot_be_led_to_another_topic(service: Bus, raw: RawClient) -> None:
    """``reply_to`` is a name, checked as such: an answer to anything else is not sent, and counted."""
    for reply_to in ("a/b", "#", "+", "../x", "", "Ä"):
        raw.put(put_envelope("x", reply_to=reply_to))
    wait_for(lambda: service.counters["dropped.reply"] == 6, "each is counted")
    assert_it_still_answers(raw)
    assert len(raw.answers()) == 1


def test_a_message_above_its_types_limit_is_refused(service: Bus, raw: RawClient) -> None:
    identifier = uuid7()
    raw.put(put_envelope("x", id=identifier, data={"text": "x" * 400_000}))
    error = raw.answer_to(identifier)["data"]
    assert (error["code"], error["type"], error["reason"]) == ("too_large", "memory.put", "too large")
    assert_it_still_answers(raw)


def test_bad_messages_that_are_no_asks_are_counted_and_not_answered(service: Bus, raw: RawClient) -> None:
    raw.publish("mindstream/v1/mars/event/raw", envelope("event", {"name": "NO", "severity": "info", "text": ""}))
    raw.publish("mindstream/v1/mars/snapshot/announce", b"\xff\xff")
    wait_for(lambda: service.counters["refused.malformed"] == 2, "both are counted")
    assert_it_still_answers(raw)
    assert len(raw.answers()) == 1


def test_answers_nobody_asked_for_are_counted(service: Bus, raw: RawClient) -> None:
    topic = "mindstream/v1/mars/reply/sprout/memory_store"
    raw.publish(topic, envelope("memory.merged", {}, correlation=uuid7()))
    raw.publish(topic, envelope("memory.merged", {}, correlation=""))
    raw.publish(topic, b"\x00" * 1000)
    wait_for(lambda: service.counters["late_replies"] == 2, "two are late")
    wait_for(lambda: service.counters["refused.malformed"] == 1, "one is malformed")
    assert_it_still_answers(raw)


def mutated(seed: int) -> bytes:
    """A good ask with a few bytes changed, cut, doubled or put in."""
    rng = random.Random(seed)
    body = bytearray(put_envelope("some text", id=uuid7()))
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(body))
        change = rng.randrange(4)
        if change == 0:
            body[place] = rng.randrange(256)
        elif change == 1:
            del body[place:]
        elif change == 2:
            body[place:place] = rng.randbytes(rng.randint(1, 9))
        else:
            body[place : place + 4] = struct.pack(">I", rng.getrandbits(32))
        if not body:
            break
    return bytes(body)


FUZZ = settings(
    max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@FUZZ
@given(payload=st.one_of(st.binary(max_size=2_000), st.integers(0, 2**32).map(mutated)), qos=st.sampled_from([0, 1]))
def test_random_bytes_do_not_stop_a_service(service: Bus, raw: RawClient, payload: bytes, qos: int) -> None:
    raw.mqtt.publish(MARS_PUT, payload, qos=qos)
    assert service.counters["failed.receive"] == 0


def test_after_random_bytes_it_still_answers(service: Bus, raw: RawClient) -> None:
    for seed in range(2_000):
        raw.mqtt.publish(MARS_PUT, mutated(seed), qos=1)
    assert_it_still_answers(raw)
    assert service.counters["failed.receive"] == 0
    assert service.counters["failed.handler"] == 0
    assert service.connections == 1


def test_memory_stays_within_its_limit_whatever_comes(child: Child, raw: RawClient) -> None:
    """Large and hostile messages, some 600 MB in all, against a child that may queue 64 MiB."""
    assert_it_still_answers(raw)
    process = psutil.Process(child.process.pid)
    before = process.memory_info().rss
    peak = before
    hostile = [
        os.urandom(900_000),
        b"\x91" * 900_000,
        b"\xdf\xff\xff\xff\xff" + b"\xa1a\xc0" * 290_000,
        put_envelope("x", data={"text": "x" * 900_000}),
        with_data(b"\xdd\x00\x0c\x35\x00" + b"\x90" * 800_000),
        put_envelope("x", data={"text": "x", "more": [[]] * 800_000}),
        put_envelope("x" * 60_000),
        b"\x9f" * 900_000,
    ]
    for _ in range(80):
        for payload in hostile:
            raw.mqtt.publish(MARS_PUT, payload, qos=1)
        wait_for(lambda: len(raw.mqtt._out_messages) < 40, "the broker takes it")
        peak = max(peak, process.memory_info().rss)
        raw.messages.clear()
    assert_it_still_answers(raw)
    peak = max(peak, process.memory_info().rss)
    assert peak - before < MAX_GROWTH_BYTES, f"{(peak - before) / 2**20:.0f} MiB more than before"


@pytest.mark.slow
def test_many_ids_and_names_leave_it_as_it_was(child: Child, raw: RawClient) -> None:
    """Caches and tables keyed by what others send are bounded."""
    process = psutil.Process(child.process.pid)
    number = 0

    def flood(count: int) -> None:
        nonlocal number
        for _ in range(count // 500):
            raw.messages.clear()
            for _ in range(500):
                number += 1
                raw.mqtt.publish(f"mindstream/v1/n{number}/event/s{number}", b"\x80", qos=1)
                raw.mqtt.publish(MARS_PUT, put_envelope("x"), qos=1)
            wait_for(lambda: len(raw.messages) == 500, "each ask is answered")

    flood(22_000)  # fills the reply cache, and the topics' caches
    before = process.memory_info().rss
    flood(8_000)
    growth = process.memory_info().rss - before
    assert growth < 16 * 1024 * 1024, f"{growth / 2**20:.1f} MiB more"


def test_a_packet_above_the_brokers_limit_cuts_off_its_sender_alone(
    broker: Broker, service: Bus, answers: Answers, raw: RawClient
) -> None:
    foreign = RawClient.__new__(RawClient)
    import paho.mqtt.client as paho
    from paho.mqtt.enums import CallbackAPIVersion

    dropped: list[object] = []
    foreign.mqtt = paho.Client(
        CallbackAPIVersion.VERSION2, client_id="foreign", protocol=paho.MQTTv5, reconnect_on_failure=False
    )
    foreign.mqtt.on_disconnect = lambda *_: dropped.append(True)
    foreign.mqtt.connect(broker.host, broker.port)
    foreign.mqtt.loop_start()
    foreign.mqtt.publish(MARS_PUT, bytes(100 * 1024 * 1024), qos=1)
    wait_for(lambda: dropped, "its sender is cut off")
    foreign.mqtt.loop_stop()
    assert_it_still_answers(raw)
    assert service.connections == 1
    assert service.counters["disconnected"] == 0
