"""What a watchdog is told: whether handlers and network go on."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest

from protocol.messages import Event, MemoryPut
from tests.edge.bus_support import DEADLINE_S, Answers, wait_for
from tests.edge.conftest import OpenBus
from tests.support.waiting import TTL_MS

pytestmark = pytest.mark.parametrize("broker", ["embedded"], indirect=True)


def test_a_bus_that_idles_or_works_does_not_stall(make_bus: OpenBus, open_bus: OpenBus) -> None:
    heard: list[str] = []
    listener = make_bus("sprout", "listener")
    assert listener.stalled_s() == 0.0, "it has not been started"
    listener.hear(Event, lambda message: heard.append(message.data.text))
    listener.start()
    assert listener.stalled_s() == 0.0
    speaker = open_bus("tomato", "speaker")
    for _ in range(500):
        speaker.say(Event("n", "info", "t"), service="speaker")
        assert listener.stalled_s() < 1.0
    wait_for(lambda: len(heard) == 500, "all are heard")
    wait_for(lambda: listener.stalled_s() == 0.0, "it idles again")
    listener.stop()
    assert listener.stalled_s() == 0.0, "what was stopped does not stall"


def test_a_handler_that_stays_at_one_message_is_told_by_how_long(make_bus: OpenBus, open_bus: OpenBus) -> None:
    gate = threading.Event()
    listener = make_bus("sprout", "listener")
    listener.hear(Event, lambda message: gate.wait(DEADLINE_S) and None)
    listener.start()
    open_bus("tomato", "speaker").say(Event("n", "info", "t"), service="speaker")
    wait_for(lambda: listener.stalled_s() > 0.3, "the stall grows")
    gate.set()
    wait_for(lambda: listener.stalled_s() == 0.0, "it goes on")


def test_a_network_thread_that_is_held_is_told(make_bus: OpenBus, open_bus: OpenBus) -> None:
    responder = make_bus("sprout", "memory_store")
    answers = Answers()
    responder.hear(MemoryPut, answers)
    responder.start()
    asker = open_bus("tomato", "asker")
    gate = threading.Event()
    held = threading.Event()

    def hold(_: Any) -> None:
        held.set()
        gate.wait(DEADLINE_S)

    # The answer is taken on the network thread, and with it what waits for it, if it was attached before.
    asker.ask_later("sprout", MemoryPut(text="hold"), ttl_ms=TTL_MS).add_done_callback(hold)
    answers.release.set()
    assert held.wait(DEADLINE_S)
    wait_for(lambda: asker.stalled_s() > 1.0, "the stall is seen")
    gate.set()
    wait_for(lambda: asker.stalled_s() == 0.0, "it turns again")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_handler_thread_is_a_stall_without_end(make_bus: OpenBus, open_bus: OpenBus) -> None:
    listener = make_bus("sprout", "listener")

    def die(_: Any) -> None:
        raise SystemExit

    listener.hear(Event, die)
    listener.start()
    open_bus("tomato", "speaker").say(Event("n", "info", "t"), service="speaker")
    wait_for(lambda: listener.stalled_s() == math.inf, "the end of the thread is seen")
