"""Home Assistant's discovery: a payload that it takes, and templates that find what is really published."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.base import Broker
from broker.configuration import Listener, Setup
from broker.embedded import EmbeddedBroker
from broker.mosquitto import INSTALL_HINT, find_mosquitto
from edge.bus import Bus
from edge.service_table import BY_NAME
from protocol.messages import MemoryPut
from services.presence import home_assistant
from tests.services.presence.conftest import StartPresence
from tests.support.mosquittos import ME, NOT_AUTHORISED, PASSWORD, Mosquitto, NamedClient
from tests.support.nodes import MEMORY_SERVICES, Node, Watcher, wait_for
from tests.support.ports import free_port
from tests.support.waiting import DEADLINE_S, TTL_MS

jsonschema = pytest.importorskip("jsonschema")
sandbox = pytest.importorskip("jinja2.sandbox")
jinja2 = pytest.importorskip("jinja2")

TOPIC = "homeassistant/device/mindstream-tomato/config"

# From https://www.home-assistant.io/integrations/mqtt/#device-discovery-payload and the pages of its sensor and binary
# sensor platforms (2024.11 and later). A component with its platform alone is one that is removed.
_TOPIC = {"type": "string", "pattern": "^[^#+\\0]+$"}
_AVAILABILITY = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["topic"],
        "properties": {
            "topic": _TOPIC,
            "value_template": {"type": "string"},
            "payload_available": {"type": "string"},
            "payload_not_available": {"type": "string"},
        },
        "additionalProperties": False,
    },
}
_ENTITY = {
    "platform": {"enum": ["sensor", "binary_sensor"]},
    "name": {"type": "string", "minLength": 1},
    "unique_id": {"type": "string", "pattern": "^[a-z0-9_-]+$"},
    "state_topic": _TOPIC,
    "value_template": {"type": "string"},
    "json_attributes_topic": _TOPIC,
    "json_attributes_template": {"type": "string"},
    "entity_category": {"enum": ["diagnostic"]},
    "availability": _AVAILABILITY,
    "availability_mode": {"enum": ["all", "any", "latest"]},
    "expire_after": {"type": "integer", "minimum": 1},
    "icon": {"type": "string", "pattern": "^mdi:"},
    "unit_of_measurement": {"type": "string"},
    "device_class": {"type": "string"},
}
_REQUIRED = ["platform", "name", "unique_id", "state_topic", "value_template", "entity_category"]
_SENSOR = {
    "properties": {
        **_ENTITY,
        "platform": {"const": "sensor"},
        "device_class": {"enum": ["enum", "data_size", "duration"]},
        "state_class": {"enum": ["measurement", "total", "total_increasing"]},
        "options": {"type": "array", "items": {"type": "string"}, "minItems": 1},
    },
    "required": _REQUIRED,
    "additionalProperties": False,
    # An enum has options, and no state class or unit; nothing else has options. Some classes need one of their units.
    "allOf": [
        {
            "if": {"properties": {"device_class": {"const": "enum"}}, "required": ["device_class"]},
            "then": {
                "required": ["options"],
                "not": {"anyOf": [{"required": ["state_class"]}, {"required": ["unit_of_measurement"]}]},
            },
            "else": {"not": {"required": ["options"]}},
        },
        {
            "if": {"properties": {"device_class": {"const": "data_size"}}, "required": ["device_class"]},
            "then": {"properties": {"unit_of_measurement": {"const": "B"}}, "required": ["unit_of_measurement"]},
        },
        {
            "if": {"properties": {"device_class": {"const": "duration"}}, "required": ["device_class"]},
            "then": {"properties": {"unit_of_measurement": {"const": "ms"}}, "required": ["unit_of_measurement"]},
        },
    ],
}
_BINARY_SENSOR = {
    "properties": {
        **_ENTITY,
        "platform": {"const": "binary_sensor"},
        "device_class": {"const": "connectivity"},
        "payload_on": {"type": "string"},
        "payload_off": {"type": "string"},
    },
    "required": _REQUIRED,
    "additionalProperties": False,
}
_REMOVED = {
    "properties": {"platform": {"enum": ["sensor", "binary_sensor"]}},
    "required": ["platform"],
    "additionalProperties": False,
}
SCHEMA = {
    "type": "object",
    "required": ["dev", "o", "cmps"],
    "additionalProperties": False,
    "properties": {
        "dev": {
            "type": "object",
            "required": ["identifiers", "name"],
            "additionalProperties": False,
            "properties": {
                "identifiers": {"type": "array", "items": {"type": "string"}, "minItems": 1},
                "name": {"type": "string"},
                "manufacturer": {"type": "string"},
                "model": {"type": "string"},
                "sw_version": {"type": "string"},
            },
        },
        "o": {
            "type": "object",
            "required": ["name"],
            "additionalProperties": False,
            "properties": {"name": {"type": "string"}, "sw_version": {"type": "string"}},
        },
        "cmps": {
            "type": "object",
            "minProperties": 1,
            "additionalProperties": {"type": "object", "oneOf": [_SENSOR, _BINARY_SENSOR, _REMOVED]},
        },
        "avty": _AVAILABILITY,
        "avty_mode": {"enum": ["all", "any", "latest"]},
        "qos": {"enum": [0, 1, 2]},
    },
}


class Raw:
    """The last payload on every topic, as any MQTT client sees them."""

    def __init__(self, url: str, *filters: str) -> None:
        self.payloads: dict[str, bytes] = {}
        self.heard: list[str] = []
        self.bus = Bus(url=url, node="tester", client="raw")
        for filter in filters or ("mindstream/v1/#", "homeassistant/#"):
            self.bus.watch(filter, self._hear)
        self.bus.start(DEADLINE_S)

    def _hear(self, topic: str, payload: bytes) -> None:
        self.payloads[topic] = payload
        self.heard.append(topic)

    def json(self, topic: str) -> Any:
        return json.loads(self.payloads[topic])


@pytest.fixture
def raw(embedded_broker: EmbeddedBroker) -> Iterator[Raw]:
    found = Raw(embedded_broker.url)
    yield found
    found.bus.stop()


def rendered(template: str, payload: bytes) -> str:
    """As Home Assistant renders it: sandboxed. A field that is not there is an error here, not an empty text."""
    environment = sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
    return str(environment.from_string(template).render(value=payload.decode(), value_json=json.loads(payload)))


def entities(message: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: each for name, each in message["cmps"].items() if len(each) > 1}


@pytest.mark.parametrize("services", [list(BY_NAME), ["presence"]], ids=["all", "presence alone"])
def test_the_payload_is_one_that_home_assistant_takes(services: list[str]) -> None:
    import msgspec

    made = home_assistant.device("tomato", services, "0.1.0")
    message = json.loads(msgspec.json.encode(made))
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(message, SCHEMA)
    ids = [each["unique_id"] for each in entities(message).values()]
    assert len(ids) == len(set(ids))
    assert {f"{service}_state" for service in services} <= set(entities(message))
    # What does not run here is removed, should it have been declared before.
    gone = set(BY_NAME) - set(services)
    assert all(message["cmps"][f"{service}_state"] == {"platform": "sensor"} for service in gone)


def test_every_template_finds_what_a_real_node_publishes(tmp_path: Path, broker: Broker) -> None:
    node = Node(tmp_path, "tomato", broker.url, MEMORY_SERVICES)
    raw = Raw(broker.url)
    node.start()
    try:
        state = "mindstream/v1/tomato/state"
        wait_for(lambda: state in raw.payloads and raw.json(state)["state"] == "ready", "not ready")
        wait_for(lambda: raw.payloads.get(TOPIC), "Home Assistant is not told")
        raw.bus.ask("tomato", MemoryPut("the key is under the pot"), ttl_ms=TTL_MS)
        store = "mindstream/v1/tomato/service/memory_store/state"
        wait_for(lambda: store in raw.payloads and raw.json(store)["details"].get("memories") == 1, "not counted")
        message = raw.json(TOPIC)
        jsonschema.validate(message, SCHEMA)
        topics = {each["state_topic"] for each in entities(message).values()}
        wait_for(lambda: all(topic in raw.payloads for topic in topics), f"not all of {topics} are said")
        shown: dict[str, str] = {}
        for name, each in entities(message).items():
            topic = each["state_topic"]
            shown[name] = value = rendered(each["value_template"], raw.payloads[topic])
            if each.get("device_class") == "enum":
                assert value in each["options"], name
            elif each["platform"] == "binary_sensor":
                assert value in ("ON", "OFF"), name
            else:
                float(value)
            if "json_attributes_template" in each:
                attributes = json.loads(rendered(each["json_attributes_template"], raw.payloads[topic]))
                assert attributes.keys() == {"reason", "since_us"}
            for available in each.get("availability", []):
                assert rendered(available["value_template"], raw.payloads[available["topic"]]) == "online", name
        assert shown["connection"] == "ON"
        assert shown["state"] == "ready"
        assert shown["memory_store_memories"] == "1"
        assert node.stop() == 0
        wait_for(lambda: raw.json(state)["state"] == "disconnected", "no goodbye")
        connection = entities(message)["connection"]
        assert rendered(connection["value_template"], raw.payloads[state]) == "OFF"
        queue = entities(message)["memory_store_queue"]
        assert {rendered(each["value_template"], raw.payloads[each["topic"]]) for each in queue["availability"]} == {
            "offline"
        }
    finally:
        if node.process is not None and node.process.poll() is None:
            node.kill()
        raw.bus.stop()


def test_every_word_that_a_broker_may_say_of_a_service_can_be_rendered(raw: Raw) -> None:
    """A will has no counters and no details; a service in trouble may have no details."""
    made = home_assistant.device("tomato", list(BY_NAME), "0.1.0")
    will = b'{"state":"lost","time_us":1,"reason":"","pid":0,"queue":0,"counters":{},"details":{}}'
    troubles = (
        b'{"state":"degraded","time_us":1,"reason":"","pid":0,"queue":2,"details":{},'
        b'"counters":{"dropped.publish":2,"refused.not_found":3,"handled":400}}'
    )
    for name, each in made.cmps.items():
        value = rendered(each["value_template"], will)
        assert value, name
        if name.endswith("_troubles"):
            assert (value, rendered(each["value_template"], troubles)) == ("0", "5")


def test_it_is_said_again_when_home_assistant_starts(raw: Raw, start_presence: StartPresence) -> None:
    import paho.mqtt.client as paho

    start_presence()
    wait_for(lambda: TOPIC in raw.payloads, "it is not said")
    said = raw.heard.count(TOPIC)
    host, port = raw.bus.url.removeprefix("mqtt://").split(":")
    home = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id="home", protocol=paho.MQTTv5)
    home.connect(host, int(port))
    home.loop_start()
    home.publish("homeassistant/status", b"online", 1)
    wait_for(lambda: raw.heard.count(TOPIC) > said, "it is not said again")
    home.disconnect()
    home.loop_stop()


def test_with_the_rights_that_mindstream_renders_a_node_says_its_own_and_hears_home_assistant_start(
    tmp_path: Path, start_presence: StartPresence
) -> None:
    if find_mosquitto() is None:
        pytest.skip(f"Mosquitto is not installed: {INSTALL_HINT}")
    setup = Setup("device", tmp_path / "etc", tmp_path / "data", ME, (Listener(free_port()),))
    with Mosquitto(setup, "tomato", "mallory") as running:
        running.folder.add("hass", PASSWORD, role="discovery")
        running.reload()
        password = tmp_path / "password"
        password.write_text(PASSWORD)
        password.chmod(0o600)
        url = f'mqtt://127.0.0.1:{running.port}"\nusername = "tomato"\npassword_file = "{password}'
        with NamedClient(running.port, "hass") as hass, NamedClient(running.port, "mallory") as mallory:
            hass.subscribe("homeassistant/#")
            presence = start_presence(url=url)

            def said() -> int:
                return sum(message.topic == TOPIC for message in hass.messages)

            wait_for(lambda: said() == 1, "it is not said")
            assert hass.publish("homeassistant/status", b"online") < 0x80
            wait_for(lambda: said() == 2, "it is not said again")
            assert mallory.publish(TOPIC, b"{}", retain=True) == NOT_AUTHORISED
            counters = presence.bus.counters.snapshot()
            assert not [name for name in counters if name.startswith(("refused", "dropped"))]
            presence.stop()
            wait_for(lambda: presence._node_bus is None, "it does not end")


def test_switched_off_it_is_taken_back(
    embedded_broker: EmbeddedBroker, raw: Raw, start_presence: StartPresence
) -> None:
    presence = start_presence()
    wait_for(lambda: raw.payloads.get(TOPIC), "it is not said")
    presence.stop()
    wait_for(lambda: presence._node_bus is None, "it does not end")
    wait_for(lambda: raw.json("mindstream/v1/tomato/state")["state"] == "disconnected", "it says no goodbye")
    start_presence("[home_assistant]\ndiscovery = false\n")
    wait_for(lambda: raw.payloads[TOPIC] == b"", "it is not taken back")
    later = Raw(embedded_broker.url, "homeassistant/#", "mindstream/v1/tomato/state")
    wait_for(lambda: later.payloads, "nothing is retained at all")
    assert TOPIC not in later.payloads
    later.bus.stop()


def test_the_prefix_is_the_users(raw: Raw, watcher: Watcher, start_presence: StartPresence) -> None:
    other = Raw(raw.bus.url, "home/assistant/#")
    start_presence('[home_assistant]\nprefix = "home/assistant"\n')
    wait_for(lambda: "home/assistant/device/mindstream-tomato/config" in other.payloads, "it is not said there")
    wait_for(lambda: watcher.node_state("tomato") == "ready", "not ready")
    assert TOPIC not in raw.payloads
    other.bus.stop()
