"""This node's health as a device of Home Assistant.

Device discovery of its MQTT integration (Home Assistant 2024.11 and later, https://www.home-assistant.io/integrations/
mqtt/#device-discovery-payload): one retained message declares all entities; their values are the states that the node
says anyway. Every entity is a diagnostic one. A service that does not run here stands with its platform alone, which
removes what an earlier configuration declared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edge.counters import TROUBLES
from edge.liveness import LATE_AFTER
from edge.service_table import BY_NAME
from protocol.messages import HomeAssistantDevice
from protocol.topics import SERVICE_STATE, STATE

NODE_STATES = ("init", "ready", "sleeping", "disconnected", "lost")
SERVICE_STATES = ("init", "ready", "degraded", "failed", "disconnected", "lost")
EXPIRE_S = round(LATE_AFTER * SERVICE_STATE.every_s)
"""A number that has not been said for so long is unavailable."""

_SUM_OF_TROUBLES = (
    "{% set sum = namespace(of=0) %}"
    "{% for name, count in value_json.counters.items() if name.startswith(("
    + ", ".join(f"'{kind}'" for kind in TROUBLES)
    + ")) %}{% set sum.of = sum.of + count %}{% endfor %}{{ sum.of }}"
)
_ATTRIBUTES = "{{ dict(reason=value_json.reason, since_us=value_json.time_us) | tojson }}"


def _detail(name: str) -> str:
    """A number of a service's details; ``None`` is Home Assistant's word for unknown."""
    return f"{{{{ value_json.details.{name} | default(none) }}}}"


_OF_SERVICES: dict[str, tuple[tuple[str, str, dict[str, Any]], ...]] = {
    "memory_store": (
        ("memories", "Memories", {"state_class": "measurement", "icon": "mdi:thought-bubble-outline"}),
        ("early", "Memories waiting for a gap", {"state_class": "measurement"}),
        (
            "bytes",
            "Memory on disk",
            {"state_class": "measurement", "device_class": "data_size", "unit_of_measurement": "B"},
        ),
    ),
    "presence": (
        (
            "clock_skew_ms",
            "Clock skew",
            {"state_class": "measurement", "device_class": "duration", "unit_of_measurement": "ms"},
        ),
        ("peers_late", "Silent peers", {"state_class": "measurement"}),
    ),
}
"""Numbers of their details that are entities of their own: name, what people read, and how it is shown."""


def device(node: str, services: Sequence[str], version: str) -> HomeAssistantDevice:
    """The discovery message of ``node``, which runs ``services``."""
    state_topic = STATE.format_topic(node=node)
    node_there = {
        "topic": state_topic,
        "value_template": "{{ 'online' if value_json.state in ('init', 'ready') else 'offline' }}",
    }
    components: dict[str, dict[str, Any]] = {
        "connection": {
            "platform": "binary_sensor",
            "name": "Connection",
            "device_class": "connectivity",
            "state_topic": state_topic,
            "value_template": "{{ 'ON' if value_json.state in ('init', 'ready') else 'OFF' }}",
        },
        "state": {
            "platform": "sensor",
            "name": "State",
            "device_class": "enum",
            "options": list(NODE_STATES),
            "state_topic": state_topic,
            "value_template": "{{ value_json.state }}",
            "json_attributes_topic": state_topic,
            "json_attributes_template": _ATTRIBUTES,
        },
    }
    for service in BY_NAME:
        found = _of_service(node, service, node_there)
        if service not in services:
            found = {name: {"platform": each["platform"]} for name, each in found.items()}
        components |= found
    for name, each in components.items():
        if len(each) > 1:
            each |= {"unique_id": f"mindstream_{node}_{name}", "entity_category": "diagnostic"}
    return HomeAssistantDevice(
        dev={
            "identifiers": [f"mindstream-{node}"],
            "name": f"Mindstream {node}",
            "manufacturer": "Mindstream",
            "model": "node",
            "sw_version": version,
        },
        o={"name": "mindstream", "sw_version": version},
        cmps=components,
        qos=1,
    )


def _of_service(node: str, service: str, node_there: dict[str, Any]) -> dict[str, dict[str, Any]]:
    topic = SERVICE_STATE.format_topic(node=node, service=service)
    label = service.replace("_", " ").capitalize()
    service_there = {
        "topic": topic,
        "value_template": "{{ 'online' if value_json.state in ('init', 'ready', 'degraded') else 'offline' }}",
    }
    number: dict[str, Any] = {
        "platform": "sensor",
        "state_topic": topic,
        "availability": [node_there, service_there],
        "availability_mode": "all",
        "expire_after": EXPIRE_S,
    }
    found: dict[str, dict[str, Any]] = {
        f"{service}_state": {
            "platform": "sensor",
            "name": label,
            "device_class": "enum",
            "options": list(SERVICE_STATES),
            "state_topic": topic,
            "value_template": "{{ value_json.state }}",
            "json_attributes_topic": topic,
            "json_attributes_template": _ATTRIBUTES,
        },
        f"{service}_queue": {
            **number,
            "name": f"{label} queue",
            "state_class": "measurement",
            "value_template": "{{ value_json.queue }}",
        },
        f"{service}_troubles": {
            **number,
            "name": f"{label} drops and refusals",
            "state_class": "total_increasing",
            "value_template": _SUM_OF_TROUBLES,
        },
    }
    for name, what, how in _OF_SERVICES.get(service, ()):
        found[f"{service}_{name}"] = {**number, **how, "name": what, "value_template": _detail(name)}
    return found
