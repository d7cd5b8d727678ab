"""Two real Mosquittos with a bridge over TLS: what crosses keeps its properties, what waits arrives, nothing echoes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.configuration import Bridge, Listener, Setup
from tests.broker.conftest import Certificates, device_setup
from tests.support.mosquittos import ME, PASSWORD, Mosquitto, NamedClient, wait_for
from tests.support.ports import free_port

LOG = "mindstream/v1/sprout/memory/log"
WAITING = 3_000


@pytest.fixture
def hub(tmp_path: Path, certificates: Certificates, needs_mosquitto: None) -> Iterator[Mosquitto]:
    listeners = (Listener(free_port()), Listener(free_port(), "", certificates.server, certificates.key))
    setup = Setup("hub", tmp_path / "hub", tmp_path / "hub-data", ME, listeners)
    with Mosquitto(setup, "sprout", "tomato") as running:
        yield running


@pytest.fixture
def sprout(tmp_path: Path, hub: Mosquitto, certificates: Certificates) -> Iterator[Mosquitto]:
    """The device sprout: its own Mosquitto, with a bridge to the hub under its own name."""
    bridge = Bridge(
        "hub",
        "localhost",
        ("sprout",),
        "sprout",
        PASSWORD,
        port=hub.setup.listeners[1].port,
        ca_file=certificates.ca,
        restart_max_s=1,
    )
    with Mosquitto(device_setup(tmp_path, bridges=(bridge,)), "sprout") as running:
        wait_connected(running)
        yield running


def wait_connected(device: Mosquitto) -> None:
    with NamedClient(device.port, "sprout") as client:
        client.subscribe("$SYS/broker/connection/+/state")
        wait_for(lambda: client.payloads[-1:] == [b"1"], f"the bridge says that it is connected: {device.log[-500:]}")


def test_properties_and_retained_messages_cross_it_both_ways(hub: Mosquitto, sprout: Mosquitto) -> None:
    properties = {
        "MessageExpiryInterval": 600,
        "ResponseTopic": "mindstream/v1/sprout/reply/tomato/cli",
        "CorrelationData": b"\x00\x01id",
        "UserProperty": [("key", "value"), ("key", "again")],
        "ContentType": "application/msgpack",
    }
    with NamedClient(hub.port, "tomato") as far, NamedClient(sprout.port, "sprout") as near:
        far.subscribe("mindstream/v1/#")
        near.subscribe("mindstream/v1/#")
        near.publish("mindstream/v1/sprout/ask/tomato/memory_store/put", b"out", retain=False, **properties)
        far.publish("mindstream/v1/tomato/ask/sprout/memory_store/put", b"in", **properties)
        near.publish("mindstream/v1/sprout/state", b"state out", retain=True, **properties)
        far.publish("mindstream/v1/tomato/state", b"state in", retain=True, **properties)
        wait_for(lambda: {b"out", b"state out"} <= set(far.payloads), "what sprout says is at the hub")
        wait_for(lambda: {b"in", b"state in"} <= set(near.payloads), "what tomato says is at sprout")
        for message in [*far.messages, *near.messages]:
            assert 300 <= message.properties.MessageExpiryInterval <= 600
            assert message.properties.ResponseTopic == properties["ResponseTopic"]
            assert message.properties.CorrelationData == properties["CorrelationData"]
            assert message.properties.UserProperty == properties["UserProperty"]
            assert message.properties.ContentType == properties["ContentType"]
    # Retained there too, for those who come later.
    with NamedClient(hub.port, "tomato") as late_far, NamedClient(sprout.port, "sprout") as late_near:
        late_far.subscribe("mindstream/v1/sprout/state")
        late_near.subscribe("mindstream/v1/tomato/state")
        wait_for(lambda: late_far.payloads == [b"state out"], "sprout's state is retained at the hub")
        wait_for(lambda: late_near.payloads == [b"state in"], "tomato's state is retained at sprout")


def test_what_waits_for_the_hub_arrives_after_both_brokers_were_killed(hub: Mosquitto, sprout: Mosquitto) -> None:
    payloads = [str(number).encode() for number in range(WAITING)]
    with NamedClient(hub.port, "tomato", client_id="far", session_s=600) as far:
        far.subscribe("mindstream/v1/+/memory/#")
        hub.save()
        hub.kill()
        with NamedClient(sprout.port, "sprout") as near:
            near.publish_all(LOG, payloads)
        sprout.save()
        sprout.kill()
        hub.start()
        sprout.start()
        wait_for(lambda: len(set(far.payloads)) >= WAITING, "all that waited")
        # At least once, in order: a run that comes again begins at or before where the last one ended.
        assert list(dict.fromkeys(far.payloads)) == payloads


def test_what_is_for_others_and_blobs_do_not_cross(hub: Mosquitto, sprout: Mosquitto) -> None:
    with NamedClient(hub.port, "tomato") as far, NamedClient(sprout.port, "sprout") as near:
        near.subscribe("mindstream/#")
        far.publish("mindstream/v1/tomato/ask/pepper/memory_store/put", b"for pepper")
        far.publish("mindstream/v1/tomato/blob/t1", b"chunk")
        far.publish("mindstream/v1/tomato/reply/sprout/cli", b"for sprout")
        wait_for(lambda: b"for sprout" in near.payloads, "what is for sprout")
        assert near.payloads == [b"for sprout"]


def test_an_older_own_state_does_not_come_back_from_the_hub(hub: Mosquitto, sprout: Mosquitto) -> None:
    topic = "mindstream/v1/sprout/state"
    with (
        NamedClient(sprout.port, "sprout") as near,
        NamedClient(hub.port, "tomato", client_id="far", session_s=600) as far,
    ):
        far.subscribe(topic)
        near.publish(topic, b"old", retain=True)
        wait_for(lambda: far.payloads == [b"old"], "the hub has the old state")
        hub.save()
        hub.kill()
        near.publish(topic, b"new", retain=True)
        near.subscribe("mindstream/#")
        hub.start()
        wait_for(lambda: far.payloads[-1:] == [b"new"], "the hub has the new state")
        # This came over the bridge after all that the hub had retained.
        far.publish("mindstream/v1/tomato/event/last", b"last")
        wait_for(lambda: b"last" in near.payloads, "the bridge carries again")
        assert b"old" not in near.payloads
    with NamedClient(sprout.port, "sprout") as late, NamedClient(hub.port, "tomato") as late_far:
        late.subscribe(topic)
        late_far.subscribe(topic)
        wait_for(lambda: late.payloads == [b"new"], "the device keeps the new state")
        wait_for(lambda: late_far.payloads == [b"new"], "and so does the hub")
