"""Stepping by hand: the same tokens as an answer has, back again bit for bit, and nobody else is disturbed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from edge.db import Database
from protocol.errors import ContextOverflow, ConversationUnknown, InvalidPrompt, ModelError
from protocol.ids import uuid7
from protocol.messages import ChatMessage, ModelGenerate, ModelStep, ModelStepped, RunDone, RunToken
from services.model_runner.answers import Run
from services.model_runner.chat import ChatFormat
from services.model_runner.conversations import Conversations
from services.model_runner.engine import Engine
from services.model_runner.rounds import Loaded
from services.model_runner.stepping import IDLE_S, KEPT_SHARE, MOST_STEPPED, Stepping
from services.model_runner.transformers_engine import TransformersEngine
from services.model_runner.worker import Worker

WAIT_S = 60.0
TEXT = "the key lies under the pot by the door, and the pot by the door stands under the window"


class Runner:
    """A worker with what steps by hand, on a clock of its own."""

    def __init__(self, db: Database, engine: Engine, folder: Path, **settings: Any) -> None:
        self.now_s = 0.0
        self.reports: list[tuple[str, str]] = []
        self.on_token: Callable[[str, RunToken], None] = lambda _run, _token: None
        conversations = Conversations(db, engine, in_memory=4, now_us=lambda: 0, on_evict=lambda _name, _left: None)
        self.loaded = Loaded(engine, ChatFormat.load(folder), conversations, 512, device_reason="", **settings)
        self.worker = Worker(lambda: self.loaded, lambda run, token: self.on_token(run, token))
        self.stepping = Stepping(
            self.worker, lambda counter, text: self.reports.append((counter, text)), now_s=lambda: self.now_s
        )
        self.worker.start()

    def stop(self) -> None:
        self.stepping.stop()
        self.worker.stop()

    def step(self, **ask: Any) -> ModelStepped:
        return self.stepping.step(ModelStep("by-hand", **ask)).result(WAIT_S)

    def answer(self, conversation: str, text: str = "", **ask: Any) -> RunDone:
        messages = [ChatMessage("user", text)] if text else []
        found = ModelGenerate(conversation, messages, ignore_eos=True, **ask)
        run = Run(uuid7(), f"tester/{uuid7()}", found, Future())
        self.worker.submit(run)
        return run.done.result(WAIT_S)

    def names(self) -> set[str]:
        """In memory."""
        return self.worker.between_tokens(lambda loaded: {each.name for each in loaded.conversations.idle()}).result(
            WAIT_S
        )


@pytest.fixture
def runner(db: Database, engine: TransformersEngine, small_models: dict[str, Path]) -> Iterator[Runner]:
    found = Runner(db, engine, small_models["llama"])
    yield found
    found.stop()


@pytest.fixture
def any_runner(db: Database, small_model: Path) -> Iterator[Runner]:
    """Of a model of any family: sliding layers cannot be cut back."""
    found = Runner(db, TransformersEngine.load(small_model, name="small", device="cpu", threads=1), small_model)
    yield found
    found.stop()


def followed(runner: Runner, count: int, **ask: Any) -> list[ModelStepped]:
    """What comes when the sampler is followed."""
    steps = [runner.step(**ask)]
    for _ in range(count):
        steps.append(runner.step(take=[steps[-1].sampled]))
    return steps


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_following_the_sampler_gives_the_tokens_that_an_answer_has(runner: Runner, temperature: float) -> None:
    asked = {"max_new_tokens": 8, "temperature": temperature, "seed": 5}
    runner.answer("garden", "hello", **asked)
    steps = followed(runner, 7, source="garden")
    rest = runner.answer("garden", **asked)
    assert [each.sampled for each in steps] == rest.tokens
    # The fork goes on from the sampler as it was, and a second answer of the other conversation does not show in it.
    assert steps[-1].tokens == steps[0].tokens + 7


def test_what_could_come_is_said_with_its_probability_the_likeliest_first(runner: Runner) -> None:
    said = runner.step(text=TEXT, top=20)
    logprobs = [each.logprob for each in said.choices]
    assert len(said.choices) == 20
    assert logprobs == sorted(logprobs, reverse=True)
    assert said.sampled == said.choices[0].token
    assert said.entropy > 0
    assert said.text == TEXT
    assert said.tokens == len(TEXT)  # every byte is a token of this model
    assert runner.step(top=20) == said, "looking twice changes nothing"


def test_one_goes_back_to_the_same_bit_for_bit(any_runner: Runner) -> None:
    steps = followed(any_runner, 4, text=TEXT)
    assert any_runner.step(back=3) == steps[1]
    other = steps[1].choices[1].token
    assert any_runner.step(take=[other]).tokens == steps[2].tokens
    # The same way again.
    again = any_runner.step(back=1)
    assert again == steps[1]
    assert any_runner.step(take=[again.sampled]) == steps[2]


def test_where_no_state_is_kept_the_tokens_are_read_again_and_it_says_so(
    db: Database, small_models: dict[str, Path]
) -> None:
    engine = TransformersEngine.load(small_models["gemma3"], name="small", device="cpu", threads=1)
    runner = Runner(db, engine, small_models["gemma3"], kv_budget_bytes=KEPT_SHARE)
    try:
        steps = followed(runner, 3, text=TEXT)
        found = runner.step(back=2)
        assert "read again" in found.note
        assert (found.tokens, found.text) == (steps[1].tokens, steps[1].text)
        assert [each.token for each in found.choices][:3] == [each.token for each in steps[1].choices][:3]
    finally:
        runner.stop()


def test_text_is_appended_where_it_stands_and_taken_back_token_by_token(runner: Runner) -> None:
    first = runner.step(text=TEXT)
    said = runner.step(text=" and the cat")
    assert said.text == TEXT + " and the cat"
    assert runner.step(back=4).text == TEXT + " and the"
    assert runner.step(back=8) == first
    with pytest.raises(InvalidPrompt, match="can be"):
        runner.step(back=10_000)


def test_of_a_chat_the_present_answer_can_be_taken_back_and_no_more(runner: Runner) -> None:
    runner.answer("garden", "hello", max_new_tokens=5)
    begun = runner.step(source="garden")
    assert begun.kept == 5
    assert runner.step(back=5).kept == 0
    with pytest.raises(InvalidPrompt):
        runner.step(back=1)
    history = runner.worker.between_tokens(lambda loaded: loaded.conversations.history("by-hand")).result(WAIT_S)
    assert [each.role for each in history.messages] == ["user"]
    said = runner.step(text="good day")
    history = runner.worker.between_tokens(lambda loaded: loaded.conversations.history("by-hand")).result(WAIT_S)
    assert history.messages[-1] == ChatMessage("assistant", "good day")
    assert said.kept == len("good day")
    kept = runner.worker.between_tokens(lambda loaded: loaded.conversations.history("garden")).result(WAIT_S)
    assert kept.messages[-1].content != "good day", "the conversation that was forked is as it was"


def test_it_is_not_kept_and_gone_at_its_end(runner: Runner) -> None:
    runner.step(text=TEXT)
    assert "by-hand" in runner.names()
    runner.step(end=True)
    assert "by-hand" not in runner.names()
    assert runner.loaded.conversations.names() == []
    with pytest.raises(ConversationUnknown):
        runner.step()
    with pytest.raises(ConversationUnknown, match="nowhere"):
        runner.step(source="nowhere")


def test_one_that_gave_way_in_memory_is_read_again(runner: Runner) -> None:
    first = runner.step(text=TEXT)
    for number in range(6):
        runner.answer(f"other-{number}", "hello", max_new_tokens=1)
    assert "by-hand" not in runner.names()
    found = runner.step()
    assert (found.tokens, found.text) == (first.tokens, first.text)
    assert [each.token for each in found.choices][:3] == [each.token for each in first.choices][:3]


def test_those_that_nobody_asks_for_are_let_go(runner: Runner) -> None:
    runner.step(text=TEXT)
    runner.now_s = IDLE_S + 1
    runner.stepping.tick()
    assert runner.names() == set()
    assert [counter for counter, _ in runner.reports] == ["evicted.stepped"]


def test_there_are_so_many_at_one_time(runner: Runner) -> None:
    for number in range(MOST_STEPPED + 1):
        runner.now_s = number
        runner.stepping.step(ModelStep(f"by-hand-{number}", text=TEXT)).result(WAIT_S)
    with pytest.raises(ConversationUnknown):
        runner.stepping.step(ModelStep("by-hand-0")).result(WAIT_S)
    runner.stepping.step(ModelStep("by-hand-1")).result(WAIT_S)


def test_one_that_was_answered_meanwhile_goes_on_from_there(runner: Runner) -> None:
    runner.step(text=TEXT)
    done = runner.answer("by-hand", max_new_tokens=3)
    found = runner.step()
    assert found.tokens == len(TEXT) + 3
    assert found.text.startswith(TEXT)
    assert found == runner.step()
    assert len(done.tokens) == 3


def test_a_full_context_is_said_and_one_can_go_back(runner: Runner) -> None:
    said = runner.step(text="x" * 511)
    assert said.choices
    full = runner.step(take=[said.sampled, said.sampled])
    assert (full.choices, full.sampled, full.note) == ([], -1, "the context is full")
    with pytest.raises(ContextOverflow):
        runner.step(take=[1])
    assert runner.step(back=2) == said


def test_an_answer_under_way_is_the_same_with_somebody_stepping_beside_it(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = runner.answer("alone", "hello", max_new_tokens=40)
    begun, queued = threading.Event(), threading.Event()
    between_tokens = runner.worker.between_tokens

    def queue(job: Any) -> Any:
        found = between_tokens(job)
        queued.set()
        return found

    def hold(_run: str, _token: RunToken) -> None:
        begun.set()
        assert queued.wait(WAIT_S)

    runner.on_token = hold
    monkeypatch.setattr(runner.worker, "between_tokens", queue)
    ask = ModelGenerate("beside", [ChatMessage("user", "hello")], ignore_eos=True, max_new_tokens=40)
    run = Run(uuid7(), f"tester/{uuid7()}", ask, Future())
    runner.worker.submit(run)
    assert begun.wait(WAIT_S)
    refused = runner.stepping.step(ModelStep("beside"))
    with pytest.raises(ModelError, match="being answered"):
        refused.result(WAIT_S)
    forked = runner.stepping.step(ModelStep("by-hand", source="beside")).result(WAIT_S)
    assert forked.choices
    followed(runner, 10)
    assert run.done.result(WAIT_S).tokens == alone.tokens
