"""What a node has measured: kept across restarts, forgotten when it is unreadable, and never in the way."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import pytest

from services.model_runner.codecs import RUNGS
from services.model_runner.cost_book import MOST_LINKS, CostBook
from services.model_runner.transformers_engine import TransformersEngine

pytestmark = pytest.mark.model


def test_what_was_measured_is_there_after_a_restart(tmp_path: Path, engine: TransformersEngine) -> None:
    path = tmp_path / "costs.msgpack"
    book = CostBook(path)
    book.model_is(engine)
    book.read(0, 256, 0.5)
    book.asked("tomato", 0.02)
    book.fetched("tomato", 2_000_000, 1.02)
    book.saved("int8", 1_000_000, 0.25)
    book.restored("int8", 1_000_000, 0.125)
    book.save()
    again = CostBook(path)
    again.model_is(engine)
    assert again.prefill.seconds(0, 256) == pytest.approx(0.5)
    assert again.link("tomato").latency.likely == pytest.approx(0.02)
    assert again.link("tomato").byte.likely == pytest.approx(1.0 / 2_000_000)
    assert again.restore["int8"].likely == pytest.approx(0.125e-6)
    # With caution: once measured, it may take longer.
    assert 0.25 < again.save_s("int8", 1_000_000) < 0.5
    assert 0.125 < again.restore_s("int8", 1_000_000) < 0.25


def test_what_was_never_measured_takes_for_ever_and_what_took_nothing_is_not_noted(engine: TransformersEngine) -> None:
    book = CostBook(None)
    book.model_is(engine)
    assert not book.prefill.known
    assert not book.link("nobody").byte.known
    book.saved("raw", 0, 1.0)
    book.saved("raw", 1_000, 0.0)
    assert book.save_s("raw", 1_000) == book.restore_s("raw", 1_000) == math.inf
    book.save()  # nowhere


def test_rates_of_reading_are_of_one_model_and_numerics(small_models: dict[str, Path]) -> None:
    book = CostBook(None)
    one = TransformersEngine.load(small_models["llama"], device="cpu", threads=1)
    other = TransformersEngine.load(small_models["gemma3"], device="cpu", threads=1)
    book.model_is(one)
    book.read(0, 256, 0.5)
    book.model_is(other)
    assert not book.prefill.known
    book.model_is(one)
    assert book.prefill.known


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x81\xa7version\x63", b"\x80" * 100])
def test_a_file_that_cannot_be_read_is_as_if_nothing_was_measured(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "costs.msgpack"
    path.write_bytes(body)
    book = CostBook(path)
    assert not book.link("tomato").latency.known
    book.asked("tomato", 0.02)
    book.save()
    assert CostBook(path).link("tomato").latency.known


def test_a_disk_that_cannot_be_written_loses_the_book_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    book = CostBook(tmp_path / "file" / "costs.msgpack")
    book.asked("tomato", 0.02)
    book.save()
    assert book.link("tomato").latency.likely == pytest.approx(0.02)


def test_of_many_peers_the_one_longest_unheard_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now_us = iter(range(1, 10 * MOST_LINKS))
    monkeypatch.setattr("services.model_runner.cost_book._now_us", lambda: next(now_us))
    book = CostBook(None)
    for number in range(MOST_LINKS):
        book.fetched(f"node-{number}", 10_000, 1.0)
    book.fetched("node-0", 10_000, 1.0)
    book.fetched("another", 10_000, 1.0)
    assert book.link("node-0").byte.known
    assert not book.link("node-1").byte.known
    assert book.link("another").byte.known


def test_what_is_given_out_is_a_copy_and_threads_may_note_at_once(engine: TransformersEngine) -> None:
    book = CostBook(None)
    book.model_is(engine)

    def note() -> None:
        for _ in range(200):
            book.asked("tomato", 0.01)
            book.read(0, 16, 0.001)
            book.restored("raw", 1_000, 0.001)

    threads = [threading.Thread(target=note) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    link = book.link("tomato")
    assert link.latency.likely == pytest.approx(0.01)
    link.latency.add(100.0, 1)
    assert book.link("tomato").latency.likely == pytest.approx(0.01)
    assert book.prefill.seconds(0, 16) == pytest.approx(0.001)


def test_a_first_idea_comes_from_probes_and_real_work_outweighs_it(engine: TransformersEngine) -> None:
    book = CostBook(None)
    book.probe_reading(engine)
    assert book.prefill.known
    book.probe_codecs(engine.spec)
    assert set(book.restore) == set(RUNGS)
    assert all(0 < book.save_s(rung, 1_000_000) < math.inf for rung in RUNGS)
    for _ in range(20):
        book.restored("raw", 1_000_000, 50.0)
    assert book.restore["raw"].likely > 10e-6
