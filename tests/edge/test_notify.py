"""sd_notify by hand: what is said to the service manager, and that nothing fails without one."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.notify import STATUS_CHARS, Notifier
from tests.support.notify_socket import NotifySocket


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[NotifySocket]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@mindstream-{uuid.uuid4().hex}"
    heard = NotifySocket(address)
    yield heard
    heard.close()


def test_each_word_is_the_protocols_own(manager: NotifySocket) -> None:
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": manager.address})
    assert notifier.listened_to
    notifier.extend_timeout(2.5)
    notifier.ready()
    notifier.alive()
    notifier.stopping()
    manager.wait("STOPPING=1")
    assert manager.lines == ["EXTEND_TIMEOUT_USEC=2500000", "READY=1", "WATCHDOG=1", "STOPPING=1"]


def test_a_status_is_one_bounded_line_and_said_once(manager: NotifySocket) -> None:
    notifier = Notifier(manager.address)
    # A line break in a reason that came from elsewhere would be another word of the protocol.
    notifier.status("degraded: no\nREADY=1")
    notifier.status("degraded: no READY=1")
    notifier.status("x" * 10_000)
    notifier.stopping()
    manager.wait("STOPPING=1")
    assert manager.lines == ["STATUS=degraded: no READY=1", f"STATUS={'x' * STATUS_CHARS}", "STOPPING=1"]


@pytest.mark.parametrize("address", ["", "vsock:2:1234", "relative"])
def test_without_a_manager_nothing_is_said_and_nothing_fails(address: str) -> None:
    notifier = Notifier(address)
    assert not notifier.listened_to
    notifier.ready()
    notifier.status("fine")
    notifier.close()


def test_a_manager_that_has_gone_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier(str(tmp_path / "gone"))
    notifier.ready()
    assert "READY" in caplog.text


@pytest.mark.parametrize(
    ("environment", "watchdog_s"),
    [
        ({}, 0.0),
        ({"WATCHDOG_USEC": "60000000"}, 60.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())}, 60.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}, 0.0),
        ({"WATCHDOG_USEC": "soon"}, 0.0),
    ],
)
def test_the_watchdog_is_ours_when_its_variables_say_so(environment: dict[str, str], watchdog_s: float) -> None:
    assert Notifier.from_environment(environment).watchdog_s == watchdog_s
