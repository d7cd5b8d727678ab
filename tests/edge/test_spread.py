"""Work spread over threads: in order, whole, and never in a knot."""

from __future__ import annotations

import threading

import pytest

from edge import spread as spread_module
from edge.spread import spread, threads


def test_results_come_in_order() -> None:
    assert spread(lambda n: n * n, range(50)) == [n * n for n in range(50)]
    assert spread(str, []) == []
    assert 1 <= threads() <= spread_module.MOST_THREADS


def test_one_that_is_called_within_another_does_not_wait_for_its_threads() -> None:
    assert spread(lambda n: sum(spread(lambda m: m, range(n))), range(40)) == [n * (n - 1) // 2 for n in range(40)]


def test_what_fails_is_raised_once_nothing_runs_any_more() -> None:
    running = threading.Semaphore(0)
    ended: list[int] = []

    def call(n: int) -> None:
        if n == 3:
            raise ValueError("three")
        running.release()
        ended.append(n)

    with pytest.raises(ValueError, match="three"):
        spread(call, range(30))
    before = list(ended)
    assert {0, 1, 2} <= set(before)
    assert ended == before


def test_with_one_core_it_is_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread_module, "threads", lambda: 1)
    here = threading.get_ident()
    assert spread(lambda _: threading.get_ident(), range(5)) == [here] * 5
