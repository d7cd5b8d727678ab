"""The supervisor with real brokers and real services: what starts, what is started again, what is given up."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from broker.base import Broker
from broker.child import spawn
from broker.embedded import EmbeddedBroker
from edge.bus import Bus
from edge.keys import load_or_create_identity
from edge.node_lock import running_in
from protocol.codec import Received
from protocol.messages import Event, NodeState
from tests.support.nodes import CHECKOUT, MEMORY_SERVICES, Node, Watcher, runs, wait_for
from tests.support.waiting import DEADLINE_S

FAST = "[supervisor]\nrestart_limit = 2\nbackoff_first_s = 0.05\nbackoff_max_s = 0.2\nstop_timeout_s = 40\n"


@contextmanager
def running(
    folder: Path, broker_url: str, services: tuple[str, ...] = MEMORY_SERVICES, extra: str = FAST
) -> Iterator[Node]:
    node = Node(folder, "tomato", broker_url, services, extra)
    node.start()
    try:
        yield node
    finally:
        if node.process is not None and node.process.poll() is None:
            node.kill()


@pytest.fixture
def watcher(embedded_broker: EmbeddedBroker) -> Iterator[Watcher]:
    found = Watcher(embedded_broker.url)
    yield found
    found.bus.stop()


def pid_of(watcher: Watcher, service: str) -> int:
    state = watcher.services.get(("tomato", service))
    return state.pid if state is not None else 0


def run_to_end(config: Path, timeout_s: float = 120.0) -> tuple[int, str]:
    """A supervisor that is expected to end by itself: its exit code and what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "edge.supervisor", "--config", str(config)],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout_s,
        check=False,
    )
    return done.returncode, done.stdout.decode()


def written(folder: Path, text: str = "", *, data_dir: Path | None = None, port: int = 0) -> Path:
    path = folder / "node.toml"
    path.write_text(
        f'[node]\nname = "tomato"\ndata_dir = "{data_dir or folder / "data"}"\n[broker]\nport = {port}\n'
        f'[services]\nenabled = ["memory_store"]\n{text}'
    )
    return path


def test_a_node_becomes_ready_and_sigterm_ends_all_of_it(
    tmp_path: Path, embedded_broker: EmbeddedBroker, watcher: Watcher
) -> None:
    with running(tmp_path, embedded_broker.url) as node:
        watcher.wait_node_ready("tomato", ("presence", *MEMORY_SERVICES))
        state = watcher.nodes["tomato"]
        assert state.services == ["presence", *MEMORY_SERVICES]
        assert state.fingerprint == node.identity.fingerprint
        assert state.pid == pid_of(watcher, "presence")
        pids = [pid_of(watcher, service) for service in MEMORY_SERVICES]
        assert node.stop() == 0
        assert not any(map(runs, pids))
        wait_for(lambda: watcher.node_state("tomato") == "disconnected", "no goodbye")
        gone = [("tomato", service, "disconnected") for service in reversed(MEMORY_SERVICES)]
        # In the reverse order of the table.
        wait_for(lambda: [said for said in watcher.said if said in gone] == gone, f"not {gone} but {watcher.said}")
        assert watcher.nodes["tomato"].pid == state.pid
        assert running_in(node.data_dir) is None


def test_a_service_that_is_killed_is_started_again(
    tmp_path: Path, embedded_broker: EmbeddedBroker, watcher: Watcher
) -> None:
    with running(tmp_path, embedded_broker.url) as node:
        watcher.wait_ready("tomato", MEMORY_SERVICES)
        first, other = pid_of(watcher, "memory_store"), pid_of(watcher, "sync_bridge")
        watcher.kill_service("tomato", "memory_store")
        wait_for(
            lambda: watcher.state("tomato", "memory_store") == "ready" and pid_of(watcher, "memory_store") != first,
            "it was not started again",
        )
        assert pid_of(watcher, "sync_bridge") == other
        assert node.stop() == 0


def test_a_service_that_keeps_dying_is_given_up_loudly_and_alone(
    tmp_path: Path, embedded_broker: EmbeddedBroker, watcher: Watcher
) -> None:
    with running(tmp_path, embedded_broker.url) as node:
        # A file where the service's folder should be: it fails as soon as it starts.
        (node.data_dir / "memory_store").write_text("")
        wait_for(lambda: watcher.state("tomato", "memory_store") == "failed", "it is not given up")
        failed = watcher.services["tomato", "memory_store"]
        assert "died 3 times in 60 s" in failed.reason
        assert "memory_store" in failed.reason
        watcher.wait_ready("tomato", ["sync_bridge"])
        wait_for(lambda: watcher.events_of("tomato", "service-stopped"), "no event")
        (stopped,) = watcher.events_of("tomato", "service-stopped")
        assert watcher.events_of("tomato", "service-died")
        assert stopped.severity == "error"
        assert "memory_store" in stopped.text

        # The node goes on, without it.
        def goes_on() -> bool:
            state = watcher.nodes.get("tomato")
            return (
                state is not None
                and state.services == ["presence", "sync_bridge"]
                and state.state == "ready"
                and state.reason.startswith("memory_store is failed: it died 3 times")
            )

        wait_for(goes_on, "the node is not ready, with one service failed")
        assert "ERROR" in node.log
        assert node.stop() == 0


def test_a_wrong_configuration_is_not_tried_again(
    tmp_path: Path, embedded_broker: EmbeddedBroker, watcher: Watcher
) -> None:
    with running(tmp_path, embedded_broker.url) as node:
        watcher.wait_ready("tomato", MEMORY_SERVICES)
        node.config.write_text(node.config.read_text() + "[modle]\n")
        watcher.kill_service("tomato", "memory_store")
        wait_for(lambda: watcher.state("tomato", "memory_store") == "failed", "it is not given up")
        assert "unknown section modle" in watcher.services["tomato", "memory_store"].reason
        assert watcher.state("tomato", "sync_bridge") == "ready"
        # What the service printed is passed on under its name, and stands in its log file.
        assert "memory_store | memory_store: reading" in node.log
        assert "unknown section modle" in (node.data_dir / "logs" / "memory_store.log").read_text()
        assert node.stop() == 0


def test_the_failure_is_still_known_after_the_broker_has_forgotten_all(tmp_path: Path) -> None:
    with EmbeddedBroker() as broker, running(tmp_path, broker.url) as node:
        (node.data_dir / "memory_store").write_text("")
        first = Watcher(broker.url)
        wait_for(lambda: first.state("tomato", "memory_store") == "failed", "it is not given up")
        first.bus.stop()
        broker.stop()
        broker.start()
        second = Watcher(broker.url, "second")
        wait_for(lambda: second.state("tomato", "memory_store") == "failed", "the failure is forgotten")
        wait_for(lambda: second.node_state("tomato") == "ready", "the node is forgotten")
        second.bus.stop()
        assert node.stop() == 0


def test_kill_nine_of_the_supervisor_leaves_no_orphan_and_says_lost(
    tmp_path: Path, broker: Broker, request: pytest.FixtureRequest
) -> None:
    found = Watcher(broker.url)
    request.addfinalizer(found.bus.stop)
    with running(tmp_path, broker.url) as node:
        found.wait_node_ready("tomato", MEMORY_SERVICES)
        pids = [pid_of(found, service) for service in MEMORY_SERVICES]
        node.kill()
        wait_for(lambda: not any(map(runs, pids)), "an orphan is left")
        wait_for(lambda: found.node_state("tomato") == "lost", "the broker does not say so")


def test_one_data_folder_has_one_supervisor(tmp_path: Path, embedded_broker: EmbeddedBroker, watcher: Watcher) -> None:
    with running(tmp_path, embedded_broker.url) as node:
        watcher.wait_node_ready("tomato", MEMORY_SERVICES)
        assert node.process is not None
        code, said = run_to_end(node.config)
        assert code == 1
        assert f"process {node.process.pid}" in said
        assert "node.data_dir" in said
        assert watcher.state("tomato", "memory_store") == "ready"
        first = watcher.nodes["tomato"].pid
        node.kill()
        # The lock went with its holder: the next one starts.
        node.start()
        wait_for(
            lambda: watcher.node_state("tomato") == "ready" and watcher.nodes["tomato"].pid != first,
            "the next one is not ready",
        )
        assert node.stop() == 0


def test_the_embedded_broker_is_started_again_on_its_port(tmp_path: Path) -> None:
    config = written(tmp_path, FAST)
    with (tmp_path / "log").open("wb") as log:
        process = spawn(
            [sys.executable, "-m", "edge.supervisor", "--config", str(config)], cwd=CHECKOUT, stdout=log, stderr=log
        )
    try:
        wait_for(lambda: running_in(tmp_path / "data"), "no broker")
        found = running_in(tmp_path / "data")
        assert found is not None
        assert found.pid == process.pid
        watcher = Watcher(found.broker_url)
        watcher.wait_ready("tomato", ["memory_store"])
        port = found.broker_url.rpartition(":")[2]
        children = psutil.Process(process.pid).children(recursive=True)
        broker = next(child for child in children if "broker.embedded" in child.cmdline() and port in child.cmdline())
        connections = watcher.bus.connections
        killed_us = time.time_ns() // 1000
        broker.kill()
        wait_for(lambda: watcher.bus.connections > connections and watcher.bus.connected, "it did not come back")

        def said_again() -> bool:
            said = [watcher.nodes.get("tomato"), watcher.services.get(("tomato", "memory_store"))]
            return all(each is not None and each.state == "ready" and each.time_us > killed_us for each in said)

        wait_for(said_again, "not ready again")
        watcher.bus.stop()
        process.terminate()
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.wait()
    assert "was started again" in (tmp_path / "log").read_text()


def test_a_broker_that_comes_later_is_waited_for_and_asked_after(tmp_path: Path) -> None:
    broker = EmbeddedBroker()
    broker.start()
    broker.stop()  # it keeps its port
    with running(tmp_path, broker.url) as node:
        wait_for(lambda: "no broker answers" in node.log, "nothing is said of it")
        assert broker.url in node.log
        with broker:
            found = Watcher(broker.url)
            found.wait_node_ready("tomato", MEMORY_SERVICES)
            found.bus.stop()
            assert node.stop() == 0


def test_a_busy_port_is_named_with_both_ways_out(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = run_to_end(written(tmp_path, port=port))
    assert code == 1
    assert f'broker.url = "mqtt://127.0.0.1:{port}"' in said
    assert "broker.port" in said


def test_a_configuration_error_ends_with_its_own_exit_code(tmp_path: Path) -> None:
    code, said = run_to_end(written(tmp_path, "[supervisr]\n"))
    assert code == 78
    assert "supervisor" in said
    assert "Traceback" not in said


def test_two_nodes_of_one_name_are_told_so(tmp_path: Path, embedded_broker: EmbeddedBroker) -> None:
    events: list[Event] = []

    def hear(message: Received) -> None:
        events.append(message.data)

    other = load_or_create_identity(tmp_path / "other", "tomato")
    with Bus(url=embedded_broker.url, node="tomato", client="impostor") as bus:
        bus.hear(Event, hear, node="tomato")
        bus.wait_subscribed(DEADLINE_S)
        with running(tmp_path, embedded_broker.url, ("sync_bridge",)) as node:
            wait_for(lambda: "tomato is ready" in node.log, "not ready")
            bus.say(NodeState(state="ready", time_us=0, fingerprint=other.fingerprint))
            wait_for(lambda: any(event.name == "node-name-taken" for event in events), "nobody is told")
            assert node.stop() == 0


def test_a_second_signal_does_not_wait_for_a_service_that_hangs(
    tmp_path: Path, embedded_broker: EmbeddedBroker, watcher: Watcher
) -> None:
    patient = FAST.replace("stop_timeout_s = 40", "stop_timeout_s = 600")
    with running(tmp_path, embedded_broker.url, ("memory_store",), patient) as node:
        watcher.wait_ready("tomato", ["memory_store"])
        pid = pid_of(watcher, "memory_store")
        os.kill(pid, signal.SIGSTOP)
        assert node.process is not None
        node.process.terminate()
        wait_for(lambda: "stopping tomato" in node.log, "it does not stop")
        node.process.send_signal(signal.SIGINT)
        assert node.process.wait(DEADLINE_S) == 0
        assert not runs(pid)
        assert "killed" in node.log


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB. Root writes through a read-only folder, so only a mount shows what a full disk does."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
        ).returncode
        == 0
    )
    if not mounted:
        pytest.skip("this user may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_without_room_is_refused_at_the_start(tmp_path: Path, small_disk: Path) -> None:
    code, said = run_to_end(written(tmp_path, data_dir=small_disk / "data"))
    assert code == 1
    assert "MB are free" in said
    assert "free some space" in said


def test_a_read_only_data_folder_is_refused_at_the_start(tmp_path: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    code, said = run_to_end(written(tmp_path, data_dir=small_disk / "data"))
    assert code == 1
    assert "read-only" in said.lower()
    assert str(small_disk) in said
    assert "Traceback" not in said
