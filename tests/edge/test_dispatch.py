"""Handlers: what is acknowledged when, and what becomes of messages that nobody can handle."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from broker.base import Broker
from edge.bus import Bus, Deferred
from edge.db import open_database
from edge.journal import JOURNAL, CommandJournal
from protocol.errors import BusError, NotFound
from protocol.messages import Event, MemoryPut, MemoryStored, NodeState, RunToken
from tests.edge.bus_support import DEADLINE_S, Child, stored, wait_for
from tests.edge.conftest import OpenBus
from tests.support.waiting import TTL_MS


def token(index: int) -> RunToken:
    return RunToken(index=index, token=1, text="", logprob=0.0, entropy=0.0)


def watch_acks(bus: Bus) -> list[int]:
    """Packet ids in the order in which they are acknowledged, from now on."""
    sent: list[int] = []
    ack = bus._connection.client.ack

    def note(packet_id: int, qos: int) -> Any:
        sent.append(packet_id)
        return ack(packet_id, qos)

    bus._connection.client.ack = note  # type: ignore[method-assign]
    return sent


def test_acknowledgements_leave_in_order_of_arrival_whatever_finishes_first(
    make_bus: OpenBus, open_bus: OpenBus
) -> None:
    listener = make_bus("sprout", "listener")
    acks = watch_acks(listener)
    arrived: list[int] = []
    held: dict[int, Deferred] = {}
    receive = listener._dispatch.receive

    def note_arrival(name: str, payload: bytes, packet_id: int, *rest: Any) -> None:
        arrived.append(packet_id)
        receive(name, payload, packet_id, *rest)

    listener._dispatch.receive = note_arrival  # type: ignore[method-assign]

    def defer(message: Any) -> Deferred:
        held[message.data.index] = Deferred()
        return held[message.data.index]

    listener.hear(RunToken, defer, run="r")
    listener.start()
    speaker = open_bus("tomato", "speaker")
    for index in range(6):
        speaker.say(token(index), run="r")
    wait_for(lambda: len(held) == 6, "all are under way")
    for index in (5, 3, 1, 2):
        held[index].set_result(None)
    assert acks == [], "the oldest is not done"
    held[0].set_result(None)
    assert acks == arrived[:4]
    held[4].set_result(None)
    assert acks == arrived


def test_what_fails_three_times_is_a_dead_letter_with_an_event_and_acknowledged(
    make_bus: OpenBus, open_bus: OpenBus, tmp_path: Path, closing: Any
) -> None:
    database = open_database(tmp_path / "journal.db", schema=JOURNAL)
    closing.callback(database.close)
    journal = CommandJournal(database)
    events: list[Event] = []
    watcher = open_bus("tomato", "watcher")
    watcher.hear(Event, lambda message: events.append(message.data), node="sprout")
    watcher.wait_subscribed(DEADLINE_S)
    tried: list[int] = []
    listener = make_bus("sprout", "listener")

    def fail(message: Any) -> None:
        tried.append(message.data.index)
        if message.data.index == 1:
            raise RuntimeError("cannot")

    listener.hear(RunToken, fail, run="r")
    listener.keep_asks_in(journal)
    listener.start()
    speaker = open_bus("tomato", "speaker")
    for index in range(3):
        speaker.say(token(index), run="r")
    wait_for(lambda: 2 in tried, "the next message is handled")
    wait_for(lambda: listener._dispatch.ledger.owed == 0, "all are acknowledged")
    assert tried == [0, 1, 1, 1, 2]
    letters = journal.dead_letters()
    assert [(letter.topic, letter.error, letter.attempts) for letter in letters] == [
        ("mindstream/v1/tomato/model/run/r/token", "cannot", 3)
    ]
    wait_for(lambda: events, "an event says so")
    assert events[0].name == "dead-letter"
    assert events[0].error is not None
    assert events[0].error.type == "model.token"
    assert listener.counters["dead_letters"] == 1
    assert listener.counters["failed.handler"] == 3


def test_one_bad_message_of_a_batch_does_not_take_the_others_with_it(make_bus: OpenBus, open_bus: OpenBus) -> None:
    taken: list[int] = []
    gate = threading.Event()
    listener = make_bus("sprout", "listener")

    def take(messages: list[Any]) -> None:
        assert gate.wait(DEADLINE_S)
        indexes = [message.data.index for message in messages]
        if 5 in indexes:
            raise RuntimeError("five")
        taken.extend(indexes)

    listener.hear(RunToken, take, batch=32, run="r")
    listener.start()
    speaker = open_bus("tomato", "speaker")
    for index in range(10):
        speaker.say(token(index), run="r")
    wait_for(lambda: listener.queued == 10, "they wait together")
    gate.set()
    wait_for(lambda: listener.counters["dead_letters"] == 1, "the bad one is put aside")
    wait_for(lambda: len(taken) == 9, "the others are taken")
    assert sorted(taken) == [0, 1, 2, 3, 4, 6, 7, 8, 9]


def test_a_batch_comes_together_past_messages_of_other_hearings(make_bus: OpenBus, open_bus: OpenBus) -> None:
    """Puts between which other things come share one commit all the same."""
    gate = threading.Event()
    batches: list[list[int]] = []
    others: list[int] = []
    listener = make_bus("sprout", "listener")

    def take(messages: list[Any]) -> None:
        batches.append([message.data.index for message in messages])

    def hold(message: Any) -> None:
        assert gate.wait(DEADLINE_S)
        others.append(message.data.index)

    listener.hear(RunToken, take, batch=64, run="batch")
    listener.hear(RunToken, hold, run="single")
    listener.start()
    speaker = open_bus("tomato", "speaker")
    speaker.say(token(0), run="single")
    wait_for(lambda: listener.queued == 1, "the handler thread is held")
    for index in range(1, 21):
        speaker.say(token(index), run="batch" if index % 2 else "single")
    wait_for(lambda: listener.queued == 21, "they wait together")
    gate.set()
    wait_for(lambda: len(others) == 11, "the others are heard, in order")
    wait_for(lambda: listener.queued == 0, "all are handled")
    assert batches == [list(range(1, 21, 2))]
    assert others == list(range(0, 21, 2))


def test_clients_that_ask_in_turn_share_commits_and_one_alone_does_not_wait(
    make_bus: OpenBus, open_bus: OpenBus
) -> None:
    sizes: list[int] = []
    responder = make_bus("sprout", "memory_store")

    def slow_commit(messages: list[Any]) -> list[MemoryStored]:
        sizes.append(len(messages))
        threading.Event().wait(0.05)  # a slow disk
        return [stored(message.id) for message in messages]

    responder.hear(MemoryPut, slow_commit, batch=256)
    responder.start()
    askers = [open_bus("tomato", f"asker{number}") for number in range(4)]
    askers[0].ask("sprout", MemoryPut(text="alone"), ttl_ms=TTL_MS)
    askers[0].ask("sprout", MemoryPut(text="alone"), ttl_ms=TTL_MS)
    assert sizes == [1, 1]

    def ask_in_turn(bus: Bus) -> None:
        for _ in range(10):
            bus.ask("sprout", MemoryPut(text="together"), ttl_ms=TTL_MS)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(ask_in_turn, bus) for bus in askers]:
            done.result(DEADLINE_S)
    assert sum(sizes) == 42
    assert max(sizes) > 1


def test_a_refusal_is_counted_said_and_acknowledged_at_once(make_bus: OpenBus, open_bus: OpenBus) -> None:
    tried: list[int] = []
    listener = make_bus("sprout", "listener")

    def refuse(message: Any) -> None:
        tried.append(message.data.index)
        raise NotFound("handling a token: no such run")

    listener.hear(RunToken, refuse, run="r")
    listener.start()
    open_bus("tomato", "speaker").say(token(0), run="r")
    wait_for(lambda: listener.counters["refused.not_found"] == 1, "it is refused")
    wait_for(lambda: listener._dispatch.ledger.owed == 0, "it is acknowledged")
    assert tried == [0]
    assert listener.counters["event.refused-message"] == 1


def test_a_watcher_that_fails_does_not_stop_the_handler(make_bus: OpenBus, open_bus: OpenBus) -> None:
    heard: list[int] = []
    listener = make_bus("sprout", "listener")

    def broken(_topic: str, _payload: bytes) -> None:
        raise RuntimeError("broken")

    listener.watch("mindstream/v1/tomato/#", broken)
    listener.hear(RunToken, lambda message: heard.append(message.data.index), run="r")
    listener.start()
    open_bus("tomato", "speaker").say(token(7), run="r")
    wait_for(lambda: 7 in heard, "the handler hears it")
    assert listener.counters["failed.watcher"] >= 1


def test_a_handler_that_fails_on_an_ask_answers_and_goes_on(make_bus: OpenBus, open_bus: OpenBus) -> None:
    responder = make_bus("sprout", "memory_store")

    def fail_once(message: Any) -> MemoryStored:
        if message.data.text == "bad":
            raise KeyError("inner")
        return stored(message.id)

    responder.hear(MemoryPut, fail_once)
    responder.start()
    asker = open_bus("tomato", "asker")
    bad = asker.ask_later("sprout", MemoryPut(text="bad"), ttl_ms=TTL_MS)
    error = bad.exception(DEADLINE_S)
    assert "carrying out memory.put: unexpected KeyError" in str(error)
    assert "the log of sprout/memory_store" in str(error)
    assert isinstance(asker.ask("sprout", MemoryPut(text="good"), ttl_ms=TTL_MS), MemoryStored)
    assert responder.counters["failed.handler"] == 1


def test_a_second_handler_for_the_same_messages_is_refused() -> None:
    bus = Bus(url="mqtt://127.0.0.1:1", node="sprout", client="twice")
    stop_hearing = bus.hear(NodeState, print)
    with pytest.raises(BusError, match=r"node\.state.*has a handler already"):
        bus.hear(NodeState, print)
    bus.hear(NodeState, print, node="tomato")
    stop_hearing()
    bus.hear(NodeState, print)


def test_a_message_that_kills_its_process_each_time_is_given_up_and_the_next_is_heard(
    broker: Broker, start_child: Callable[..., Child], open_bus: OpenBus, tmp_path: Path
) -> None:
    if broker.kind == "embedded":
        pytest.skip("rumqttd does not mark what it sends again (DUP)")
    child = start_child("hear-and-die", tmp_path)
    child.wait_for("ready")
    speaker = open_bus("tomato", "speaker")
    for text in ("poison", "after it"):
        speaker.say(Event(name="e", severity="info", text=text), service="speaker")
    lives = 1
    while "heard after it" not in child.lines:
        wait_for(lambda child=child: "heard after it" in child.lines or child.ended, "it neither heard nor died")
        if child.ended:
            lives += 1
            assert lives < 8, "it is given up after some times"
            child = start_child("hear-and-die", tmp_path)
    assert lives == 5, "the first time, three times more, and the life in which it is given up"
    child.kill()
    with contextlib.closing(open_database(tmp_path / "journal.db", schema=JOURNAL)) as db:
        (letter,) = CommandJournal(db).dead_letters()
    assert "ended each of the 4 times it came" in letter.error
    assert b"poison" in letter.payload
