"""Ids sort by time and never repeat; hybrid clocks keep causes before effects and cannot be dragged away."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.clock import MAX_DRIFT_MS, HybridLogicalClock, pack, time_ms_of
from protocol.errors import MalformedMessage
from protocol.ids import NAME_PATTERN, UUID7_PATTERN, check_name, uuid7, uuid7_time_ms
from tests.support.waiting import DEADLINE_S

NOW_MS = 1_800_000_000_000


def test_ids_are_uuid7_and_strictly_increasing() -> None:
    made = [uuid7() for _ in range(10_000)]
    assert made == sorted(set(made))
    assert all(UUID7_PATTERN.fullmatch(each) for each in made)


def test_ids_of_many_threads_are_all_different() -> None:
    made: list[list[str]] = [[] for _ in range(8)]
    threads = [threading.Thread(target=lambda into=into: into.extend(uuid7() for _ in range(2000))) for into in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert len({each for ids in made for each in ids}) == 16_000
    assert all(ids == sorted(ids) for ids in made)


def test_the_time_inside_an_id_is_its_time_even_when_the_counter_has_run_over() -> None:
    assert abs(uuid7_time_ms(uuid7()) - uuid7_time_ms(uuid7())) <= 10


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "00000000-0000-4000-8000-000000000000",
        "01890000-0000-7000-8000-00000000000G",
        uuid7().upper(),
        uuid7() + "\n",
    ],
    ids=["empty", "a letter", "version 4", "not hexadecimal", "upper case", "a line feed behind it"],
)
def test_what_is_no_uuid7_has_no_time(text: str) -> None:
    with pytest.raises(MalformedMessage) as caught:
        uuid7_time_ms(text)
    assert caught.value.field == "id"


@pytest.mark.parametrize("name", ["a", "tomato", "node-1", "under_score", "0", "x" * 63])
def test_names_are_given_back(name: str) -> None:
    assert check_name(name, "node") == name


@pytest.mark.parametrize(
    "name",
    ["", "A", "-a", "_a", "a/b", "+", "#", "a b", "ü", "a\0", "a\n", "x" * 64, "$sys", ".."],
)
def test_what_is_no_name_is_refused_with_the_field(name: str) -> None:
    with pytest.raises(MalformedMessage) as caught:
        check_name(name, "node")
    assert caught.value.field == "node"
    assert caught.value.hint


@given(st.text(max_size=70))
def test_a_name_can_stand_in_a_topic(text: str) -> None:
    if NAME_PATTERN.fullmatch(text):
        assert not set(text) & set("/+#$\0 \n")
        assert 1 <= len(text.encode()) <= 63


def test_stamps_grow_although_the_wall_clock_stands_or_goes_back() -> None:
    times = iter([NOW_MS, NOW_MS, NOW_MS - 5000, NOW_MS + 1, NOW_MS])
    clock = HybridLogicalClock(now_ms=lambda: next(times))
    stamps = [clock.tick() for _ in range(5)]
    assert stamps == sorted(set(stamps))
    assert stamps[0] == pack(NOW_MS, 0)
    assert time_ms_of(stamps[-1]) == NOW_MS + 1


def test_a_merged_stamp_is_followed() -> None:
    clock = HybridLogicalClock(now_ms=lambda: NOW_MS)
    remote = pack(NOW_MS + MAX_DRIFT_MS, 7)
    assert clock.merge(remote)
    assert clock.tick() == remote + 1


def test_a_stamp_beyond_the_bound_is_refused_and_counted() -> None:
    clock = HybridLogicalClock(now_ms=lambda: NOW_MS)
    assert not clock.merge(pack(NOW_MS + MAX_DRIFT_MS + 1, 0))
    assert not clock.merge(2**63 - 1)
    assert clock.refused_merges == 2
    assert time_ms_of(clock.tick()) == NOW_MS


def test_an_old_stamp_changes_nothing() -> None:
    clock = HybridLogicalClock(now_ms=lambda: NOW_MS)
    last = clock.tick()
    assert clock.merge(0)
    assert clock.last == last


def test_a_clock_goes_on_from_its_last_stamp() -> None:
    last = pack(NOW_MS + 86_400_000, 3)
    assert HybridLogicalClock(now_ms=lambda: NOW_MS, last=last).tick() == last + 1


def test_the_counter_may_run_over_into_the_time() -> None:
    clock = HybridLogicalClock(now_ms=lambda: NOW_MS, last=pack(NOW_MS, 65_535))
    assert clock.tick() == pack(NOW_MS + 1, 0)


@given(st.lists(st.tuples(st.booleans(), st.integers(-(10**6), 10**6)), max_size=50))
def test_effects_are_stamped_after_their_causes_whatever_the_clocks_say(steps: list[tuple[bool, int]]) -> None:
    now = {"a": NOW_MS, "b": NOW_MS}
    clocks = {name: HybridLogicalClock(now_ms=lambda name=name: now[name], max_drift_ms=10**9) for name in now}
    last = 0
    for from_a, shift_ms in steps:
        sender, receiver = ("a", "b") if from_a else ("b", "a")
        now[sender] += shift_ms
        stamp = clocks[sender].tick()
        assert clocks[receiver].merge(stamp)
        effect = clocks[receiver].tick()
        assert effect > stamp > last
        last = effect
        assert clocks[sender].merge(effect)


def test_ticks_of_many_threads_are_all_different() -> None:
    clock = HybridLogicalClock(now_ms=lambda: NOW_MS)
    made: list[list[int]] = [[] for _ in range(8)]
    threads = [
        threading.Thread(target=lambda into=into: into.extend(clock.tick() for _ in range(2000))) for into in made
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert len({each for stamps in made for each in stamps}) == 16_000
