"""The worker alone: an answer is given once, half an answer is taken back, nobody waits for a worker that has ended."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from edge.db import Database
from protocol.errors import Cancelled, MindstreamError, ModelUnavailable
from protocol.ids import uuid7
from protocol.messages import ChatMessage, ModelGenerate, RunDone, RunToken
from services.model_runner.answers import Run
from services.model_runner.chat import ChatFormat
from services.model_runner.conversations import Conversations
from services.model_runner.rounds import Loaded
from services.model_runner.transformers_engine import TransformersEngine
from services.model_runner.worker import Worker

WAIT_S = 60.0


class Runner:
    """A worker on a small model, its conversations in a real database."""

    def __init__(self, db: Database, engine: TransformersEngine, folder: Path, in_memory: int = 8) -> None:
        self.tokens: list[RunToken] = []
        self.on_token: Callable[[RunToken], None] = self.tokens.append
        self.evicted: list[str] = []
        conversations = Conversations(
            db, engine, in_memory=in_memory, now_us=lambda: 0, on_evict=lambda name, _: self.evicted.append(name)
        )
        self.loaded = Loaded(engine, ChatFormat.load(folder), conversations, 512, device_reason="")
        self.worker = Worker(lambda: self.loaded, lambda _, token: self.on_token(token))
        self.worker.start()

    def submit(self, conversation: str, text: str, *, command: str = "", count: int = 6) -> Run:
        messages = [ChatMessage("user", text)] if text else []
        ask = ModelGenerate(conversation, messages, max_new_tokens=count, ignore_eos=True)
        run = Run(uuid7(), command or f"tester/{uuid7()}", ask, Future())
        self.worker.submit(run)
        return run

    def answer(self, conversation: str, text: str = "", *, command: str = "", count: int = 6) -> RunDone:
        return self.submit(conversation, text, command=command, count=count).done.result(WAIT_S)

    def kept_tokens(self, conversation: str) -> list[int]:
        """As they are in the database."""
        self.worker.between_tokens(lambda loaded: loaded.conversations.forget(conversation)).result(WAIT_S)
        return self.worker.between_tokens(
            lambda loaded: list(loaded.conversations.get(conversation).state.tokens)
        ).result(WAIT_S)


@pytest.fixture
def runner(db: Database, engine: TransformersEngine, small_models: dict[str, Path]) -> Iterator[Runner]:
    found = Runner(db, engine, small_models["llama"])
    yield found
    found.worker.stop()


def test_a_command_that_was_answered_before_a_crash_is_answered_the_same_and_not_done_again(
    runner: Runner, db: Database, engine: TransformersEngine, small_models: dict[str, Path]
) -> None:
    runner.answer("c", "hello")
    first = runner.answer("c", "how are you?", command="tester/1")
    tokens = runner.kept_tokens("c")
    runner.worker.stop()
    # The next process: the answer was kept, and the journal does not know.
    after = Runner(db, engine, small_models["llama"])
    try:
        again = after.answer("c", "how are you?", command="tester/1")
        assert (again.text, again.tokens, again.finish_reason) == (first.text, first.tokens, first.finish_reason)
        assert after.tokens == [], "it was generated a second time"
        assert after.kept_tokens("c") == tokens
        assert after.answer("c", "how are you?", command="tester/2").tokens
        assert len(after.kept_tokens("c")) > len(tokens)
    finally:
        after.worker.stop()


def test_half_an_answer_is_taken_back_when_it_fails(runner: Runner) -> None:
    runner.answer("c", "hello")
    tokens = runner.kept_tokens("c")

    def fail(token: RunToken) -> None:
        if token.index == 2:
            raise ValueError("the disk of the listener is on fire")

    runner.on_token = fail
    failed = runner.answer("c", "go on")
    assert failed.finish_reason == "error"
    assert failed.error is not None
    assert "on fire" in failed.error.message
    runner.on_token = runner.tokens.append
    assert runner.kept_tokens("c") == tokens
    assert runner.answer("c", "go on").finish_reason == "length"


def test_a_conversation_that_is_being_answered_keeps_its_place_in_memory(
    db: Database, engine: TransformersEngine, small_models: dict[str, Path]
) -> None:
    runner = Runner(db, engine, small_models["llama"], in_memory=1)
    try:
        runner.answer("other", "hello")
        seen = threading.Event()
        looked: list[Future[int]] = []

        def look(token: RunToken) -> None:
            if token.index == 1:
                # While "c" is being answered, another conversation is used, as by a snapshot of it.
                runner.worker.between_tokens(lambda loaded: loaded.conversations.get("other"))
                looked.append(
                    runner.worker.between_tokens(lambda loaded: len(loaded.conversations.get("c").state.tokens))
                )
                seen.set()

        runner.on_token = look
        done = runner.answer("c", "hello", count=10)
        assert seen.is_set()
        assert done.usage is not None
        assert looked[0].result() == done.usage.prompt_tokens + 2, "it was not the state that is being answered"
        runner.on_token = runner.tokens.append
        more = runner.answer("c", count=3)
        assert more.usage is not None
        assert more.usage.cached_tokens == done.usage.prompt_tokens + 10 - 1
    finally:
        runner.worker.stop()


def test_a_queued_run_is_cancelled_at_once(runner: Runner) -> None:
    blocked, go = threading.Event(), threading.Event()

    def block(_: RunToken) -> None:
        blocked.set()
        assert go.wait(WAIT_S)

    runner.on_token = block
    first = runner.submit("a", "hello")
    assert blocked.wait(WAIT_S)
    second = runner.submit("b", "hello")
    assert runner.worker.cancel(second.identifier)
    assert second.done.result(0).finish_reason == "cancelled"
    assert not runner.worker.cancel(second.identifier)
    assert runner.worker.cancel(first.identifier)
    go.set()
    assert first.done.result(WAIT_S).finish_reason == "cancelled"


def test_a_run_that_a_stop_cuts_short_is_not_answered_and_leaves_nothing(runner: Runner) -> None:
    runner.answer("c", "hello")
    tokens = runner.kept_tokens("c")
    begun = threading.Event()
    runner.on_token = lambda _: begun.set()
    run = runner.submit("c", "go on", count=400)
    assert begun.wait(WAIT_S)
    runner.worker.stop()
    assert not run.done.done(), "the journal carries it out again, at the next start"
    conversations = runner.loaded.conversations
    conversations.forget("c")
    assert conversations.get("c").state.tokens == tokens


def test_nobody_waits_for_a_worker_that_has_ended() -> None:
    loading, go = threading.Event(), threading.Event()

    def load() -> Loaded:
        loading.set()
        go.wait(WAIT_S)
        raise ModelUnavailable("loading a model: this test has none")

    worker = Worker(load, lambda _run, _token: None)
    worker.start()
    assert loading.wait(WAIT_S)
    waiting = worker.between_tokens(lambda loaded: loaded.engine)
    stopper = threading.Thread(target=worker.stop)
    stopper.start()
    with pytest.raises(Cancelled, match="stopping"):
        waiting.result(WAIT_S)
    go.set()
    stopper.join(WAIT_S)
    with pytest.raises(MindstreamError):
        worker.between_tokens(lambda loaded: loaded.engine)
    Worker(load, lambda _run, _token: None).stop()  # one that was never started


def test_a_model_that_fails_to_load_in_an_unforeseen_way_is_said_and_tried_again() -> None:
    attempts: list[int] = []

    def load() -> Loaded:
        attempts.append(1)
        raise ZeroDivisionError("a library's mistake")

    worker = Worker(load, lambda _run, _token: None)
    worker.RETRY_FIRST_S = 0.01  # type: ignore[misc]
    run = Run("r", "tester/1", ModelGenerate("c", [ChatMessage("user", "hello")]), Future())
    worker.submit(run)
    worker.start()
    try:
        with pytest.raises(ModelUnavailable, match="ZeroDivisionError: a library's mistake"):
            run.done.result(WAIT_S)
        with pytest.raises(ModelUnavailable):
            worker.submit(run)
    finally:
        worker.stop()
    assert attempts
