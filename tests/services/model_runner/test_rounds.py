"""Many conversations on one engine: what each says alone it says in company, and nobody disturbs the others."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from edge.db import Database
from edge.power import EnergySource, Meter, Unreadable
from protocol.errors import ContextOverflow, InvalidPrompt, from_wire
from protocol.ids import uuid7
from protocol.messages import ChatMessage, ModelGenerate, RunDone, RunToken
from services.model_runner.answers import Run
from services.model_runner.chat import ChatFormat
from services.model_runner.conversations import Conversations
from services.model_runner.rounds import Loaded
from services.model_runner.transformers_engine import TransformersEngine
from services.model_runner.worker import Worker

WAIT_S = 60.0
CONTEXT_TOKENS = 1024


class Runner:
    """A worker on a small model."""

    def __init__(self, db: Database, engine: TransformersEngine, folder: Path, **settings: Any) -> None:
        self.tokens: dict[str, list[RunToken]] = defaultdict(list)
        self.said: list[str] = []
        """The run of each token, in the order in which they came."""
        self.on_token: Callable[[str, RunToken], None] = lambda _run, _token: None
        conversations = Conversations(db, engine, in_memory=200, now_us=lambda: 0, on_evict=lambda _name, _left: None)
        self.loaded = Loaded(engine, ChatFormat.load(folder), conversations, CONTEXT_TOKENS, "", **settings)
        self.worker = Worker(lambda: self.loaded, self._say)
        self.worker.start()

    def _say(self, run: str, token: RunToken) -> None:
        self.tokens[run].append(token)
        self.said.append(run)
        self.on_token(run, token)

    def submit(self, conversation: str, text: str = "", *, asker: str = "tester/1", **ask: Any) -> Run:
        ask = {"max_new_tokens": 8, "ignore_eos": True} | ask
        if text:
            ask["messages"] = [ChatMessage("user", text)]
        run = Run(uuid7(), f"tester/{uuid7()}", ModelGenerate(conversation, **ask), Future(), asker=asker)
        self.worker.submit(run)
        return run

    def answer(self, conversation: str, text: str = "", **ask: Any) -> RunDone:
        return self.submit(conversation, text, **ask).done.result(WAIT_S)

    def hold(self) -> threading.Event:
        """Keep the worker busy, so that runs gather; until the event is set."""
        go, held = threading.Event(), threading.Event()

        def wait(_: Loaded) -> None:
            held.set()
            assert go.wait(WAIT_S)

        self.worker.between_tokens(wait)
        assert held.wait(WAIT_S)
        return go


@pytest.fixture
def runner(db: Database, engine: TransformersEngine, small_models: dict[str, Path]) -> Iterator[Runner]:
    found = Runner(db, engine, small_models["llama"])
    yield found
    found.worker.stop()


@pytest.fixture
def alone(db: Database, engine: TransformersEngine, small_models: dict[str, Path]) -> Iterator[Runner]:
    """Deterministic: each answer's steps alone."""
    found = Runner(db, engine, small_models["llama"], max_batch=1)
    yield found
    found.worker.stop()


def test_in_deterministic_mode_company_changes_nothing(alone: Runner) -> None:
    texts = [f"hello number {number}" * (1 + 9 * number) for number in range(6)]
    sampling = {"temperature": 0.9, "seed": 3, "max_new_tokens": 24}
    before = [alone.answer(f"alone-{number}", text, **sampling) for number, text in enumerate(texts)]
    go = alone.hold()
    runs = [alone.submit(f"together-{number}", text, **sampling) for number, text in enumerate(texts)]
    go.set()
    together = [run.done.result(WAIT_S) for run in runs]
    assert [done.tokens for done in together] == [done.tokens for done in before]
    turns = sum(one != other for one, other in zip(alone.said[-60:], alone.said[-59:], strict=False))
    assert turns > 40, "they were not answered in turns"


def test_a_hundred_conversations_at_once_are_all_answered_token_by_token_in_order(runner: Runner) -> None:
    go = runner.hold()
    runs = [runner.submit(f"c{number}", f"question {number}", asker=f"tester/{number % 3}") for number in range(100)]
    go.set()
    for run in runs:
        done = run.done.result(WAIT_S)
        assert done.finish_reason == "length"
        assert [token.index for token in runner.tokens[run.identifier]] == list(range(8))
        assert [token.token for token in runner.tokens[run.identifier]] == done.tokens
        assert "".join(token.text for token in runner.tokens[run.identifier]) == done.text
        assert done.usage is not None
        assert done.usage.batch_mean >= 1
    assert runner.worker.running == []
    assert runner.worker.queued == 0


def test_running_answers_go_on_while_a_long_prompt_is_read(runner: Runner) -> None:
    begun, go = threading.Event(), threading.Event()

    def hold(_run: str, token: RunToken) -> None:
        if token.index == 2:
            begun.set()
            assert go.wait(WAIT_S)

    runner.on_token = hold
    first = runner.submit("talking", "hello", max_new_tokens=200)
    assert begun.wait(WAIT_S)
    long = runner.submit("long", "word " * 150, max_new_tokens=2)
    go.set()
    long.done.result(WAIT_S)
    first.done.result(WAIT_S)
    at = runner.said.index(long.identifier)
    spoken = runner.said[:at].count(first.identifier)
    assert 3 <= spoken < 200
    assert first.identifier in runner.said[at:]


def test_two_runs_on_one_conversation_are_answered_one_after_another(runner: Runner) -> None:
    go = runner.hold()
    one, two = (runner.submit("c", text, asker=asker) for text, asker in (("first", "b/1"), ("second", "a/1")))
    go.set()
    first, second = one.done.result(WAIT_S), two.done.result(WAIT_S)
    assert runner.said == [one.identifier] * 8 + [two.identifier] * 8
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens + 8


def test_a_run_that_fails_fails_alone(runner: Runner) -> None:
    def fail(run: str, token: RunToken) -> None:
        if run == bad.identifier and token.index == 3:
            raise ValueError("its listener is on fire")

    runner.on_token = fail
    go = runner.hold()
    good = [runner.submit(f"good-{number}", "hello") for number in range(4)]
    bad = runner.submit("bad", "hello")
    go.set()
    assert bad.done.result(WAIT_S).finish_reason == "error"
    assert {run.done.result(WAIT_S).finish_reason for run in good} == {"length"}
    assert runner.answer("good-1", "more").finish_reason == "length"


def test_a_cancelled_prompt_is_read_no_further(runner: Runner) -> None:
    go = runner.hold()
    other = runner.submit("other", "hello", max_new_tokens=50)
    run = runner.submit("long", "word " * 150)
    runner.on_token = lambda _run, _token: run.cancelled.set()
    go.set()
    assert run.done.result(WAIT_S).finish_reason == "cancelled"
    runner.on_token = lambda _run, _token: None
    assert other.done.result(WAIT_S).finish_reason == "length"
    done = runner.answer("long")
    assert done.finish_reason == "length"
    assert done.usage is not None
    assert done.usage.prompt_tokens > 700


def test_a_conversation_that_is_not_to_be_kept_is_not(runner: Runner, db: Database) -> None:
    first = runner.answer("private", "hello", keep=False)
    more = runner.answer("private", "go on", keep=False)
    assert more.usage is not None
    assert more.usage.cached_tokens == (first.usage.prompt_tokens if first.usage else 0) + 8 - 1
    assert runner.loaded.conversations.names() == []
    cancelled = runner.submit("private", "and on", keep=False, max_new_tokens=500)
    runner.on_token = lambda _run, _token: cancelled.cancelled.set()
    assert cancelled.done.result(WAIT_S).finish_reason == "cancelled"
    gone = runner.answer("private")
    assert gone.finish_reason == "error"
    assert gone.error is not None
    assert gone.error.code == "conversation_unknown"


# --- prompts ----------------------------------------------------------------------------------------------------


def refused(runner: Runner, **ask: Any) -> Exception:
    done = runner.answer(uuid7(), **ask)
    assert done.finish_reason == "error"
    assert done.error is not None
    return from_wire(done.error)


def test_plain_text_is_read_without_a_template_and_gone_on_from(runner: Runner) -> None:
    chat = runner.loaded.chat
    text = runner.answer("text", prompt="Once upon a time")
    tokens = runner.answer("tokens", prompt_tokens=chat.encode("Once upon a time"))
    assert text.tokens == tokens.tokens
    assert text.usage is not None
    assert text.usage.prompt_tokens == len(chat.encode("Once upon a time"))
    more = runner.answer("text", prompt=" there was")
    assert more.usage is not None
    assert more.usage.prompt_tokens == text.usage.prompt_tokens + 8 + len(chat.encode(" there was"))
    assert more.usage.cached_tokens == text.usage.prompt_tokens + 8 - 1


@pytest.mark.parametrize(
    ("ask", "field", "text"),
    [
        ({"prompt_tokens": [1, 2, 10**6]}, "prompt_tokens", "1000000 at position 2"),
        ({"prompt_tokens": [-1]}, "prompt_tokens", "-1 at position 0"),
        ({"prompt_tokens": [1], "prompt": "a"}, "prompt_tokens", "both given"),
        ({"text": "hello", "prompt": "a"}, "prompt", "both given"),
        ({"text": "hello", "stop": [""]}, "stop", "empty"),
    ],
)
def test_a_prompt_that_is_none_is_refused_naming_its_field(
    runner: Runner, ask: dict[str, Any], field: str, text: str
) -> None:
    error = refused(runner, **ask)
    assert isinstance(error, InvalidPrompt)
    assert error.field == field
    assert text in str(error)


def test_a_chat_and_plain_text_do_not_mix(runner: Runner) -> None:
    runner.answer("chat", "hello")
    runner.answer("text", prompt="hello")
    for name, ask in (("chat", {"prompt": "more"}), ("text", {"text": "more"})):
        done = runner.answer(name, **ask)
        assert done.error is not None
        assert done.error.code == "invalid_prompt"


def test_a_prompt_above_the_context_is_refused_with_both_lengths(runner: Runner) -> None:
    for ask in ({"text": "word " * 300}, {"prompt": "word " * 300}):
        error = refused(runner, **ask)
        assert isinstance(error, ContextOverflow)
        assert f"{CONTEXT_TOKENS:,}" in str(error)
        assert "1,5" in str(error)


def test_a_window_leaves_out_the_oldest_turns_whole_and_says_how_much(runner: Runner) -> None:
    messages = [ChatMessage("system", "Be kind.")]
    for number in range(20):
        messages += [
            ChatMessage("user", f"question {number} " + "x" * 50),
            ChatMessage("assistant", f"answer {number}"),
        ]
    messages.append(ChatMessage("user", "the last one"))
    done = runner.answer("long", messages=messages, on_overflow="window", max_new_tokens=16)
    assert done.finish_reason == "length"
    assert done.usage is not None
    chat = runner.loaded.chat
    whole = len(chat.prompt([{"role": each.role, "content": each.content} for each in messages]))
    assert done.usage.dropped_tokens == whole - done.usage.prompt_tokens > 0
    assert CONTEXT_TOKENS - 16 - 130 < done.usage.prompt_tokens <= CONTEXT_TOKENS - 16
    said = runner.worker.between_tokens(
        lambda loaded: chat.decode(loaded.conversations.get("long").state.tokens, special=True)
    ).result(WAIT_S)
    assert said.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nquestion ")
    assert "the last one" in said
    error = refused(runner, messages=[ChatMessage("user", "x" * 2000)], on_overflow="window")
    assert isinstance(error, ContextOverflow), "one message alone is not cut"


def test_a_window_moves_on_with_a_conversation_and_with_plain_text(runner: Runner) -> None:
    dropped = []
    for number in range(5):
        done = runner.answer("c", f"{number}" + "x" * 300, on_overflow="window")
        assert done.finish_reason == "length"
        dropped.append(done.usage.dropped_tokens if done.usage else 0)
    assert dropped[0] == 0
    assert any(dropped)
    text = runner.answer("text", prompt="y" * 3000, on_overflow="window")
    assert text.usage is not None
    assert (text.usage.prompt_tokens, text.usage.dropped_tokens) == (CONTEXT_TOKENS - 8, 3000 - CONTEXT_TOKENS + 8)


SCHEMA = '{"type": "object", "properties": {"n": {"enum": [1, 23]}}, "required": ["n"], "additionalProperties": false}'


def test_answers_by_a_schema_stand_beside_free_ones_and_go_on_after_a_cut(runner: Runner) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed: make install (extra `model`)")
    go = runner.hold()
    sampling = {"temperature": 1.0, "seed": 5, "ignore_eos": False}
    by_schema = runner.submit("json", "hello", json_schema=SCHEMA, max_new_tokens=200, **sampling)
    cut = runner.submit("cut", "hello", json_schema=SCHEMA, max_new_tokens=3, **sampling)
    free = runner.submit("free", "hello", max_new_tokens=20)
    go.set()
    whole = by_schema.done.result(WAIT_S)
    assert whole.finish_reason == "stop"
    assert json.loads(whole.text)["n"] in (1, 23)
    assert free.done.result(WAIT_S).finish_reason == "length"
    begun = cut.done.result(WAIT_S)
    assert begun.finish_reason == "length"
    # Only what is kept is left of it, as after a restart.
    runner.worker.between_tokens(lambda loaded: loaded.conversations.forget("cut")).result(WAIT_S)
    rest = runner.answer("cut", max_new_tokens=200, ignore_eos=False)
    assert rest.finish_reason == "stop"
    assert json.loads(begun.text + rest.text)["n"] in (1, 23)


def test_a_schema_that_cannot_be_met_is_refused_and_the_conversation_stays_as_it_was(runner: Runner) -> None:
    first = runner.answer("c", "hello")
    refused = runner.answer("c", "more", json_schema='{"enum": []}')
    assert refused.finish_reason == "error"
    assert refused.error is not None
    assert isinstance(error := from_wire(refused.error), InvalidPrompt)
    assert error.field == "json_schema"
    assert refused.tokens == []
    again = runner.answer("c", "more")
    assert again.usage is not None
    assert first.usage is not None
    assert again.usage.cached_tokens == first.usage.prompt_tokens + 8 - 1


def test_the_likeliest_tokens_are_said_as_text(runner: Runner) -> None:
    run = runner.submit("c", "hello", top_logprobs=2)
    run.done.result(WAIT_S)
    for token in runner.tokens[run.identifier]:
        assert token.top[0].token == token.token
        assert token.top[0].logprob >= token.top[1].logprob
        assert all(chance.text for chance in token.top)


def test_the_penalty_is_heeded(runner: Runner) -> None:
    plain = runner.answer("plain", "hello", max_new_tokens=40)
    turned = runner.answer("turned", "hello", max_new_tokens=40, repetition_penalty=50.0)
    assert len(set(turned.tokens)) > len(set(plain.tokens))


class Counter(EnergySource):
    """A sensor that counts a joule at each look, and can be taken away."""

    name, resolution_s = "counter", 0.0

    def __init__(self) -> None:
        self.joules = 0.0
        self.broken = False

    def read_j(self) -> float:
        if self.broken:
            raise Unreadable("counter: gone")
        self.joules += 1.0
        return self.joules


def test_each_run_says_what_it_took_and_who_measured_it(
    db: Database, engine: TransformersEngine, small_models: dict[str, Path]
) -> None:
    counter = Counter()
    runner = Runner(db, engine, small_models["llama"], meter=Meter([counter]))
    try:
        go = runner.hold()
        runs = [runner.submit(f"c{number}", "hello") for number in range(3)]
        go.set()
        usages = [run.done.result(WAIT_S).usage for run in runs]
        assert all(usage is not None and usage.energy_sensor == "counter" for usage in usages)
        shares = [usage.energy_j for usage in usages if usage is not None and usage.energy_j is not None]
        assert all(share > 0 for share in shares)
        assert sum(shares) <= counter.joules
        counter.broken = True
        usage = runner.answer("d", "hello").usage
        assert usage is not None
        assert (usage.energy_j, usage.energy_sensor) == (None, "")
    finally:
        runner.worker.stop()


def test_without_a_sensor_no_energy_is_said(runner: Runner) -> None:
    usage = runner.answer("c", "hello").usage
    assert usage is not None
    assert (usage.energy_j, usage.energy_sensor) == (None, "")
