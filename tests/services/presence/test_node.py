"""A node's state from its services' words: what counts, what is old, and what is amiss."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from protocol.messages import ServiceState
from services.presence.node import REASON_CHARACTERS, OwnServices, speaks_still


def word(state: str = "ready", *, pid: int = 7, time_us: int = 1_000, reason: str = "") -> ServiceState:
    return ServiceState(state=state, time_us=time_us, reason=reason, pid=pid)


def own(*, there: bool = False) -> OwnServices:
    return OwnServices(["memory_store", "sync_bridge"], lambda _state: there)


def test_a_node_is_settled_once_every_service_has_said_how_it_is() -> None:
    services = own()
    assert not services.settled
    assert services.reason() == "memory_store has not spoken yet; sync_bridge has not spoken yet"
    services.hear("memory_store", word("init"), retained=False)
    services.hear("sync_bridge", word("degraded", reason="the disk is full"), retained=False)
    assert not services.settled
    services.hear("memory_store", word(), retained=False)
    assert services.settled
    assert services.reason() == "sync_bridge is degraded: the disk is full"
    services.hear("sync_bridge", word(), retained=False)
    assert services.reason() == ""
    assert services.reason(late=["sync_bridge"]) == "sync_bridge has fallen silent"


def test_a_service_given_up_is_settled_and_does_not_run() -> None:
    services = own()
    services.hear("sync_bridge", word(), retained=False)
    services.hear("memory_store", word("failed", reason="it died 3 times"), retained=False)
    assert services.settled
    assert services.running == ["sync_bridge"]
    assert services.reason() == "memory_store is failed: it died 3 times"


def test_a_word_that_the_broker_kept_counts_only_while_its_speaker_is_there() -> None:
    for there in (False, True):
        services = own(there=there)
        for name in services.names:
            services.hear(name, word(), retained=True)
        assert services.settled is there
        services.hear("memory_store", word(time_us=2_000), retained=False)
        services.hear("sync_bridge", word(time_us=2_000), retained=False)
        assert services.settled


def test_an_old_word_does_not_replace_a_newer_one() -> None:
    services = own()
    services.hear("memory_store", word(time_us=5_000), retained=False)
    services.hear("memory_store", word("init", time_us=4_000), retained=True)
    assert services.states["memory_store"].state == "ready"
    # The end of an earlier process, said by the broker after its successor has spoken.
    services.hear("memory_store", word("lost", pid=6, time_us=3_000), retained=False)
    assert services.states["memory_store"].state == "ready"
    # Its own end: written when it connected, hence older than its last word.
    services.hear("memory_store", word("lost", time_us=3_000), retained=True)
    assert services.states["memory_store"].state == "lost"


def test_processes_of_a_service_are_counted() -> None:
    services = own()
    for pid in (7, 7, 8, 8, 9):
        services.hear("memory_store", word(pid=pid), retained=False)
    services.hear("memory_store", word("failed", pid=1), retained=False)
    assert services.starts == {"memory_store": 3}


def test_reasons_of_all_services_fit_the_topic() -> None:
    services = OwnServices([f"service_{number}" for number in range(12)], lambda _state: False)
    for name in services.names:
        services.hear(name, word("degraded", reason="x" * 5_000), retained=False)
    assert len(services.reason()) < 12 * (REASON_CHARACTERS + 60)


def test_whether_a_speaker_is_still_there_is_told_by_its_process() -> None:
    now_us = time.time_ns() // 1000
    assert speaks_still(word(pid=os.getpid(), time_us=now_us))
    assert not speaks_still(word(pid=0, time_us=now_us))
    # This process has the id now, but was not there then: a process before it had it.
    assert not speaks_still(word(pid=os.getpid(), time_us=now_us - 10 * 86_400 * 1_000_000))
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    assert not speaks_still(word(pid=child.pid, time_us=now_us))
