"""Asks: answered once, in their time to live, by the one who was asked, whatever happens in between."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgpack
import pytest

from broker.base import Broker
from broker.mosquitto import MosquittoBroker
from edge import asks as asks_module
from edge.asks import PendingAsks
from edge.bus import Bus, Deferred
from edge.db import open_database
from edge.journal import JOURNAL, CommandJournal
from protocol.errors import (
    AskExpired,
    BusError,
    MindstreamError,
    NotConnected,
    NotFound,
    Overloaded,
    ProtocolError,
    UnknownType,
)
from protocol.ids import uuid7
from protocol.messages import Event, MemoryPut, MemoryRecall, MemoryRecalled, MemoryStored, ModelGenerate, RunDone
from tests.edge.bus_support import (
    DEADLINE_S,
    Answers,
    Child,
    RawClient,
    envelope,
    kill_broker,
    put_envelope,
    stored,
    wait_for,
)
from tests.edge.conftest import OpenBus
from tests.support.waiting import TTL_MS

DAY_US = 24 * 3600 * 1_000_000


@pytest.fixture
def answers(closing: Any) -> Answers:
    made = Answers()
    closing.callback(made.release.set)
    return made


@pytest.fixture
def responder(make_bus: OpenBus, answers: Answers) -> Bus:
    """sprout's memory_store: puts are answered by ``answers``."""
    bus = make_bus("sprout", "memory_store")
    bus.hear(MemoryPut, answers)
    bus.start()
    return bus


# --- answers ------------------------------------------------------------------------------------------------


def test_an_ask_is_answered_typed(responder: Bus, open_bus: OpenBus) -> None:
    answer = open_bus("tomato", "asker").ask("sprout", MemoryPut(text="a"), ttl_ms=TTL_MS)
    assert isinstance(answer, MemoryStored)
    assert answer.seq == 1


def test_many_asks_at_once_each_get_their_own_answer(responder: Bus, open_bus: OpenBus) -> None:
    asker = open_bus("tomato", "asker")
    ids = [uuid7() for _ in range(400)]
    futures = [asker.ask_later("sprout", MemoryPut(text=each), ttl_ms=TTL_MS, id=each) for each in ids]
    assert [future.result(DEADLINE_S).id for future in futures] == ids


def test_an_error_arrives_with_its_class_topic_type_field_and_reason(make_bus: OpenBus, open_bus: OpenBus) -> None:
    responder = make_bus("sprout", "memory_store")

    def refuse(_message: Any) -> MindstreamError:
        return NotFound("looking for a scope: none", hint="make one", field="scope", reason="unknown scope")

    responder.hear(MemoryPut, refuse)
    responder.start()
    with pytest.raises(NotFound, match="looking for a scope") as caught:
        open_bus("tomato", "asker").ask("sprout", MemoryPut(text="a"), ttl_ms=TTL_MS)
    error = caught.value
    assert (error.field, error.reason, error.hint, error.type) == ("scope", "unknown scope", "make one", "memory.put")
    assert error.topic == "mindstream/v1/tomato/ask/sprout/memory_store/put"
    assert error.remote == "sprout/memory_store"
    assert responder.counters["refused.not_found"] == 1


def test_an_error_of_any_length_is_still_an_answer(make_bus: OpenBus, open_bus: OpenBus) -> None:
    responder = make_bus("sprout", "memory_store")

    def fail(_message: Any) -> None:
        raise ValueError("ä" * 500_000)

    responder.hear(MemoryPut, fail)
    responder.start()
    with pytest.raises(MindstreamError, match="unexpected ValueError"):
        open_bus("tomato", "asker").ask("sprout", MemoryPut(text="a"), ttl_ms=TTL_MS)


@pytest.mark.parametrize("result", [None, "text", MemoryRecalled(hits=[], took_ms=0.0), 7])
def test_a_handler_that_answers_with_the_wrong_thing_is_an_error_to_the_asker(
    make_bus: OpenBus, open_bus: OpenBus, result: object
) -> None:
    responder = make_bus("sprout", "memory_store")
    responder.hear(MemoryPut, lambda message: result if message.data.text == "wrong" else stored(message.id))
    responder.start()
    asker = open_bus("tomato", "asker")
    with pytest.raises(MindstreamError, match="the handler answered with"):
        asker.ask("sprout", MemoryPut(text="wrong"), ttl_ms=TTL_MS)
    assert isinstance(asker.ask("sprout", MemoryPut(text="right"), ttl_ms=TTL_MS), MemoryStored)
    assert responder.counters["failed.handler"] == 1


def test_a_batch_handler_that_answers_too_few_fails_each_alone(make_bus: OpenBus, open_bus: OpenBus) -> None:
    responder = make_bus("sprout", "memory_store")
    responder.hear(MemoryPut, lambda messages: [stored()], batch=8)
    responder.start()
    asker = open_bus("tomato", "asker")
    futures = [asker.ask_later("sprout", MemoryPut(text="x"), ttl_ms=TTL_MS) for _ in range(20)]
    assert all(isinstance(future.result(DEADLINE_S), MemoryStored) for future in futures)


def test_a_deferred_answer_may_come_from_a_worker_and_out_of_order(make_bus: OpenBus, open_bus: OpenBus) -> None:
    held: dict[str, Deferred] = {}
    responder = make_bus("sprout", "memory_store")

    def later(message: Any) -> Deferred:
        held[message.data.text] = Deferred()
        return held[message.data.text]

    responder.hear(MemoryPut, later)
    responder.start()
    asker = open_bus("tomato", "asker")
    futures = {text: asker.ask_later("sprout", MemoryPut(text=text), ttl_ms=TTL_MS) for text in "abc"}
    wait_for(lambda: len(held) == 3, "all are under way")
    held["c"].set_result(stored("c"))
    assert futures["c"].result(DEADLINE_S).id == "c"
    held["b"].set_exception(NotFound("no"))
    with pytest.raises(NotFound):
        futures["b"].result(DEADLINE_S)
    held["a"].cancel()
    with pytest.raises(MindstreamError, match="given up"):
        futures["a"].result(DEADLINE_S)
    wait_for(lambda: responder._dispatch.ledger.owed == 0, "all are acknowledged")


def test_an_answer_counts_only_from_the_node_that_was_asked(
    responder: Bus, answers: Answers, open_bus: OpenBus, raw: RawClient
) -> None:
    asker = open_bus("tomato", "asker")
    identifier = uuid7()
    future = asker.ask_later("sprout", MemoryPut(text="hold"), ttl_ms=TTL_MS, id=identifier)
    assert answers.held.wait(DEADLINE_S)
    forged = {"id": "x", "node": "mars", "scope": "everyone", "log_id": "l", "seq": 9}
    raw.publish("mindstream/v1/mars/reply/tomato/asker", envelope("memory.stored", forged, correlation=identifier))
    other = envelope("memory.merged", {}, correlation=identifier, source="sprout/memory_store")
    raw.publish("mindstream/v1/sprout/reply/tomato/asker", other)
    wait_for(lambda: asker.counters["late_replies"] == 2, "both are refused")
    assert not future.done()
    answers.release.set()
    assert future.result(DEADLINE_S).node == "sprout"


# --- time to live -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ttl_ms", [0, -1, 600_001, 10**12])
def test_a_time_to_live_is_mandatory_and_bounded_where_it_is_asked(open_bus: OpenBus, ttl_ms: int) -> None:
    with pytest.raises(ProtocolError, match="time to live") as caught:
        open_bus("tomato", "asker").ask("sprout", MemoryPut(text="a"), ttl_ms=ttl_ms)
    assert caught.value.field == "ttl_ms"


@pytest.mark.parametrize("ttl_ms", [0, -5, 600_001, ...])
def test_and_where_it_is_carried_out(responder: Bus, answers: Answers, raw: RawClient, ttl_ms: Any) -> None:
    identifier = uuid7()
    raw.put(put_envelope("bad", id=identifier, ttl_ms=ttl_ms))
    error = raw.answer_to(identifier)
    assert error["type"] == "error"
    assert error["data"]["field"] == "ttl_ms"
    assert error["data"]["topic"] == "mindstream/v1/mars/ask/sprout/memory_store/put"
    assert error["data"]["type"] == "memory.put"
    assert error["data"]["reason"] == "missing or out of range"
    assert answers.texts == []


def test_what_cannot_be_asked_is_refused(open_bus: OpenBus) -> None:
    with pytest.raises(UnknownType, match="not a question"):
        open_bus("tomato", "asker").ask("sprout", Event(name="x", severity="info", text=""), ttl_ms=1000)


def test_an_ask_that_nobody_answers_expires_in_its_time(open_bus: OpenBus) -> None:
    asker = open_bus("tomato", "asker")
    began_s = time.monotonic()
    with pytest.raises(AskExpired, match="asking nobody/memory_store to put"):
        asker.ask("nobody", MemoryPut(text="a"), ttl_ms=300)
    assert 0.3 <= time.monotonic() - began_s < DEADLINE_S


def test_an_ask_that_expired_in_the_queue_is_answered_so_and_not_carried_out(
    responder: Bus, answers: Answers, raw: RawClient
) -> None:
    raw.put(put_envelope("hold"))
    assert answers.held.wait(DEADLINE_S)
    identifier = uuid7()
    raw.put(put_envelope("late", id=identifier, ttl_ms=50))
    wait_for(lambda: responder.queued == 2, "it waits")
    threading.Event().wait(0.1)  # its time to live has to pass
    answers.release.set()
    error = raw.answer_to(identifier)
    assert (error["data"]["code"], error["data"]["reason"]) == ("expired", "expired")
    assert answers.texts == ["hold"]
    assert responder.counters["refused.expired"] == 1


@pytest.mark.parametrize("off_us", [-DAY_US, DAY_US])
def test_a_clock_that_is_a_day_off_changes_nothing(
    responder: Bus, answers: Answers, raw: RawClient, off_us: int
) -> None:
    identifier = uuid7((time.time_ns() // 1000 + off_us) // 1000)
    raw.put(put_envelope("off", id=identifier, time_us=time.time_ns() // 1000 + off_us, ttl_ms=TTL_MS))
    assert raw.answer_to(identifier)["type"] == "memory.stored"
    assert answers.texts == ["off"]


def test_the_time_that_the_broker_kept_an_ask_counts(make_bus: OpenBus, open_bus: OpenBus, answers: Answers) -> None:
    def responder() -> Bus:
        bus = make_bus("sprout", "memory_store", durable_session=True)
        bus.hear(MemoryPut, answers)
        bus.start()
        return bus

    responder().stop()
    asker = open_bus("tomato", "asker")
    with pytest.raises(AskExpired):
        asker.ask("sprout", MemoryPut(text="too late"), ttl_ms=1_000)
    threading.Event().wait(3.0)  # the broker counts whole seconds, from when it got the ask
    responder()
    asker.ask("sprout", MemoryPut(text="in time"), ttl_ms=TTL_MS)
    assert answers.texts == ["in time"]


def test_the_time_without_a_broker_counts(broker: Broker, responder: Bus, answers: Answers, open_bus: OpenBus) -> None:
    """An ask must not wait in the client library with the time to live that it once had."""
    asker = open_bus("tomato", "asker")
    kill_broker(broker)
    wait_for(lambda: not asker.connected and not responder.connected, "the loss is noticed")
    with pytest.raises(AskExpired):
        asker.ask("sprout", MemoryPut(text="too late"), ttl_ms=200)
    broker.start()
    wait_for(lambda: asker.connected and responder.connected, "both are back")
    asker.ask("sprout", MemoryPut(text="in time"), ttl_ms=TTL_MS)
    assert answers.texts == ["in time"]


# --- once ---------------------------------------------------------------------------------------------------


def test_a_repeated_ask_is_carried_out_once_and_answered_again(
    responder: Bus, answers: Answers, raw: RawClient
) -> None:
    identifier = uuid7()
    for _ in range(3):
        raw.put(put_envelope("once", id=identifier))
    wait_for(lambda: len(raw.answers()) == 3, "each repetition is answered")
    assert len({msgpack.packb(answer["data"]) for answer in raw.answers()}) == 1
    assert answers.texts == ["once"]
    assert responder.counters["duplicates"] == 2


def test_a_repetition_while_it_is_carried_out_waits_for_the_same_answer(
    responder: Bus, answers: Answers, raw: RawClient
) -> None:
    identifier = uuid7()
    raw.put(put_envelope("hold", id=identifier))
    assert answers.held.wait(DEADLINE_S)
    raw.put(put_envelope("hold", id=identifier))
    wait_for(lambda: responder.queued == 2, "the repetition is here")
    answers.release.set()
    wait_for(lambda: responder.counters["duplicates"] == 1, "it is known")
    assert raw.answer_to(identifier)["type"] == "memory.stored"
    assert answers.texts == ["hold"]


def test_an_id_is_the_askers_own(responder: Bus, answers: Answers, open_bus: OpenBus, raw: RawClient) -> None:
    """Another node that uses the same id neither takes the answer nor stops the ask."""
    identifier = uuid7()
    raw.put(put_envelope("mine", id=identifier))
    assert raw.answer_to(identifier)["data"]["seq"] == 1
    asker = open_bus("tomato", "asker")
    assert asker.ask_later("sprout", MemoryPut(text="yours"), ttl_ms=TTL_MS, id=identifier).result(DEADLINE_S).seq == 2


def test_asking_again_under_an_open_id_is_the_same_ask(responder: Bus, answers: Answers, open_bus: OpenBus) -> None:
    asker = open_bus("tomato", "asker")
    identifier = uuid7()
    first = asker.ask_later("sprout", MemoryPut(text="hold"), ttl_ms=TTL_MS, id=identifier)
    assert answers.held.wait(DEADLINE_S)
    second = asker.ask_later("sprout", MemoryPut(text="hold"), ttl_ms=TTL_MS, id=identifier)
    answers.release.set()
    assert first.result(DEADLINE_S) == second.result(DEADLINE_S)
    assert answers.texts == ["hold"]


# --- faults -------------------------------------------------------------------------------------------------


def test_asks_under_way_outlive_their_broker(
    broker: Broker, responder: Bus, answers: Answers, open_bus: OpenBus
) -> None:
    asker = open_bus("tomato", "asker")
    futures: list[Future[Any]] = [asker.ask_later("sprout", MemoryPut(text="hold first"), ttl_ms=TTL_MS)]
    assert answers.held.wait(DEADLINE_S)
    futures += [asker.ask_later("sprout", MemoryPut(text=f"{n}"), ttl_ms=TTL_MS) for n in range(30)]
    kill_broker(broker)
    answers.release.set()
    wait_for(lambda: not asker.connected, "the loss is noticed")
    futures += [asker.ask_later("sprout", MemoryPut(text=f"{n}"), ttl_ms=TTL_MS) for n in range(30, 40)]
    broker.start()
    for future in futures:
        assert isinstance(future.result(DEADLINE_S), MemoryStored)
    assert sorted(answers.texts) == sorted(["hold first", *(str(n) for n in range(40))]), "each carried out once"


def test_a_durable_ask_is_carried_out_again_after_its_process_was_killed(
    start_child: Callable[..., Child], open_bus: OpenBus, tmp_path: Path
) -> None:
    child = start_child("durable-and-hold", tmp_path)
    child.wait_for("ready")
    future = open_bus("tomato", "asker").ask_later("sprout", ModelGenerate(conversation="c1"), ttl_ms=TTL_MS)
    child.wait_for("generate c1")
    child.kill()
    again = start_child("durable", tmp_path)
    assert future.result(DEADLINE_S).text == "done"
    again.wait_for("generate c1")
    assert again.lines.count("generate c1") == 1
    again.kill()
    third = start_child("durable", tmp_path)
    third.wait_for("ready")
    assert "generate c1" not in third.lines, "what was answered is not carried out again"


def test_a_command_that_was_lost_with_its_session_is_asked_again_by_its_asker(
    broker: Broker, start_child: Callable[..., Child], open_bus: OpenBus, tmp_path: Path
) -> None:
    child = start_child("durable", tmp_path)
    child.wait_for("ready")
    asker = open_bus("tomato", "asker")
    os.kill(child.process.pid, signal.SIGSTOP)
    try:
        answer = asker.ask_later("sprout", ModelGenerate(conversation="c1"), ttl_ms=TTL_MS)
        assert asker.flush(DEADLINE_S), "the broker has it"
        kill_broker(broker)
        if isinstance(broker, MosquittoBroker):
            assert broker.data_folder is not None
            (broker.data_folder / "mosquitto.db").unlink(missing_ok=True)
        broker.start()
    finally:
        os.kill(child.process.pid, signal.SIGCONT)
    assert answer.result(DEADLINE_S).text == "done"
    child.wait_for("generate c1")
    assert child.lines.count("generate c1") == 1


def test_a_durable_ask_repeated_to_the_next_process_gets_the_answer_that_was_given(
    start_child: Callable[..., Child], raw: RawClient, tmp_path: Path
) -> None:
    child = start_child("durable", tmp_path)
    child.wait_for("ready")
    identifier = uuid7()
    ask = envelope("model.generate", {"conversation": "c1"}, id=identifier, ttl_ms=TTL_MS, reply_to="raw")
    raw.publish("mindstream/v1/mars/ask/sprout/model_runner/generate", ask)
    raw.answer_to(identifier)
    child.kill()
    again = start_child("durable", tmp_path)
    again.wait_for("ready")
    raw.publish("mindstream/v1/mars/ask/sprout/model_runner/generate", ask)
    wait_for(lambda: len(raw.answers()) == 2, "the repetition is answered")
    assert raw.answers()[0] == raw.answers()[1]
    assert "generate c1" not in again.lines


def test_a_durable_ask_is_on_the_disk_before_it_is_acknowledged(
    make_bus: OpenBus, open_bus: OpenBus, tmp_path: Path, closing: Any
) -> None:
    database = open_database(tmp_path / "journal.db", schema=JOURNAL)
    closing.callback(database.close)
    journal = CommandJournal(database)
    responder = make_bus("sprout", "model_runner")
    acknowledged: list[int] = []
    ack = responder._connection.client.ack

    def watch_ack(packet_id: int, qos: int) -> Any:
        with database.read() as connection:
            acknowledged.append(connection.execute("SELECT count(*) FROM commands").fetchone()[0])
        return ack(packet_id, qos)

    responder._connection.client.ack = watch_ack  # type: ignore[method-assign]
    answer = Deferred()
    responder.hear(ModelGenerate, lambda message: answer)
    responder.keep_asks_in(journal)
    responder.start()
    future = open_bus("tomato", "asker").ask_later("sprout", ModelGenerate(conversation="c1"), ttl_ms=TTL_MS)
    wait_for(lambda: acknowledged, "it is acknowledged while it is under way")
    assert acknowledged == [1]
    answer.set_result(RunDone(run="r", conversation="c1", text="", tokens=[], finish_reason="stop"))
    future.result(DEADLINE_S)


def test_a_handler_that_asks_is_told_so(make_bus: OpenBus, open_bus: OpenBus) -> None:
    caught: list[BusError] = []
    responder = make_bus("sprout", "memory_store")

    def asks(message: Any) -> MemoryStored:
        with pytest.raises(BusError) as error:
            responder.ask("sprout", MemoryRecall(query="x"), ttl_ms=1000)
        caught.append(error.value)
        return stored(message.id)

    responder.hear(MemoryPut, asks)
    responder.start()
    open_bus("tomato", "asker").ask("sprout", MemoryPut(text="a"), ttl_ms=TTL_MS)
    assert "from a handler of sprout/memory_store" in str(caught[0])
    assert "Deferred" in str(caught[0])


def test_a_callback_of_an_answer_may_ask_further_but_not_wait(
    responder: Bus, answers: Answers, open_bus: OpenBus
) -> None:
    asker = open_bus("tomato", "asker")
    chained: Future[Any] = Future()

    def further(_answer: Future[Any]) -> None:
        try:
            asker.ask("sprout", MemoryPut(text="waits"), ttl_ms=1000)
        except BusError as refused:
            text = str(refused)
            asker.ask_later("sprout", MemoryPut(text="later"), ttl_ms=TTL_MS).add_done_callback(
                lambda answer: chained.set_result((text, answer.result()))
            )

    # Held until the callback is attached: that of a future which is done already runs on this thread.
    asker.ask_later("sprout", MemoryPut(text="hold the first"), ttl_ms=TTL_MS).add_done_callback(further)
    answers.release.set()
    text, answer = chained.result(DEADLINE_S)
    assert "network thread" in text
    assert isinstance(answer, MemoryStored)


def test_asks_end_with_their_bus(open_bus: OpenBus) -> None:
    asker = open_bus("tomato", "asker")
    future = asker.ask_later("nobody", MemoryPut(text="a"), ttl_ms=TTL_MS)
    asker.stop()
    with pytest.raises(NotConnected, match="is stopping"):
        future.result(DEADLINE_S)
    with pytest.raises(NotConnected, match="stopped"):
        asker.ask("nobody", MemoryPut(text="a"), ttl_ms=TTL_MS)


def test_only_the_own_node_may_ask_what_is_reserved_to_it(make_bus: OpenBus, raw: RawClient) -> None:
    from protocol.messages import MemoryMerge, MemoryMerged

    carried_out: list[Any] = []
    responder = make_bus("sprout", "memory_store")

    def merge(message: Any) -> MemoryMerged:
        carried_out.append(message.node)
        return MemoryMerged()

    responder.hear(MemoryMerge, merge)
    responder.start()
    identifier = uuid7()
    ask = envelope("memory.merge", {"entries": []}, id=identifier, ttl_ms=5000, reply_to="raw")
    raw.publish("mindstream/v1/mars/ask/sprout/memory_store/merge", ask)
    assert raw.answer_to(identifier)["data"]["reason"] == "not allowed"
    assert carried_out == []


# --- the table of open asks, without a bus ------------------------------------------------------------------


def open_one(asks: PendingAsks, identifier: str, ttl_s: float, send: Callable[[], bool]) -> Future[Any]:
    deadline_s = time.monotonic() + ttl_s
    return asks.open(identifier, "asking", node="n", reply_type="t", deadline_s=deadline_s, send=send)


def test_an_ask_that_finds_no_room_does_not_hold_up_the_end_of_another() -> None:
    asks = PendingAsks()
    tried: list[float] = []

    def no_room() -> bool:
        tried.append(time.monotonic())
        return False

    blocked = open_one(asks, "a", DEADLINE_S, no_room)
    short = open_one(asks, "b", 0.3, lambda: True)
    asks.resend()
    with pytest.raises(AskExpired):
        short.result(DEADLINE_S)
    wait_for(lambda: len(tried) > 3, "it is tried again soon")
    asks.fail_all(NotConnected("stop"))
    with pytest.raises(NotConnected):
        blocked.result(DEADLINE_S)


def test_open_asks_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asks_module, "MAX_OPEN", 3)
    asks = PendingAsks()
    for name in "abc":
        open_one(asks, name, 30, lambda: True)
    with pytest.raises(Overloaded, match="under way already"):
        open_one(asks, "d", 30, lambda: True)
    asks.fail_all(NotConnected("stop"))
