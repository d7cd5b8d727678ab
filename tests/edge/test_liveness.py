"""Liveness: who is live, late, silent or gone, by a clock that is wound by hand and words made from the real tables."""

from __future__ import annotations

import time

import msgspec
import pytest

from edge import liveness as liveness_module
from edge.liveness import EVERY_S, GONE, LATE_AFTER, SILENT_AFTER, Liveness
from edge.service import SERVICE_STATE
from protocol import codec, topics
from protocol.codec import Received
from protocol.messages import NodeState, ServiceState, Speaker
from protocol.topics import STATE, TOPICS

EVERY = STATE.every_s


class Hearer:
    """A Liveness and the words that it hears."""

    def __init__(self) -> None:
        self.now_s = 1_000.0
        self.liveness = Liveness(now_s=lambda: self.now_s)

    def node(self, name: str, state: str = "ready", *, retained: bool = False, ahead_ms: float = 0) -> None:
        time_us = time.time_ns() // 1000 + round(ahead_ms * 1000)
        self._hear(STATE.format_topic(node=name), NodeState(state=state, time_us=time_us), retained)

    def service(self, node: str, service: str, state: str = "ready", *, retained: bool = False) -> None:
        topic = SERVICE_STATE.format_topic(node=node, service=service)
        self._hear(topic, ServiceState(state=state, time_us=time.time_ns() // 1000), retained)

    def _hear(self, topic: str, message: msgspec.Struct, retained: bool) -> None:
        payload = codec.encode(message, source="x/y")
        received: Received = codec.decode(topics.parse(topic), payload, received_s=self.now_s)
        received.retained = retained
        self.liveness.hear(received)

    def __getitem__(self, name: str) -> Speaker:
        node, _, service = name.partition("/")
        return next(each for each in self.liveness.speakers() if (each.node, each.service) == (node, service))

    def changes(self) -> list[tuple[str, str]]:
        return [(f"{each.node}/{each.service}".rstrip("/"), change) for each, change in self.liveness.changes()]


@pytest.fixture
def hearer() -> Hearer:
    return Hearer()


def test_the_intervals_are_those_of_the_topic_table() -> None:
    assert {topic.name: topic.every_s for topic in TOPICS if topic.every_s} == EVERY_S
    assert {"state", "service_state"} <= set(EVERY_S)


def test_a_speaker_is_live_then_late_then_silent_and_live_again_with_its_next_word(hearer: Hearer) -> None:
    hearer.node("sprout")
    began_s = hearer.now_s
    for after_s, expected in (
        (0.0, "live"),
        (LATE_AFTER * EVERY - 0.01, "live"),
        (LATE_AFTER * EVERY, "late"),
        (SILENT_AFTER * EVERY - 0.01, "late"),
        (SILENT_AFTER * EVERY, "silent"),
    ):
        hearer.now_s = began_s + after_s
        assert hearer["sprout"].liveness == expected
        assert hearer["sprout"].silent_s == pytest.approx(after_s)
    hearer.node("sprout")
    assert (hearer["sprout"].liveness, hearer["sprout"].silent_s) == ("live", 0.0)


def test_what_the_broker_had_kept_is_no_sign_of_life(hearer: Hearer) -> None:
    hearer.service("sprout", "memory_store", retained=True)
    assert (hearer["sprout/memory_store"].liveness, hearer["sprout/memory_store"].state) == ("unknown", "ready")
    hearer.now_s += 2 * EVERY
    hearer.service("sprout", "memory_store", retained=True)  # a new subscription: the same old word
    hearer.now_s += EVERY
    assert hearer["sprout/memory_store"].liveness == "late"
    assert hearer["sprout/memory_store"].skew_ms is None


@pytest.mark.parametrize("state", sorted(GONE))
def test_who_is_known_to_be_gone_is_not_late(hearer: Hearer, state: str) -> None:
    hearer.node("sprout", state)
    hearer.now_s += 100 * EVERY
    assert hearer["sprout"].liveness == "gone"
    assert hearer.changes() == []


def test_each_change_is_told_once(hearer: Hearer) -> None:
    hearer.node("sprout")
    hearer.service("sprout", "memory_store")
    hearer.now_s += LATE_AFTER * EVERY
    hearer.service("sprout", "memory_store")
    assert hearer.changes() == [("sprout", "late")]
    assert hearer.changes() == []
    hearer.now_s += SILENT_AFTER * EVERY
    assert hearer.changes() == [("sprout/memory_store", "late")]
    hearer.node("sprout")
    hearer.service("sprout", "memory_store", "lost")
    assert hearer.changes() == [("sprout", "back"), ("sprout/memory_store", "gone")]


def test_the_silence_of_a_time_in_which_the_hearer_was_deaf_is_nobodys(hearer: Hearer) -> None:
    hearer.node("sprout")
    hearer.now_s += 50 * EVERY
    hearer.liveness.forgive()
    assert hearer["sprout"].liveness == "live"
    hearer.now_s += LATE_AFTER * EVERY
    assert hearer["sprout"].liveness == "late"


def test_a_clock_that_is_ahead_is_shown_as_ahead(hearer: Hearer) -> None:
    hearer.node("sprout", ahead_ms=90_000)
    skew_ms = hearer["sprout"].skew_ms
    assert skew_ms == pytest.approx(90_000, abs=60_000)
    hearer.node("sprout", "lost", ahead_ms=-500_000)  # the will was written when it connected
    assert hearer["sprout"].skew_ms == skew_ms


def test_topics_that_promise_nothing_are_not_followed(hearer: Hearer) -> None:
    hearer.liveness = Liveness({"state": EVERY}, lambda: hearer.now_s)
    hearer.service("sprout", "memory_store")
    assert hearer.liveness.speakers() == []


def test_more_speakers_than_it_follows_are_counted(hearer: Hearer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness_module, "MAX_SPEAKERS", 3)
    for number in range(5):
        hearer.node(f"node-{number}")
    assert len(hearer.liveness.speakers()) == 3
    assert hearer.liveness.not_followed == 2
