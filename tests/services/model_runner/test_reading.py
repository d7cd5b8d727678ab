"""Reading again, on a real worker: it gives the state that a prompt gives, and leaves nothing when it is let go."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edge.db import Database
from protocol.errors import Cancelled, ModelError
from protocol.manifest import open_private
from protocol.sealing import DataKey
from services.model_runner import snapshot
from services.model_runner.chat import ChatFormat
from services.model_runner.conversations import Conversations
from services.model_runner.generation import begin, generate
from services.model_runner.reading import Reading
from services.model_runner.rounds import Loaded
from services.model_runner.transformers_engine import TransformersEngine
from services.model_runner.worker import Worker
from tests.support.waiting import wait_for

pytestmark = pytest.mark.model

KEY = DataKey(bytes(range(32)))
PROMPT = [(11 * at) % 250 for at in range(700)]
WAIT_S = 60.0


class Site:
    """A worker on a small model, and what it is to read."""

    def __init__(self, db: Database, engine: TransformersEngine, folder: Path) -> None:
        self.chunks: list[tuple[int, int]] = []
        conversations = Conversations(db, engine, in_memory=2, now_us=lambda: 0, on_evict=lambda _name, _left: None)
        self.loaded = Loaded(
            engine,
            ChatFormat.load(folder),
            conversations,
            1024,
            device_reason="",
            on_chunk=lambda start, end, _seconds: self.chunks.append((start, end)),
        )
        self.engine = engine
        self.worker = Worker(lambda: self.loaded, lambda _run, _token: None)
        self.worker.start()
        self.threads = ThreadPoolExecutor(2)

    def reading(self) -> Reading:
        state = begin(self.engine, PROMPT)
        copied = snapshot.copy(self.engine, state, conversation="garden", creator="tomato", key=KEY, tokens_only=True)
        state.cache.close()
        manifest = snapshot.seal(copied, lambda _ref, _chunk: None)
        found = snapshot.read_tokens(self.engine, manifest, open_private(manifest, KEY), "a reason")
        return Reading(self.worker, found, self.threads)


@pytest.fixture
def site(db: Database, engine: TransformersEngine, small_models: dict[str, Path]) -> Iterator[Site]:
    found = Site(db, engine, small_models["llama"])
    yield found
    found.worker.stop()
    found.threads.shutdown()


def test_what_was_read_again_goes_on_as_the_prompt_would_have(site: Site) -> None:
    reading = site.reading()
    found = reading.outcome.result(WAIT_S)
    assert (found.how, found.reason) == ("recomputed", "a reason")
    assert reading.tokens == found.state.cache.length == len(PROMPT) - 1
    assert reading.took_s > 0
    assert site.chunks[0][0] == 0
    assert site.chunks[-1][1] == len(PROMPT) - 1
    assert [start for start, _ in site.chunks[1:]] == [end for _, end in site.chunks[:-1]]
    # Whole chunks are named, for other conversations to take them over; the last, which is not whole, is none.
    assert len(reading.whole_chunks) == (len(PROMPT) - 1) // site.engine.chunk_tokens
    straight = begin(site.engine, PROMPT)
    site.engine.prefill(straight.cache, PROMPT[:-1])
    assert _first(site, found.state) == _first(site, straight)
    reading.let_go()


def _first(site: Site, state: object) -> list[object]:
    steps = generate(site.engine, state)  # type: ignore[arg-type]
    return [next(steps) for _ in range(4)]


def test_one_that_is_let_go_ends_after_the_present_chunk_and_closes_its_cache(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, under_way = threading.Event(), threading.Event()
    prefill = site.engine.prefill
    closed = _closed_caches(site, monkeypatch)

    def slow(*given: object) -> int:
        under_way.set()
        assert go_on.wait(WAIT_S)
        return prefill(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(site.engine, "prefill", slow)
    reading = site.reading()
    assert under_way.wait(WAIT_S)
    before = len(closed)
    reading.let_go()
    go_on.set()
    with pytest.raises(Cancelled):
        reading.outcome.result(WAIT_S)
    assert len(site.chunks) == 1
    assert 0 < reading.tokens < len(PROMPT) - 1
    assert len(closed) == before + 1


def test_a_result_that_comes_when_it_is_not_wanted_any_more_is_closed(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = _closed_caches(site, monkeypatch)
    reading = site.reading()
    cache = reading.outcome.result(WAIT_S).state.cache
    assert cache not in closed
    reading.let_go()
    wait_for(lambda: cache in closed, "its cache is still there")


def test_an_engine_that_fails_in_the_middle_leaves_no_cache_and_says_why(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = _closed_caches(site, monkeypatch)
    prefill, calls = site.engine.prefill, []

    def fails(*given: object) -> int:
        calls.append(given[0])
        if len(calls) == 2:
            raise ModelError("reading: no memory is left", reason="memory")
        return prefill(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(site.engine, "prefill", fails)
    reading = site.reading()
    with pytest.raises(ModelError, match="no memory"):
        reading.outcome.result(WAIT_S)
    assert calls[0] in closed


def _closed_caches(site: Site, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is closed from now on."""
    probe = site.engine.new_cache(1)
    kind, found = type(probe), []
    close = kind.close

    def noted(cache: object) -> None:
        found.append(cache)
        close(cache)  # type: ignore[arg-type]

    monkeypatch.setattr(kind, "close", noted)
    probe.close()
    found.clear()
    return found
