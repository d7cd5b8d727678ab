"""Counters and rate-limited events."""

from __future__ import annotations

import threading

import pytest

from edge import counters as counters_module
from edge.counters import MAX_TEXT, Counters, Events
from protocol.messages import Event


def test_counts_of_many_threads_are_all_there() -> None:
    counters = Counters()
    threads = [threading.Thread(target=lambda: [counters.add("n") for _ in range(5_000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counters["n"] == 20_000
    assert counters["never"] == 0
    assert counters.snapshot() == {"n": 20_000}


def test_events_of_one_name_are_held_back_and_their_count_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(counters_module.time, "monotonic", lambda: now_s)
    said: list[Event] = []
    events = Events(said.append, Counters())
    events.report("a", "info", "first")
    events.report("a", "info", "second", count=4)
    events.report("b", "info", "other")
    events.flush()
    assert [(event.name, event.count) for event in said] == [("a", 1), ("b", 1)]
    now_s += 1.0
    events.flush()
    assert (said[-1].name, said[-1].count, said[-1].text) == ("a", 4, "second")
    events.report("a", "info", "third")
    events.flush(everything=True)
    assert said[-1].text == "third"
    assert len(said) == 4


def test_a_text_is_cut() -> None:
    said: list[Event] = []
    Events(said.append, Counters()).report("a", "info", "x" * 10_000)
    assert len(said[0].text) == MAX_TEXT
