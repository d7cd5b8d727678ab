"""`mindstream status`: who is there, who is late and for how long, who lags, and the exit code for scripts."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from broker.embedded import EmbeddedBroker
from edge.bus import Bus
from edge.cli.context import EXIT_NOT_READY, EXIT_UNREACHABLE
from edge.cli.status import view
from edge.config import load_config
from edge.status import Status, StatusWatch
from protocol.messages import NodeState, ServiceState
from tests.edge.test_cli import PROGRAM, mindstream
from tests.support.nodes import CHECKOUT, MEMORY_SERVICES, Node, Watcher, wait_for
from tests.support.waiting import DEADLINE_S

Say = Callable[..., None]


@pytest.fixture
def say(embedded_broker: EmbeddedBroker) -> Iterator[Say]:
    """Speak as a node, or as a service of one; retained, and ``ago_s`` seconds ago by its clock."""
    with ExitStack() as cleanup:
        buses: dict[str, Bus] = {}

        def speak(node: str, service: str = "", state: str = "ready", *, ago_s: float = 0, **fields: Any) -> None:
            if node not in buses:
                buses[node] = cleanup.enter_context(Bus(url=embedded_broker.url, node=node, client="voice"))
            time_us = round((time.time() - ago_s) * 1e6)
            if service:
                buses[node].say(ServiceState(state=state, time_us=time_us, **fields), service=service)
            else:
                buses[node].say(NodeState(state=state, time_us=time_us, **fields))
            assert buses[node].flush()

        yield speak


@pytest.fixture
def config(tmp_path: Path, embedded_broker: EmbeddedBroker) -> Path:
    """Of node ``tomato``, which does not run."""
    path = tmp_path / "tomato.toml"
    path.write_text(
        f'[node]\nname = "tomato"\ndata_dir = "{tmp_path / "tomato"}"\n[broker]\nurl = "{embedded_broker.url}"\n'
    )
    return path


def look(config: Path, node: str = "tomato") -> Status:
    loaded = load_config(config, {})
    bus = Bus(url=loaded.broker.url, node="tomato", client="looker")
    states = StatusWatch(bus, loaded, node)
    with bus:
        states.wait_retained()
        return states.look()


def shown(found: Status, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(view(found))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_running_node_is_shown_whole_and_exits_with_0(tmp_path: Path, embedded_broker: EmbeddedBroker) -> None:
    broker = embedded_broker
    node = Node(tmp_path, "tomato", broker.url, MEMORY_SERVICES)
    watcher = Watcher(broker.url)
    node.start()
    try:
        watcher.wait_node_ready("tomato", ("presence", *MEMORY_SERVICES))
        wait_for(lambda: watcher.details("tomato", "presence").get("broker"), "presence shows no broker")
        done = mindstream("status", "--json", config=node.config)
        assert done.returncode == 0, done.stdout
        found = json.loads(done.stdout)
        assert (found["node"], found["ready"], found["amiss"]) == ("tomato", True, [])
        assert found["judged_by"] == "presence"
        assert (found["broker"]["url"], found["broker"]["kind"]) == (broker.url, "external")
        assert found["broker"]["protocol"] == "5"
        assert abs(found["broker"]["connected_us"] / 1e6 - time.time()) < 300
        tomato = found["nodes"]["tomato"]
        assert (tomato["state"], tomato["behind"], tomato["fingerprint"]) == ("ready", 0, node.identity.fingerprint)
        for service in ("presence", *MEMORY_SERVICES):
            assert tomato["services"][service]["state"] == "ready"
            assert tomato["services"][service]["liveness"] in ("live", "unknown")
        text = shown(look(node.config))
        assert all(service in text for service in MEMORY_SERVICES)
        assert "MQTT 5), connected for" in text
        # Given up: the node goes on, and a script is told all the same.
        node.config.write_text(node.config.read_text() + "[modle]\n")
        watcher.kill_service("tomato", "sync_bridge")
        wait_for(lambda: watcher.state("tomato", "sync_bridge") == "failed", "it is not given up")
        node.config.write_text(node.config.read_text().replace("[modle]\n", ""))
        # The broker's word that it is lost may come after the supervisor's that it failed, which is then repeated.
        wait_for(
            lambda: (
                (done := mindstream("status", config=node.config)).returncode == EXIT_NOT_READY
                and "tomato is not ready: sync_bridge is failed" in done.stdout
            ),
            "status does not say that it failed",
        )
        node.kill()
        wait_for(lambda: watcher.node_state("tomato") == "lost", "it is not lost")
        assert look(node.config).amiss[0].startswith("tomato is lost")
    finally:
        if node.process is not None and node.process.poll() is None:
            node.kill()
        watcher.bus.stop()


def test_who_said_ready_long_ago_is_late_and_for_how_long(config: Path, say: Say) -> None:
    say("tomato")
    say("tomato", "memory_store", ago_s=45)
    say("tomato", "sync_bridge", ago_s=600)
    say("tomato", "model_runner", "disconnected", ago_s=600)
    say("tomato", "presence", "lost", ago_s=600)
    found = look(config)
    assert found.judged_by == "clocks"
    services = found.nodes["tomato"].services
    assert {name: each.liveness for name, each in services.items()} == {
        "memory_store": "late",
        "sync_bridge": "silent",
        "model_runner": "gone",
        "presence": "gone",
    }
    assert 45 <= services["memory_store"].silent_s < 45 + DEADLINE_S
    assert not found.ready
    text = shown(found)
    assert "ready by its last word, silent for " in text
    assert "who is late is judged by clocks" in text.replace("\n", " ")


def test_presence_says_who_is_alive_whatever_the_clocks_say(
    config: Path, say: Say, embedded_broker: EmbeddedBroker
) -> None:
    from protocol.messages import PresenceHeard, PresenceHeardAsk, Speaker

    def heard(_message: Any) -> PresenceHeard:
        return PresenceHeard(
            [
                Speaker("sprout", "", "ready", "live", 2.0, -3_600_000.0),
                Speaker("sprout", "memory_store", "ready", "live", 2.0, -3_600_000.0),
                Speaker("sprout", "sync_bridge", "ready", "late", 33.0),
            ]
        )

    say("sprout", ago_s=3_602)  # its clock is an hour slow
    say("sprout", "memory_store", ago_s=3_602)
    say("sprout", "sync_bridge", ago_s=0)
    say("tomato")
    say("tomato", "presence")
    with Bus(url=embedded_broker.url, node="tomato", client="presence") as presence:
        presence.hear(PresenceHeardAsk, heard)
        presence.wait_subscribed(DEADLINE_S)
        found = look(config)
    assert found.judged_by == "presence"
    sprout = found.nodes["sprout"]
    assert (sprout.liveness, sprout.skew_ms) == ("live", -3_600_000.0)
    assert sprout.services["memory_store"].liveness == "live"
    assert sprout.services["sync_bridge"].liveness == "late"
    assert sprout.services["sync_bridge"].silent_s == pytest.approx(33, abs=DEADLINE_S)
    assert "-3,600.0 s" in shown(found)
    assert found.ready  # it is tomato that is asked about


def test_a_presence_that_hangs_is_not_waited_for(config: Path, say: Say) -> None:
    say("tomato")
    say("tomato", "presence")
    began_s = time.monotonic()
    assert look(config).judged_by == "clocks"
    assert time.monotonic() - began_s < DEADLINE_S


def test_memories_that_others_hold_are_counted_as_lag(config: Path, say: Say) -> None:
    say("tomato")
    say("tomato", "memory_store", details={"entries": {"tomato/everyone/a": 10, "tomato/private/a": 99}})
    say("sprout", "memory_store", details={"entries": {"tomato/everyone/a": 7, "sprout/everyone/b": 5}})
    say("fern", "memory_store", "init")
    found = look(config)
    assert {name: each.behind for name, each in found.nodes.items()} == {"fern": None, "sprout": 3, "tomato": 5}
    assert found.nodes["sprout"].behind_by_origin == {"tomato/everyone/a": 3}
    assert "5 memories behind" in shown(found)


@pytest.mark.parametrize(
    ("state", "service_state", "ready"),
    [
        ("ready", "ready", True),
        ("ready", "degraded", True),
        ("ready", "disconnected", True),
        ("ready", "failed", False),
        ("ready", "lost", False),
        ("init", "init", False),
        ("sleeping", "ready", False),
        ("lost", "ready", False),
    ],
)
def test_what_counts_as_ready(config: Path, say: Say, state: str, service_state: str, ready: bool) -> None:
    say("tomato", state=state)
    say("tomato", "model_runner", service_state, reason="no model")
    found = look(config)
    assert found.ready is ready
    assert bool(found.amiss) is not ready


def test_a_node_that_never_spoke_is_not_ready_and_another_may_be_asked_about(config: Path, say: Say) -> None:
    assert look(config).amiss == ["tomato has not said anything on this broker"]
    say("sprout")
    done = mindstream("status", "--node", "sprout", config=config)
    assert done.returncode == 0, done.stdout


def test_it_is_readable_in_100_columns(config: Path, say: Say) -> None:
    for node in ("tomato", "greenhouse-north-2"):
        say(node, version="0.1.0", reason="model_runner is degraded: " + "no model of that name is here " * 5)
        say(node, "memory_store", queue=3, counters={"dropped.publish": 12, "refused.not_found": 3, "handled": 9})
        say(node, "model_runner", "degraded", reason="no model of that name is here " * 5, ago_s=90)
        say(node, "sync_bridge", details={"in_step": 12, "note": "words " * 30})
    lines = shown(look(config)).splitlines()
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    for word in ("greenhouse-north-2", "memory_store", "model_runner", "degraded", "refused.not_found", "0.1.0"):
        assert word in text or word in text.replace("\n", ""), word


def test_watching_shows_changes_until_ctrl_c(config: Path, say: Say) -> None:
    say("tomato", state="init")
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    watching = subprocess.Popen(
        [*PROGRAM, "--config", str(config), "status", "--watch"],
        cwd=CHECKOUT,
        stdout=end,
        stderr=end,
        env={**os.environ, "TERM": "xterm"},
        # In the background a shell has SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    os.close(end)
    seen = b""

    def sees(word: bytes) -> bool:
        nonlocal seen
        with suppress(OSError):  # EIO: the other side has closed it
            while select.select([terminal], [], [], 0)[0]:
                seen += os.read(terminal, 65_536)
        return word in seen

    try:
        wait_for(lambda: sees(b"init"), "nothing is shown")
        say("tomato", state="sleeping")
        wait_for(lambda: sees(b"sleeping"), "the change is not shown")
        watching.send_signal(signal.SIGINT)
        wait_for(lambda: sees(b"") and watching.poll() is not None, "it does not end")
        assert watching.returncode == 0
        assert b"Traceback" not in seen
    finally:
        watching.kill()
        watching.wait()
        os.close(terminal)


def test_what_peers_say_moves_no_cursor(config: Path, say: Say) -> None:
    say("tomato", "memory_store", "degraded", reason="\x1b[2Jgone\x07")
    text = shown(look(config))
    assert "\x1b" not in text
    assert "\x07" not in text


def test_sleep_and_wake_are_commands(tmp_path: Path, embedded_broker: EmbeddedBroker) -> None:
    node = Node(tmp_path, "tomato", embedded_broker.url, ["presence"])
    watcher = Watcher(embedded_broker.url)
    node.start()
    try:
        wait_for(lambda: watcher.node_state("tomato") == "ready", "not ready")
        done = mindstream("sleep", config=node.config)
        assert (done.returncode, done.stdout) == (0, "tomato is sleeping\n")
        wait_for(lambda: watcher.node_state("tomato") == "sleeping", "it does not say so")
        done = mindstream("wake", config=node.config)
        assert (done.returncode, done.stdout) == (0, "tomato is ready\n")
        wait_for(lambda: watcher.node_state("tomato") == "ready", "it does not wake")
        assert node.stop() == 0
        assert mindstream("sleep", config=node.config).returncode == EXIT_UNREACHABLE
    finally:
        if node.process is not None and node.process.poll() is None:
            node.kill()
        watcher.bus.stop()
