"""A flag that signal handlers set."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

from edge.stopping import StopFlag
from tests.support.waiting import DEADLINE_S


def test_a_handler_that_sets_it_in_the_middle_of_a_wait_never_waits_for_itself() -> None:
    flag = StopFlag()
    set_at = set()

    def trace(frame: FrameType, event: str, _argument: object) -> object:
        # As a signal handler would: on the thread that waits, between two of its lines.
        if frame.f_code is not StopFlag.wait.__code__:
            return None
        if event == "line":
            set_at.add(frame.f_lineno)
            flag.set()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        assert flag.wait(0.0)
    finally:
        sys.settrace(before)
    assert len(set_at) >= 2


def test_everyone_who_waits_is_woken_and_later_ones_do_not_wait() -> None:
    flag = StopFlag()
    woken = []
    waiting = [threading.Thread(target=lambda: woken.append(flag.wait(DEADLINE_S))) for _ in range(3)]
    for each in waiting:
        each.start()
    flag.set()
    flag.set()
    for each in waiting:
        each.join(DEADLINE_S)
    assert woken == [True, True, True]
    assert flag.is_set()
    assert flag.wait()
    assert flag.wait(0)


def test_a_wait_that_is_over_says_that_it_is_not_set() -> None:
    assert not StopFlag().wait(0.01)


def test_a_signal_ends_a_wait_of_the_main_thread() -> None:
    flag = StopFlag()
    before = signal.signal(signal.SIGUSR1, lambda *_: flag.set())
    sender = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        sender.start()
        assert flag.wait(DEADLINE_S)
    finally:
        sender.join()
        signal.signal(signal.SIGUSR1, before)
