"""Which MQTT version a CONNECT speaks, after whatever the broker did with those before."""

from __future__ import annotations

import pytest

from edge.mqtt_version import TRY_5_AGAIN_S, VersionChoice


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def choice(clock: Clock) -> VersionChoice:
    return VersionChoice("auto", clock)


def test_version_5_comes_first_and_stays_where_it_is_accepted(choice: VersionChoice) -> None:
    assert choice.version == "5"
    assert choice.accepted()
    choice.lost()
    assert choice.version == "5"


def test_a_broker_that_refuses_version_5_is_asked_with_3_1_1_at_once(choice: VersionChoice) -> None:
    assert choice.refused()
    assert choice.version == "3.1.1"
    assert choice.accepted()


def test_one_silent_end_is_not_enough(choice: VersionChoice) -> None:
    choice.closed()
    assert choice.version == "5"


def test_silent_ends_lead_to_3_1_1_only_when_version_5_fails_once_more(choice: VersionChoice) -> None:
    choice.closed()
    choice.closed()
    assert choice.version == "3.1.1"
    assert not choice.accepted(), "it may only have been starting"
    assert choice.version == "5"
    choice.closed()
    assert choice.version == "3.1.1"
    assert choice.accepted()


def test_a_broker_that_was_only_starting_ends_up_with_version_5(choice: VersionChoice) -> None:
    choice.closed()
    choice.closed()
    assert not choice.accepted()
    assert choice.version == "5"
    assert choice.accepted()
    choice.lost()
    choice.closed()
    assert choice.version == "5", "what was before is forgotten"


def test_a_port_that_closes_whatever_comes_is_asked_with_both_in_turn(choice: VersionChoice) -> None:
    seen = []
    for _ in range(9):
        seen.append(choice.version)
        choice.closed()
    assert seen == ["5", "5", "3.1.1"] * 3


def test_after_a_loss_version_5_is_tried_again_but_not_more_often_than_once_a_minute(
    choice: VersionChoice, clock: Clock
) -> None:
    choice.refused()
    assert choice.accepted()
    clock.now_s += TRY_5_AGAIN_S - 1
    choice.lost()
    assert choice.version == "3.1.1"
    assert choice.accepted()
    clock.now_s += 1
    choice.lost()
    assert choice.version == "5", "it may have been upgraded"
    assert choice.refused()
    assert choice.accepted()
    choice.lost()
    assert choice.version == "3.1.1"


def test_of_a_known_broker_one_silent_end_is_enough(choice: VersionChoice, clock: Clock) -> None:
    choice.refused()
    assert choice.accepted()
    clock.now_s += TRY_5_AGAIN_S
    choice.lost()
    choice.closed()
    assert choice.version == "3.1.1"
    assert choice.accepted()


def test_an_upgraded_broker_that_refuses_3_1_1_is_asked_with_5_again(choice: VersionChoice) -> None:
    choice.refused()
    assert choice.accepted()
    choice.lost()
    assert not choice.refused(), "without haste: it is the version that every broker had"
    assert choice.version == "5"


@pytest.mark.parametrize("setting", ["5", "3.1.1"])
def test_a_version_that_was_asked_for_is_never_left(setting: str, clock: Clock) -> None:
    choice = VersionChoice(setting, clock)
    assert not choice.refused()
    for _ in range(5):
        choice.closed()
    assert choice.accepted()
    clock.now_s += 10 * TRY_5_AGAIN_S
    choice.lost()
    assert choice.version == setting
