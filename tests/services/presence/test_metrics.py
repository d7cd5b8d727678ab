"""Metrics: a real scrape of a real node, read by Prometheus's own parser."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from broker.embedded import EmbeddedBroker
from edge.config import load_config
from protocol.errors import ConfigError
from protocol.messages import MemoryPut, ServiceState
from services.presence.metrics import MAX_DETAILS, NodeCollector, Snapshot, metric_name
from tests.services.presence.conftest import StartPresence, Voice
from tests.support.nodes import MEMORY_SERVICES, Node, Watcher, wait_for
from tests.support.ports import free_port
from tests.support.waiting import DEADLINE_S, TTL_MS

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(port: int) -> list[Metric]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    try:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        assert answer.status == 200
        assert answer.getheader("Content-Type", "").startswith("text/plain")
        return list(text_string_to_metric_families(answer.read().decode()))
    finally:
        connection.close()


def samples(families: list[Metric]) -> Samples:
    return {(each.name, frozenset(each.labels.items())): each.value for family in families for each in family.samples}


def value(found: Samples, metric: str, /, **labels: str) -> float | None:
    return found.get((metric, frozenset(labels.items())))


def answers(port: int) -> bool:
    try:
        scrape(port)
    except OSError:
        return False
    return True


def test_a_scrape_shows_every_counter_of_every_service(tmp_path: Path, embedded_broker: EmbeddedBroker) -> None:
    port = free_port()
    node = Node(tmp_path, "tomato", embedded_broker.url, MEMORY_SERVICES, f"[metrics]\nport = {port}\n")
    watcher = Watcher(embedded_broker.url)
    node.start()
    try:
        services = ("presence", *MEMORY_SERVICES)
        watcher.wait_node_ready("tomato", services)
        watcher.bus.ask("tomato", MemoryPut("the key is under the pot"), ttl_ms=TTL_MS)
        wait_for(lambda: answers(port), "no metrics")

        def now(metric: str, /, **labels: str) -> float | None:
            return value(samples(scrape(port)), metric, node="tomato", **labels)

        wait_for(lambda: now("mindstream_detail", service="memory_store", name="memories") == 1, "not counted")
        wait_for(
            lambda: all(now("mindstream_service_state", service=service, state="ready") == 1 for service in services),
            "not all are shown as ready",
        )
        # What presence hears from now on it may show before the watcher hears it, and the other way round.
        counters = {(service, name) for service in services for name in watcher.counters("tomato", service)}

        def not_shown(found: Samples) -> list[str]:
            names = [(service, f"{metric_name(counter)}_total") for service, counter in counters]
            return [name for service, name in names if value(found, name, node="tomato", service=service) is None]

        wait_for(lambda: not not_shown(samples(scrape(port))), f"not all of {counters} are shown")
        families = scrape(port)
        found = samples(families)
        for service in services:
            assert value(found, "mindstream_service_up", node="tomato", service=service) == 1
            assert value(found, "mindstream_service_state", node="tomato", service=service, state="ready") == 1
            assert value(found, "mindstream_service_state", node="tomato", service=service, state="lost") == 0
            assert value(found, "mindstream_service_queue", node="tomato", service=service) is not None
            assert value(found, "mindstream_service_starts_total", node="tomato", service=service) == 1
            resident = value(found, "mindstream_process_resident_memory_bytes", node="tomato", service=service)
            assert resident is not None
            assert resident > 1_000_000
        assert value(found, "mindstream_node_state", node="tomato", state="ready") == 1
        by_name = {family.name: family for family in families}
        assert by_name["mindstream_published"].type == "counter"
        assert by_name["mindstream_node_info"].samples[0].labels["node"] == "tomato"
        assert all(family.documentation for family in families)
        watcher.kill_service("tomato", "sync_bridge")
        wait_for(lambda: now("mindstream_service_starts_total", service="sync_bridge") == 2, "the start is not counted")
        assert node.stop() == 0
        assert not answers(port)
    finally:
        if node.process is not None and node.process.poll() is None:
            node.kill()
        watcher.bus.stop()


def test_a_taken_port_is_said_and_tried_again_and_the_service_goes_on(
    watcher: Watcher, start_presence: StartPresence, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.presence.service.METRICS_RETRY_S", 0.5)
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        start_presence(f"[metrics]\nport = {port}\n")
        wait_for(lambda: watcher.events_of("tomato", "metrics-port"), "it is not said")
        assert f"127.0.0.1:{port}" in watcher.events_of("tomato", "metrics-port")[0].text
        assert "metrics.port" in watcher.events_of("tomato", "metrics-port")[0].text
        wait_for(lambda: watcher.node_state("tomato") == "ready", "the service does not go on")
        wait_for(lambda: watcher.state("tomato", "presence") == "degraded", "its state does not show it")
    wait_for(lambda: answers(port), "it is not tried again")
    wait_for(lambda: watcher.state("tomato", "presence") == "ready", "its state still shows it")
    wait_for(lambda: watcher.details("tomato", "presence").get("metrics") == f"127.0.0.1:{port}", "it is not shown")


def test_a_lost_service_is_down_and_what_names_hold_does_no_harm(
    watcher: Watcher, voice: Callable[[str, str], Voice], start_presence: StartPresence
) -> None:
    port = free_port()
    start_presence(f"[metrics]\nport = {port}\n", enabled='["memory_store"]')
    wait_for(lambda: answers(port), "no metrics")
    store = voice("tomato", "memory_store")
    store.say(
        counters={'refused."x"\n{}': 3, "a.b": 1, "a-b": 2, "Ä": 1}, details={"n": {"deep": {"x": 1.5}}, "s": "t"}
    )

    def now(metric: str, /, **labels: str) -> float | None:
        return value(samples(scrape(port)), metric, node="tomato", service="memory_store", **labels)

    wait_for(lambda: now("mindstream_refused_x_total") == 3, "the counter is not there")
    assert now("mindstream_a_b_total") == 3  # two counters whose names come out alike are added
    assert now("mindstream_unnamed_total") == 1
    assert now("mindstream_detail", name="n.deep.x") == 1.5
    assert now("mindstream_detail", name="s") is None
    store.say("lost")
    wait_for(lambda: now("mindstream_service_up") == 0, "it is still up")
    assert now("mindstream_service_state", state="lost") == 1


def test_details_without_end_are_cut() -> None:
    details: dict[str, object] = {"many": {str(number): number for number in range(10 * MAX_DETAILS)}}
    nested: dict[str, object] = details
    for _ in range(1_000):
        nested = {"deeper": nested}
    state = ServiceState(state="ready", time_us=0, details={**details, "nested": nested})
    snapshot = Snapshot("tomato", "0.1.0", "ready", {"memory_store": state})
    families = {family.name: family for family in NodeCollector(lambda: snapshot).collect()}
    assert len(families["mindstream_detail"].samples) == MAX_DETAILS


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7", "::", "example.org"])
def test_metrics_do_not_leave_the_machine(tmp_path: Path, host: str) -> None:
    path = tmp_path / "mindstream.toml"
    path.write_text(f'[node]\nname = "tomato"\n[metrics]\nport = 9464\nhost = "{host}"\n')
    with pytest.raises(ConfigError, match="without TLS") as caught:
        load_config(path, {})
    assert caught.value.field == "metrics.host"
