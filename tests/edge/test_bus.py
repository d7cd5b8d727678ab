"""Saying and hearing on real brokers: what arrives, what waits, what is refused, and what a broken connection costs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from broker.base import MAX_INFLIGHT, Broker
from edge import bus as bus_module
from edge.bus import Bus
from protocol import topics
from protocol.errors import BusError, MessageTooLarge, NotConnected, Overloaded, WrongTopic
from protocol.messages import Event, MemoryEntries, MemoryPut, RunToken, ServiceState
from tests.edge.bus_support import DEADLINE_S, Answers, Child, RawClient, kill_broker, put_envelope, wait_for
from tests.edge.conftest import OpenBus
from tests.support.waiting import TTL_MS


def event(text: str) -> Event:
    return Event(name="test", severity="info", text=text)


def token(index: int) -> RunToken:
    return RunToken(index=index, token=1, text="x", logprob=-1.0, entropy=1.0)


def test_what_is_said_reaches_the_handler_typed_and_in_order(open_bus: OpenBus, make_bus: OpenBus) -> None:
    heard: list[Any] = []
    listener = make_bus("sprout", "listener")
    listener.hear(RunToken, heard.append)
    listener.start()
    speaker = open_bus("tomato", "speaker")
    for index in range(50):
        speaker.say(token(index), run="r1")
    wait_for(lambda: len(heard) == 50, "all tokens are heard")
    assert [message.data for message in heard] == [token(index) for index in range(50)]
    first = heard[0]
    assert (first.node, first.source, first.type) == ("tomato", "tomato/speaker", "model.token")
    assert first.topic.names["run"] == "r1"


def test_a_handler_hears_only_the_names_it_asked_for(open_bus: OpenBus) -> None:
    heard: list[str] = []
    listener = open_bus("sprout", "listener")
    listener.hear(RunToken, lambda message: heard.append(message.topic.names["run"]), run="mine")
    listener.wait_subscribed(DEADLINE_S)
    speaker = open_bus("tomato", "speaker")
    for run in ("other", "mine"):
        speaker.say(token(0), run=run)
    wait_for(lambda: heard, "the token is heard")
    assert heard == ["mine"]


def test_a_hearing_at_once_does_not_wait_for_handlers_and_may_fail(open_bus: OpenBus) -> None:
    heard: list[int] = []
    release = threading.Event()
    listener = open_bus("sprout", "listener")

    def hand_over(message: Any) -> None:
        heard.append(message.data.index)
        if message.data.index == 1:
            raise RuntimeError("no place for it")

    listener.hear(Event, lambda _: release.wait(DEADLINE_S))
    listener.hear_at_once(RunToken, hand_over)
    listener.wait_subscribed(DEADLINE_S)
    speaker = open_bus("tomato", "speaker")
    try:
        speaker.say(event("hold"), service="speaker")
        for index in range(MAX_INFLIGHT // 2):  # more would wait behind the event that is not acknowledged
            speaker.say(token(index), run="r1")
        wait_for(lambda: len(heard) == MAX_INFLIGHT // 2, "the tokens are heard while a handler is at work")
        assert heard == list(range(MAX_INFLIGHT // 2))
        assert listener.counters["failed.handler"] == 1
    finally:
        release.set()
    with pytest.raises(BusError, match="inbox"):
        listener.hear_at_once(MemoryPut, hand_over)


def test_an_ended_hearing_hears_no_more_and_others_go_on(open_bus: OpenBus) -> None:
    first: list[Any] = []
    second: list[Any] = []
    listener = open_bus("sprout", "listener")
    stop = listener.hear(RunToken, first.append, run="one")
    listener.hear(RunToken, second.append, run="two")
    listener.wait_subscribed(DEADLINE_S)
    speaker = open_bus("tomato", "speaker")
    speaker.say(token(0), run="one")
    wait_for(lambda: first, "the first is heard")
    stop()
    speaker.say(token(1), run="one")
    speaker.say(token(1), run="two")
    wait_for(lambda: second, "the second is heard")
    assert len(first) == 1


def test_hearings_may_come_and_go_while_messages_do(open_bus: OpenBus) -> None:
    """None of a lasting hearing is lost meanwhile, and every subscription is granted in the end."""
    heard: list[int] = []
    listener = open_bus("sprout", "listener")
    listener.hear(RunToken, lambda message: heard.append(message.data.index), run="lasting")
    listener.wait_subscribed(DEADLINE_S)
    speaker = open_bus("tomato", "speaker")

    def come_and_go(worker: int) -> None:
        for turn in range(15):
            stop = listener.hear(RunToken, lambda message: None, run=f"w{worker}-{turn}")
            listener.wait_subscribed(DEADLINE_S)
            stop()

    with ThreadPoolExecutor(4) as pool:
        changes = [pool.submit(come_and_go, worker) for worker in range(4)]
        for index in range(300):
            speaker.say(token(index), run="lasting")
        for change in changes:
            change.result(DEADLINE_S)
    wait_for(lambda: len(heard) == 300, "all are heard")
    assert heard == list(range(300))
    assert listener.connected


def test_a_batch_handler_takes_what_waits_together(open_bus: OpenBus) -> None:
    batches: list[list[int]] = []
    gate = threading.Event()

    def take(messages: list[Any]) -> None:
        batches.append([message.data.index for message in messages])
        assert gate.wait(DEADLINE_S)

    listener = open_bus("sprout", "listener")
    listener.hear(RunToken, take, batch=16, run="r")
    listener.wait_subscribed(DEADLINE_S)
    speaker = open_bus("tomato", "speaker")
    for index in range(60):
        speaker.say(token(index), run="r")
    wait_for(lambda: listener.queued + sum(map(len, batches)) >= 50, "most of them wait")
    gate.set()
    wait_for(lambda: sum(map(len, batches)) == 60, "all are taken")
    assert [index for batch in batches for index in batch] == list(range(60))
    assert max(map(len, batches)) == 16


def test_qos_1_is_never_dropped_by_a_slow_handler(open_bus: OpenBus) -> None:
    """Five times what the queue holds waits at the broker, and the queue keeps to its bound."""
    bound = 120
    heard: list[int] = []
    deepest = 0
    gate = threading.Event()
    listener = open_bus("sprout", "listener", queue_messages=bound)

    def slow(message: Any) -> None:
        nonlocal deepest
        assert gate.wait(DEADLINE_S)
        deepest = max(deepest, listener.queued)
        if message.data.index % 40 == 0:
            threading.Event().wait(0.01)
        heard.append(message.data.index)

    listener.hear(RunToken, slow, run="r")
    listener.wait_subscribed(DEADLINE_S)
    speaker = open_bus("tomato", "speaker")
    for index in range(5 * bound):
        speaker.say(token(index), run="r")
    assert speaker.flush(DEADLINE_S)
    wait_for(lambda: listener.queued >= MAX_INFLIGHT - 1, "the queue fills")
    gate.set()
    wait_for(lambda: len(heard) == 5 * bound, "all are heard")
    assert heard == list(range(5 * bound))
    assert deepest <= bound
    assert not [name for name in listener.counters.snapshot() if name.startswith("dropped")]


def test_the_broker_sends_no_more_than_the_receive_maximum_before_an_acknowledgement(open_bus: OpenBus) -> None:
    gate = threading.Event()
    listener = open_bus("sprout", "listener", queue_messages=MAX_INFLIGHT)
    heard: list[Any] = []

    def hold(message: Any) -> None:
        assert gate.wait(DEADLINE_S)
        heard.append(message)

    listener.hear(RunToken, hold, run="r")
    listener.wait_subscribed(DEADLINE_S)
    speaker = open_bus("tomato", "speaker")
    for index in range(3 * MAX_INFLIGHT):
        speaker.say(token(index), run="r")
    assert speaker.flush(DEADLINE_S)
    wait_for(lambda: listener._dispatch.ledger.owed == MAX_INFLIGHT, "as many as granted are under way")
    gate.set()
    wait_for(lambda: len(heard) == 3 * MAX_INFLIGHT, "then the rest comes")


@pytest.mark.parametrize("broker", ["mosquitto"], indirect=True)
def test_qos_0_above_the_bound_is_dropped_and_counted(make_bus: OpenBus, raw: RawClient) -> None:
    """On Mosquitto alone: rumqttd delivers at the subscription's QoS, so that nothing comes at QoS 0."""
    gate = threading.Event()
    heard: list[Any] = []

    def hold(message: Any) -> None:
        assert gate.wait(DEADLINE_S)
        heard.append(message)

    listener = make_bus("sprout", "memory_store", queue_messages=20)
    listener.hear(MemoryPut, hold)
    listener.start()
    for _ in range(200):
        raw.mqtt.publish("mindstream/v1/mars/ask/sprout/memory_store/put", put_envelope("x"), qos=0)
    wait_for(lambda: listener.counters["dropped.queue_full"] >= 100, "what is above the bound is dropped")
    assert listener.queued <= 20
    gate.set()
    wait_for(lambda: len(heard) + listener.counters["dropped.queue_full"] == 200, "each is handled or counted")


def test_a_message_above_its_limit_is_refused_and_the_connection_stays(open_bus: OpenBus) -> None:
    speaker = open_bus("tomato", "speaker")
    with pytest.raises(MessageTooLarge, match=r"event: .* its limit is 16,384"):
        speaker.say(event("x" * 20_000), service="speaker")
    with pytest.raises(MessageTooLarge, match=r"memory\.put"):
        speaker.ask("sprout", MemoryPut(text="x" * 2_000_000), ttl_ms=1000)
    speaker.say(event("small"), service="speaker")
    assert speaker.flush(DEADLINE_S)
    assert speaker.counters["disconnected"] == 0
    assert speaker.connections == 1


def test_a_name_that_may_not_stand_in_a_topic_is_refused(open_bus: OpenBus) -> None:
    speaker = open_bus("tomato", "speaker")
    for name in ("a/b", "#", "+", "", "Ä", "x" * 64):
        with pytest.raises(WrongTopic):
            speaker.say(token(0), run=name)


def test_a_broker_that_is_not_there_is_named(closing: Any) -> None:
    bus = Bus(url="mqtt://127.0.0.1:1", node="tomato", client="alone")
    closing.callback(bus.stop)
    with pytest.raises(NotConnected, match=r"127\.0\.0\.1:1"):
        bus.start(timeout_s=0.3)
    with pytest.raises(NotConnected, match="not mqtt://host:port"):
        Bus(url="http://127.0.0.1", node="tomato", client="alone")


def test_a_bus_that_started_before_its_broker_connects_by_itself(broker: Broker, make_bus: OpenBus) -> None:
    broker.stop()
    bus = make_bus("tomato", "early")
    bus.start(timeout_s=None)
    assert not bus.connected
    broker.start()
    bus.wait_subscribed(DEADLINE_S)


def test_a_full_window_without_a_broker_is_an_error_and_counted(broker: Broker, open_bus: OpenBus) -> None:
    speaker = open_bus("tomato", "speaker")
    kill_broker(broker)
    wait_for(lambda: not speaker.connected, "the loss is noticed")
    for index in range(speaker._publisher.limit):
        speaker.say(token(index), run="r", timeout_s=0.05)
    with pytest.raises(Overloaded, match="wait for the broker") as caught:
        speaker.say(token(0), run="r", timeout_s=0.05)
    assert caught.value.reason == "not connected"
    assert speaker.counters["dropped.publish"] == 1
    broker.start()
    assert speaker.flush(DEADLINE_S), "what was accepted reaches the broker when it is back"
    speaker.say(token(0), run="r")


def test_a_killed_broker_is_found_again_and_everything_is_subscribed_again(
    broker: Broker, open_bus: OpenBus, make_bus: OpenBus
) -> None:
    heard: list[str] = []
    listener = make_bus("sprout", "listener", durable_session=True)
    listener.hear(Event, lambda message: heard.append(message.data.text), service="speaker")
    listener.start()
    speaker = open_bus("tomato", "speaker")
    speaker.say(event("before"), service="speaker")
    wait_for(lambda: heard == ["before"], "heard before")
    kill_broker(broker)
    wait_for(lambda: not listener.connected and not speaker.connected, "both notice")
    broker.start()
    wait_for(lambda: listener.connected and speaker.connected, "both come back")
    assert listener.connections == 2
    assert listener.counters["reconnected"] == 1
    if broker.kind == "embedded":  # Mosquitto may have kept the session
        assert listener.counters["event.session-lost"] == 1
    speaker.say(event("after"), service="speaker")
    wait_for(lambda: "after" in heard, "heard after")


def test_a_durable_session_hears_what_was_said_while_it_was_away(open_bus: OpenBus, make_bus: OpenBus) -> None:
    heard: list[int] = []

    def listener() -> Bus:
        bus = make_bus("sprout", "listener", durable_session=True)
        bus.hear(RunToken, lambda message: heard.append(message.data.index), run="r")
        bus.start()
        return bus

    listener().stop()
    speaker = open_bus("tomato", "speaker")
    for index in range(300):
        speaker.say(token(index), run="r")
    assert speaker.flush(DEADLINE_S)
    listener()
    wait_for(lambda: len(heard) == 300, "all are heard")
    assert heard == list(range(300))


def test_a_message_whose_handler_was_killed_comes_again(start_child: Callable[..., Child], open_bus: OpenBus) -> None:
    """Nothing is acknowledged before its handler has ended, and what comes after it neither."""
    child = start_child("hear-and-hold")
    child.wait_for("ready")
    speaker = open_bus("tomato", "speaker")
    for text in ("first", "second"):
        speaker.say(event(text), service="speaker")
    child.wait_for("heard first")
    child.kill()
    assert "heard second" not in child.lines
    again = start_child("hear")
    again.wait_for("heard first")
    again.wait_for("heard second")


def test_what_was_acknowledged_does_not_come_again(start_child: Callable[..., Child], open_bus: OpenBus) -> None:
    speaker = open_bus("tomato", "speaker")
    child = start_child("hear")
    child.wait_for("ready")
    speaker.say(event("first"), service="speaker")
    child.wait_for("heard first")
    # The handler of the second has the first's acknowledgement behind it; the broker must have it before the kill.
    speaker.say(event("barrier"), service="speaker")
    child.wait_for("barrier passed")
    child.kill()
    again = start_child("hear")
    again.wait_for("ready")
    speaker.say(event("third"), service="speaker")
    again.wait_for("heard third")
    assert "heard first" not in again.lines


def test_the_will_is_seen_when_a_process_is_killed(start_child: Callable[..., Child], open_bus: OpenBus) -> None:
    seen: list[ServiceState] = []
    watcher = open_bus("tomato", "watcher")
    watcher.hear(ServiceState, lambda message: seen.append(message.data), node="sprout")
    watcher.wait_subscribed(DEADLINE_S)
    child = start_child("will")
    child.wait_for("ready")
    child.kill()
    wait_for(lambda: seen, "the will is heard")
    assert seen[0].state == "lost"


def test_a_bus_that_stops_says_goodbye_and_leaves_no_will(open_bus: OpenBus, make_bus: OpenBus) -> None:
    seen: list[str] = []
    watcher = open_bus("tomato", "watcher")
    watcher.hear(ServiceState, lambda message: seen.append(message.data.state), node="sprout")
    watcher.wait_subscribed(DEADLINE_S)
    lost = ServiceState(state="lost", time_us=0)
    going = make_bus("sprout", "listener", will=(lost, {"service": "listener"}))
    going.start()
    going.stop(goodbye=[(ServiceState(state="disconnected", time_us=0), {"service": "listener"})])
    marker = open_bus("sprout", "marker")
    marker.say(ServiceState(state="ready", time_us=0), service="marker")
    wait_for(lambda: "ready" in seen, "the marker is heard")
    assert seen == ["disconnected", "ready"]


def test_a_retained_message_reaches_those_who_come_later(open_bus: OpenBus) -> None:
    speaker = open_bus("sprout", "speaker")
    speaker.say(ServiceState(state="ready", time_us=1), service="speaker")
    assert speaker.flush(DEADLINE_S)
    seen: list[ServiceState] = []
    late = open_bus("tomato", "late")
    late.hear(ServiceState, lambda message: seen.append(message.data), node="sprout")
    wait_for(lambda: seen, "the retained state")
    assert seen[0].state == "ready"


def test_a_watcher_sees_raw_bytes_of_everything_under_its_filter(open_bus: OpenBus, raw: RawClient) -> None:
    seen: list[tuple[str, bytes]] = []
    watcher = open_bus("tomato", "watcher")
    watcher.watch("#", lambda topic, payload: seen.append((topic, payload)))
    watcher.wait_subscribed(DEADLINE_S)
    raw.publish("not/of/mindstream", b"\xff\x00")
    wait_for(lambda: ("not/of/mindstream", b"\xff\x00") in seen, "the foreign message")
    assert watcher.counters["refused.wrong_topic"] == 0


def test_what_handlers_and_answers_say_never_waits_for_itself(open_bus: OpenBus, make_bus: OpenBus) -> None:
    """More asks at once than queue and window hold together: each is answered, none of them late or dropped."""
    asks = 1_500
    answers = Answers()
    responder = make_bus("sprout", "memory_store", queue_messages=MAX_INFLIGHT)

    def handler(messages: list[Any]) -> list[Any]:
        for message in messages:
            responder.say(event(message.data.text), service="memory_store")
        return [answers(message) for message in messages]

    responder.hear(MemoryPut, handler, batch=256)
    responder.start()
    asker = open_bus("tomato", "asker")
    futures = [asker.ask_later("sprout", MemoryPut(text=f"{n}"), ttl_ms=TTL_MS) for n in range(asks)]
    for future in futures:
        future.result(DEADLINE_S)
    assert len(answers.texts) == asks
    assert responder.counters["dropped.reply"] == 0
    assert responder.counters["dropped.publish"] == 0


def test_others_waiting_for_the_window_do_not_hold_answers_up(open_bus: OpenBus, make_bus: OpenBus) -> None:
    """A handler holds as many unacknowledged messages as the embedded broker allows (it then sends nothing else, no
    PUBACK either) while workers of the same connection fill the window: its answers still leave."""
    answers = Answers()
    responder = make_bus("sprout", "memory_store")
    responder.hear(MemoryPut, answers)
    responder.start()
    asker = open_bus("tomato", "asker")
    futures = [asker.ask_later("sprout", MemoryPut(text=f"hold {n}"), ttl_ms=TTL_MS) for n in range(MAX_INFLIGHT + 20)]
    assert answers.held.wait(DEADLINE_S)
    wait_for(lambda: responder._dispatch.ledger.owed >= MAX_INFLIGHT, "the broker's limit is reached")
    with ThreadPoolExecutor(1) as pool:
        worker = pool.submit(lambda: [responder.say(token(n), run="r") for n in range(bus_module.PUBLISH_WINDOW + 50)])
        if responder.url and not worker.done():
            wait_for(
                lambda: responder._publisher.in_flight >= responder._publisher.limit or worker.done(),
                "the window is full",
            )
        answers.release.set()
        for future in futures:
            future.result(DEADLINE_S)
        worker.result(DEADLINE_S)
    assert responder.counters["dropped.reply"] == 0


def test_events_of_one_name_are_said_once_a_second_with_their_count(open_bus: OpenBus) -> None:
    seen: list[Event] = []
    listener = open_bus("sprout", "listener")
    listener.hear(Event, lambda message: seen.append(message.data), service="speaker")
    listener.wait_subscribed(DEADLINE_S)
    speaker = open_bus("tomato", "speaker")
    for number in range(500):
        speaker.events.report("flood", "warning", f"number {number}")
    wait_for(lambda: sum(each.count for each in seen) == 500, "all are accounted for")
    assert len(seen) <= 4
    assert seen[0].count == 1
    assert speaker.counters["event.flood"] == 500


def test_an_event_fits_its_topic_whatever_it_quotes(open_bus: OpenBus) -> None:
    seen: list[Event] = []
    listener = open_bus("sprout", "listener")
    listener.hear(Event, lambda message: seen.append(message.data), service="speaker")
    listener.wait_subscribed(DEADLINE_S)
    speaker = open_bus("tomato", "speaker")
    speaker.events.report("long", "warning", "ä" * 100_000)
    wait_for(lambda: seen, "the event")
    assert speaker.counters["dropped.event"] == 0


def test_large_messages_at_the_limit_pass_whole(open_bus: OpenBus) -> None:
    heard: list[MemoryEntries] = []
    listener = open_bus("sprout", "listener")
    listener.hear(MemoryEntries, lambda message: heard.append(message.data))
    listener.wait_subscribed(DEADLINE_S)
    speaker = open_bus("tomato", "speaker")
    from protocol.entries import SignedEntry

    entries = [SignedEntry(header=b"h" * 4000, signature=b"s" * 64, salt=b"", content=b"c" * 60_000) for _ in range(15)]
    speaker.say(MemoryEntries(entries=entries))
    wait_for(lambda: heard, "the message")
    assert heard[0].entries == entries
    assert topics.MEMORY_LOG.max_bytes > 15 * 64_000
