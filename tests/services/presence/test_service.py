"""Presence as a process among others: what a node is said to be through starts, ends, kills, sleep and silence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from broker.base import Broker
from broker.child import spawn
from broker.embedded import EmbeddedBroker
from edge.bus import Bus
from protocol.identity import Identity
from protocol.messages import NodeNow, NodeSleep, NodeState, NodeWake, PresenceHeard, PresenceHeardAsk
from services.presence.suspend import SuspendClock
from tests.services.presence.conftest import Ahead, StartPresence, Voice
from tests.support.nodes import CHECKOUT, Node, Watcher, kill_broker, wait_for
from tests.support.waiting import DEADLINE_S, TTL_MS

VoiceOf = Callable[[str, str], Voice]


@contextmanager
def service(node: Node, name: str, broker_url: str) -> Iterator[subprocess.Popen[bytes]]:
    """One service as systemd runs it: a process of its own, with no supervisor."""
    with (node.data_dir / f"{name}.log").open("ab") as log:
        process = spawn(
            [sys.executable, "-m", "edge.service", name, "--config", str(node.config), "--broker", broker_url],
            cwd=CHECKOUT,
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def watching(url: str) -> Iterator[Watcher]:
    found = Watcher(url)
    try:
        yield found
    finally:
        found.bus.stop()


def test_a_node_without_a_supervisor_is_ready_when_its_services_are_and_disconnected_at_the_end(
    tmp_path: Path, broker: Broker
) -> None:
    node = Node(tmp_path, "tomato", broker.url, ["memory_store"])
    with watching(broker.url) as watcher, service(node, "presence", broker.url) as presence:
        wait_for(
            lambda: (
                (watcher.node_state("tomato"), watcher.reason("tomato")) == ("init", "memory_store has not spoken yet")
            ),
            "it does not begin with init",
        )
        with service(node, "memory_store", broker.url) as store:
            wait_for(lambda: watcher.node_state("tomato") == "ready", "not ready")
            assert watcher.nodes["tomato"].services == ["presence", "memory_store"]
            assert watcher.nodes["tomato"].fingerprint == node.identity.fingerprint
            assert watcher.nodes["tomato"].pid == presence.pid
            store.kill()
            wait_for(lambda: "memory_store is lost" in (watcher.reason("tomato") or ""), "the node hides its loss")
            assert watcher.node_state("tomato") == "ready"
        presence.terminate()
        assert presence.wait(DEADLINE_S) == 0
        wait_for(lambda: watcher.node_state("tomato") == "disconnected", "no goodbye")
        wait_for(lambda: watcher.state("tomato", "presence") == "disconnected", "nor of presence itself")


def test_a_presence_that_is_killed_makes_the_node_lost_and_its_successor_makes_it_ready_at_once(
    tmp_path: Path, broker: Broker
) -> None:
    node = Node(tmp_path, "tomato", broker.url, ["memory_store"])
    with watching(broker.url) as watcher, service(node, "memory_store", broker.url) as store:
        with service(node, "presence", broker.url) as presence:
            wait_for(lambda: watcher.node_state("tomato") == "ready", "not ready")
            presence.kill()
            wait_for(lambda: watcher.node_state("tomato") == "lost", "the broker does not say so")
            wait_for(lambda: watcher.state("tomato", "presence") == "lost", "nor of presence itself")
        # The store's retained word counts, for its process is there: nobody waits for it to be said again.
        os.kill(store.pid, signal.SIGSTOP)
        with service(node, "presence", broker.url):
            wait_for(lambda: watcher.node_state("tomato") == "ready", "not ready again")
        os.kill(store.pid, signal.SIGCONT)


def test_a_broker_that_is_killed_and_forgets_all_is_told_again(tmp_path: Path) -> None:
    with EmbeddedBroker() as broker:
        node = Node(tmp_path, "tomato", broker.url, ["memory_store"])
        with service(node, "presence", broker.url), service(node, "memory_store", broker.url):
            with watching(broker.url) as watcher:
                wait_for(lambda: watcher.node_state("tomato") == "ready", "not ready")
            kill_broker(broker)
            broker.start()
            with watching(broker.url) as watcher:
                wait_for(lambda: watcher.node_state("tomato") == "ready", "not ready again")


def test_words_that_a_broker_kept_over_a_power_cut_make_no_node_ready(
    embedded_broker: EmbeddedBroker, watcher: Watcher, voice: VoiceOf, start_presence: StartPresence
) -> None:
    store = voice("tomato", "memory_store")
    store.say(pid=2**22 + 1)  # above Linux's highest process id: a process that is no more
    store.bus.flush()
    start_presence(enabled='["memory_store"]')
    wait_for(lambda: watcher.node_state("tomato") == "init", "nothing is said")
    wait_for(lambda: watcher.state("tomato", "presence") == "ready", "presence itself is not there")
    assert watcher.node_state("tomato") == "init"
    store.say(pid=os.getpid())
    wait_for(lambda: watcher.node_state("tomato") == "ready", "a fresh word does not count")


def test_asked_to_sleep_it_leaves_in_good_order_and_wakes_when_told(tmp_path: Path, broker: Broker) -> None:
    node = Node(tmp_path, "tomato", broker.url, ["presence"])
    with (
        watching(broker.url) as watcher,
        service(node, "presence", broker.url) as presence,
        Bus(url=broker.url, node="tomato", client="cli") as cli,
    ):
        wait_for(lambda: watcher.node_state("tomato") == "ready", "not ready")
        asleep: NodeNow = cli.ask("tomato", NodeSleep(), ttl_ms=TTL_MS)
        assert asleep.state == "sleeping"
        wait_for(lambda: watcher.node_state("tomato") == "sleeping", "it does not say so")
        awake: NodeNow = cli.ask("tomato", NodeWake(), ttl_ms=TTL_MS)
        assert awake.state == "ready"
        wait_for(lambda: watcher.node_state("tomato") == "ready", "not ready again")
        cli.ask("tomato", NodeSleep(), ttl_ms=TTL_MS)
        wait_for(lambda: watcher.node_state("tomato") == "sleeping", "it does not say so")
        # A suspended machine is killed: it said that it sleeps, and no will says otherwise.
        presence.kill()
        wait_for(lambda: watcher.state("tomato", "presence") == "lost", "the service is not lost")
        assert watcher.node_state("tomato") == "sleeping"


def test_stopped_in_its_sleep_it_says_goodbye(watcher: Watcher, start_presence: StartPresence) -> None:
    presence = start_presence()
    wait_for(lambda: watcher.node_state("tomato") == "ready", "not ready")
    with Bus(url=watcher.bus.url, node="tomato", client="cli") as cli:
        cli.ask("tomato", NodeSleep(), ttl_ms=TTL_MS)
    presence.stop()
    wait_for(lambda: watcher.node_state("tomato") == "disconnected", "no goodbye")


def test_after_a_suspend_it_is_ready_by_itself_and_counts_it(watcher: Watcher, start_presence: StartPresence) -> None:
    suspended_s = 100.0
    start_presence(suspend_clock=SuspendClock(lambda: suspended_s))
    wait_for(lambda: watcher.node_state("tomato") == "ready", "not ready")
    with Bus(url=watcher.bus.url, node="tomato", client="cli") as cli:
        cli.ask("tomato", NodeSleep(), ttl_ms=TTL_MS)
    wait_for(lambda: watcher.node_state("tomato") == "sleeping", "it does not say so")
    suspended_s += 312.0
    wait_for(lambda: watcher.node_state("tomato") == "ready", "not ready again")
    wait_for(lambda: watcher.events_of("tomato", "woke"), "nothing is said of it")
    assert "312 s" in watcher.events_of("tomato", "woke")[0].text
    wait_for(lambda: watcher.details("tomato", "presence").get("slept_s") == 312, "it is not shown")
    assert watcher.counters("tomato", "presence")["slept"] == 1


def test_who_said_that_it_sleeps_and_is_awake_all_the_same_says_so(
    watcher: Watcher, start_presence: StartPresence, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.presence.service.SLEEP_PATIENCE_S", 0.5)
    start_presence()
    wait_for(lambda: watcher.node_state("tomato") == "ready", "not ready")
    with Bus(url=watcher.bus.url, node="tomato", client="cli") as cli:
        cli.ask("tomato", NodeSleep(), ttl_ms=TTL_MS)
    wait_for(lambda: watcher.events_of("tomato", "did-not-sleep"), "it is not noticed")
    wait_for(lambda: watcher.node_state("tomato") == "ready", "not ready again")


def test_another_node_may_not_put_this_one_to_sleep(watcher: Watcher, start_presence: StartPresence) -> None:
    start_presence()
    wait_for(lambda: watcher.node_state("tomato") == "ready", "not ready")
    with pytest.raises(Exception, match="only tomato's own"):
        watcher.bus.ask("tomato", NodeSleep(), ttl_ms=TTL_MS)
    assert watcher.node_state("tomato") == "ready"


def test_a_peer_that_falls_silent_is_late_and_back_when_it_speaks(
    watcher: Watcher, voice: VoiceOf, start_presence: StartPresence
) -> None:
    clock = Ahead()
    start_presence(liveness=clock)
    wait_for(lambda: watcher.node_state("tomato") == "ready", "not ready")
    peer = voice("sprout", "memory_store")
    peer.say()

    def liveness() -> str:
        with Bus(url=watcher.bus.url, node="tomato", client="cli") as cli:
            heard: PresenceHeard = cli.ask("tomato", PresenceHeardAsk(), ttl_ms=TTL_MS)
        return next((each.liveness for each in heard.speakers if each.node == "sprout"), "")

    wait_for(lambda: liveness() == "live", "it is not heard")
    assert not watcher.events_of("tomato", "peer-late")
    clock.skip()
    wait_for(lambda: watcher.events_of("tomato", "peer-late"), "its silence is not noticed")
    assert "sprout/memory_store has been silent for" in watcher.events_of("tomato", "peer-late")[0].text
    assert liveness() == "late"
    peer.say()
    wait_for(lambda: watcher.events_of("tomato", "peer-back"), "its return is not noticed")
    assert liveness() == "live"
    wait_for(lambda: watcher.counters("tomato", "presence").get("peer.back") == 1, "the return is not counted")
    assert watcher.counters("tomato", "presence")["peer.late"] == 1


def test_a_whole_node_that_falls_silent_is_said_once(
    watcher: Watcher, voice: VoiceOf, start_presence: StartPresence
) -> None:
    clock = Ahead()
    presence = start_presence(liveness=clock)
    wait_for(lambda: watcher.node_state("tomato") == "ready", "not ready")
    peer = voice("sprout", "memory_store")
    peer.say()
    peer.bus.say(NodeState(state="ready", time_us=time.time_ns() // 1000))
    wait_for(lambda: clock.live() >= {"sprout/", "sprout/memory_store"}, "they are not heard")
    clock.skip()
    wait_for(lambda: presence.bus.counters["peer.late"] == 2, "their silence is not noticed")
    wait_for(lambda: watcher.events_of("tomato", "peer-late"), "it is not said")
    texts = " ".join(event.text for event in watcher.events_of("tomato", "peer-late"))
    assert "sprout has been silent" in texts
    assert "sprout/memory_store" not in texts


def test_a_service_of_its_own_that_falls_silent_stands_in_the_nodes_reason(
    watcher: Watcher, voice: VoiceOf, start_presence: StartPresence
) -> None:
    clock = Ahead()
    start_presence(enabled='["memory_store"]', liveness=clock)
    wait_for(lambda: watcher.node_state("tomato") == "init", "it says nothing")
    store = voice("tomato", "memory_store")
    store.say()
    wait_for(lambda: watcher.node_state("tomato") == "ready" and watcher.reason("tomato") == "", "not ready")
    clock.skip()
    wait_for(lambda: "memory_store has fallen silent" in (watcher.reason("tomato") or ""), "the node hides it")
    store.say()
    wait_for(lambda: watcher.reason("tomato") == "", "the node still says so")
    wait_for(
        lambda: any("memory_store" in event.text for event in watcher.events_of("tomato", "service-late")),
        "there is no event of it",
    )


def test_the_silence_while_it_had_no_broker_is_nobodys(start_presence: StartPresence) -> None:
    clock = Ahead()
    with EmbeddedBroker() as broker:
        presence = start_presence(url=broker.url, liveness=clock)
        wait_for(lambda: presence.bus.connected, "it does not connect")
        peer = Voice(broker.url, "sprout", "memory_store")
        try:
            peer.say()
            wait_for(lambda: "sprout/memory_store" in clock.live(), "the peer is not heard")
            kill_broker(broker)
            wait_for(lambda: not presence.bus.connected, "the loss is not noticed")
            clock.skip()
            broker.start()
            wait_for(lambda: presence.bus.connected and peer.bus.connected, "not connected again")
            peer.say()
            wait_for(lambda: "sprout/memory_store" in clock.live(), "it is not live again")
            assert presence.bus.counters["peer.late"] == 0
        finally:
            peer.close()


def test_another_node_of_its_name_is_noticed(watcher: Watcher, start_presence: StartPresence) -> None:
    start_presence()
    wait_for(lambda: watcher.node_state("tomato") == "ready", "not ready")
    with Bus(url=watcher.bus.url, node="tomato", client="impostor") as bus:
        bus.say(NodeState(state="ready", time_us=0, fingerprint="ed25519:another"))
        wait_for(lambda: watcher.events_of("tomato", "node-name-taken"), "nobody is told")


def test_sealing_keys_are_announced_and_those_of_trusted_nodes_kept(
    watcher: Watcher, start_presence: StartPresence
) -> None:
    presence = start_presence()
    peers, own = presence.context.peers, presence.context.identity
    wait_for(lambda: watcher.node_state("tomato") == "ready", "not ready")
    wait_for(lambda: watcher.nodes["tomato"].sealing_key == own.sealing_key, "its sealing key is not announced")
    sprout, mars = Identity.generate("sprout"), Identity.generate("mars")
    peers.trust("sprout", sprout.fingerprint)
    for identity, announced in ((mars, mars), (sprout, mars), (sprout, sprout)):
        # The last one alone is of a trusted node, and signed by it.
        with Bus(url=watcher.bus.url, node=identity.node, client="presence") as bus:
            bus.say(NodeState("ready", 0, identity.fingerprint, sealing_key=announced.sealing_key))
    wait_for(lambda: "sprout" in peers.keyring().sealing_keys, "the sealing key of a peer is not kept")
    assert peers.keyring().sealing_keys == {
        "tomato": own.sealing.public_key,
        "sprout": sprout.sealing.public_key,
    }
