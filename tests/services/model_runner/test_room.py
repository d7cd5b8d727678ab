"""The memory of many conversations: who waits, who goes to the disk and comes back, what is computed once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from edge.db import Database, open_database
from protocol.errors import ModelError
from protocol.identity import Identity
from protocol.ids import uuid7
from protocol.messages import ChatMessage, ModelGenerate, RunDone, RunToken
from services.model_runner.answers import Run
from services.model_runner.chat import ChatFormat
from services.model_runner.conversations import CONVERSATIONS, Conversations
from services.model_runner.engine import Engine
from services.model_runner.parking import Parking
from services.model_runner.rounds import Loaded
from services.model_runner.transformers_engine import TransformersEngine
from services.model_runner.worker import Worker
from tests.support.waiting import wait_for

WAIT_S = 60.0
CONTEXT_TOKENS = 1024
SYSTEM = "You are a kind machine, and you say what you know. " * 11
"""Two chunks and a bit."""


class Runner:
    """A worker on a small model with a folder to park in."""

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        model: Path,
        *,
        caches: float = 1000,
        parked_bytes: int = 2**30,
        in_memory: int = 200,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.db: Database = open_database(folder / "conversations.db", schema=CONVERSATIONS)
        self.evicted: list[tuple[str, str]] = []
        self.reports: list[tuple[str, str]] = []
        self.dropped: list[str] = []
        self.tokens: list[RunToken] = []
        self.on_token: Callable[[str, RunToken], None] = lambda _run, _token: None
        self.parking = Parking(
            folder / "parked",
            engine,
            identity=Identity("tomato", bytes(32)),
            most_bytes=parked_bytes,
            on_drop=lambda name, _: self.dropped.append(name),
        )
        conversations = Conversations(
            self.db,
            engine,
            in_memory=in_memory,
            now_us=lambda: 0,
            on_evict=lambda *what: self.evicted.append(what),
            parking=self.parking,
        )
        self.one_cache_bytes = engine.cache_bytes(150, CONTEXT_TOKENS)
        budget = int(caches * self.one_cache_bytes)
        self.loaded = Loaded(
            engine, ChatFormat.load(model), conversations, CONTEXT_TOKENS, "", max_batch=1, kv_budget_bytes=budget
        )
        self.worker = Worker(lambda: self.loaded, self._say, lambda *what: self.reports.append(what))
        self.worker.start()

    def _say(self, run: str, token: RunToken) -> None:
        self.tokens.append(token)
        self.on_token(run, token)

    def stop(self) -> None:
        self.worker.stop()
        self.db.close()

    def submit(self, conversation: str, text: str = "", *, command: str = "", **ask: Any) -> Run:
        ask = {"max_new_tokens": 6, "ignore_eos": True} | ask
        if text:
            ask["messages"] = [*ask.get("messages", []), ChatMessage("user", text)]
        run = Run(
            uuid7(), command or f"tester/{uuid7()}", ModelGenerate(conversation, **ask), Future(), asker="tester/1"
        )
        self.worker.submit(run)
        return run

    def answer(self, conversation: str, text: str = "", **ask: Any) -> RunDone:
        return self.submit(conversation, text, **ask).done.result(WAIT_S)

    def count(self, counter: str) -> int:
        return sum(name == counter for name, _ in self.reports)

    def used_bytes(self) -> int:
        def measure(loaded: Loaded) -> int:
            conversations = loaded.conversations
            return sum(each.state.cache.allocated_bytes for each in (*conversations.idle(), *conversations.busy()))

        return self.worker.between_tokens(measure).result(WAIT_S)


Make = Callable[..., Runner]


@pytest.fixture(scope="module")
def built(small_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The same model on the other engine."""
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed: make install (extra `build`)")
    from services.model_runner.build import build
    from services.model_runner.onnx_engine import OnnxEngine

    folder = tmp_path_factory.mktemp("built")
    build(small_models["llama"], folder, "int8", "cpu", False, lambda _said: None)
    return OnnxEngine.load(folder, provider="cpu", threads=1)


@pytest.fixture(params=["transformers", "onnx"])
def make_on_either(
    request: pytest.FixtureRequest, tmp_path: Path, engine: Engine, small_models: dict[str, Path]
) -> Iterator[Make]:
    """On each of both engines."""
    chosen = engine if request.param == "transformers" else request.getfixturevalue("built")
    yield from _make(tmp_path, chosen, small_models["llama"])


@pytest.fixture
def make(tmp_path: Path, engine: TransformersEngine, small_models: dict[str, Path]) -> Iterator[Make]:
    yield from _make(tmp_path, engine, small_models["llama"])


def _make(tmp_path: Path, engine: Engine, model: Path) -> Iterator[Make]:
    made: list[Runner] = []

    def make_one(folder: str = "node", **settings: Any) -> Runner:
        made.append(Runner(tmp_path / folder, engine, model, **settings))
        return made[-1]

    yield make_one
    for runner in made:
        runner.stop()


def turns(runner: Runner, names: list[str], text: str) -> list[RunDone]:
    return [runner.answer(name, f"{text} {name}", temperature=0.8, seed=1) for name in names]


NAMES = [f"c{number}" for number in range(5)]


def test_a_conversation_that_had_to_leave_the_memory_comes_back_bit_for_bit(make_on_either: Make) -> None:
    make = make_on_either
    roomy, tight = make("roomy"), make("tight", caches=2.5)
    for runner in (roomy, tight):
        turns(runner, NAMES, "hello from")
    first, second = turns(roomy, NAMES, "and again"), turns(tight, NAMES, "and again")
    assert [done.tokens for done in first] == [done.tokens for done in second]
    assert [done.usage.cached_tokens for done in first if done.usage] == [
        done.usage.cached_tokens for done in second if done.usage
    ]
    assert tight.count("restored.kv_cache") >= 2
    assert {left for _, left in tight.evicted} == {"parked"}
    assert not roomy.evicted
    assert tight.used_bytes() <= 2.5 * tight.one_cache_bytes


def test_parked_conversations_outlive_the_process(make_on_either: Make) -> None:
    make = make_on_either
    roomy, before = make("roomy"), make("tight", caches=1)
    for runner in (roomy, before):
        turns(runner, NAMES[:3], "hello from")
    before.stop()
    after = make("tight", caches=1)
    done = after.answer("c0", "and again c0", temperature=0.8, seed=1)
    assert done.tokens == roomy.answer("c0", "and again c0", temperature=0.8, seed=1).tokens
    assert done.usage is not None
    assert done.usage.cached_tokens > 0
    assert after.count("restored.kv_cache") == 1


@pytest.mark.parametrize("damage", ["chunk", "manifest", "short", "gone", "other"])
def test_a_parked_file_that_is_damaged_is_said_and_the_tokens_are_read_again(
    make: Make, damage: str, tmp_path: Path
) -> None:
    runner = make("tight", caches=1)
    turns(runner, ["c0", "c1", "c2"], "hello from")
    runner.parking._thread.submit(lambda: None).result(WAIT_S)  # what was to be written is there
    files = list((tmp_path / "tight" / "parked").glob("*.kv"))
    assert len(files) == 2
    bodies = [path.read_bytes() for path in files]
    for path, body, another in zip(files, bodies, reversed(bodies), strict=True):
        at = 60 if damage == "chunk" else len(body) - 100
        if damage == "gone":
            path.unlink()
        elif damage == "other":
            path.write_bytes(another)
        else:
            path.write_bytes(body[:at] if damage == "short" else body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :])
    done = runner.answer("c0", "and again")
    assert done.finish_reason == "length"
    assert done.usage is not None
    assert done.usage.cached_tokens == 0
    assert runner.count("refused.parked") == 1


def test_a_parked_file_says_nothing_to_others_and_is_nothing_to_another_node(make: Make, tmp_path: Path) -> None:
    runner = make("tight", caches=1)
    turns(runner, ["c0", "c1"], "hello from")
    runner.parking._thread.submit(lambda: None).result(WAIT_S)
    (path,) = (tmp_path / "tight" / "parked").glob("*.kv")
    history = runner.loaded.conversations.history("c0")
    assert history is not None
    body = path.read_bytes()
    prompt = b"".join(token.to_bytes(4, "little") for token in history.tokens[:8])
    assert prompt not in body
    assert b"hello" not in body
    dropped: list[str] = []
    other = Parking(
        tmp_path / "tight" / "parked",
        runner.loaded.engine,
        identity=Identity("tomato", bytes(range(32))),  # of the same name, with another key
        most_bytes=2**30,
        on_drop=lambda name, _: dropped.append(name),
    )
    assert other.totals == (0, 0)
    assert not path.exists()
    other.stop()


def test_the_folder_of_the_parked_has_a_bound_and_the_oldest_go(make: Make, tmp_path: Path) -> None:
    runner = make("tight", caches=1, parked_bytes=60_000)
    turns(runner, NAMES, "hello from")
    runner.parking._thread.submit(lambda: None).result(WAIT_S)
    assert runner.dropped[0] == "c0"
    assert sum(path.stat().st_size for path in (tmp_path / "tight" / "parked").iterdir()) < 70_000
    done = runner.answer("c0", "and again")
    assert done.usage is not None
    assert done.usage.cached_tokens == 0


def test_a_conversation_that_is_not_kept_is_never_parked(make: Make, tmp_path: Path) -> None:
    runner = make("tight", caches=1)
    runner.answer("secret", "hello", keep=False)
    runner.answer("other", "hello")
    assert runner.evicted == [("secret", "gone")]
    assert not list((tmp_path / "tight" / "parked").iterdir())


def test_a_run_that_never_fits_is_refused_and_one_that_does_not_fit_now_waits(make: Make) -> None:
    runner = make("tight", caches=1.5)
    done = runner.answer("large", "hello", max_new_tokens=900)
    assert done.error is not None
    assert done.error.code == "model"
    assert "model.kv_memory_mib" in done.error.hint
    most: list[int] = []
    runner.on_token = lambda _run, _token: most.append(len(runner.worker.running))
    runs = [runner.submit(f"c{number}", "hello", max_new_tokens=30) for number in range(4)]
    assert {run.done.result(WAIT_S).finish_reason for run in runs} == {"length"}
    assert max(most) == 1, "more began than there was room for"


def test_out_of_memory_fails_the_run_alone_after_the_idle_ones_gave_way(
    make: Make, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make()
    turns(runner, ["idle"], "hello")
    prefill, failures = engine.prefill, [1, 0]

    def short_of_memory(cache: Any, tokens: Any, *rest: Any) -> int:
        # What a machine without memory does can only be acted: the error is the engine's own.
        if len(tokens) > 40 and failures[0]:
            failures[0] -= 1
            raise ModelError("growing the KV cache", reason="out of memory")
        return prefill(cache, tokens, *rest)

    monkeypatch.setattr(engine, "prefill", short_of_memory)
    assert runner.answer("c", "word " * 20).finish_reason == "length"
    assert runner.evicted == [("idle", "parked")]
    assert runner.count("out_of_memory.retried") == 1
    failures[0] = 100
    talking = runner.submit("talking", "hi", max_new_tokens=100)
    failed = runner.answer("d", "word " * 20)
    assert failed.finish_reason == "error"
    assert talking.done.result(WAIT_S).finish_reason == "length"


# --- what is computed once ---------------------------------------------------------------------------------------


def system_ask() -> dict[str, Any]:
    return {"messages": [ChatMessage("system", SYSTEM)]}


def test_a_beginning_that_another_conversation_has_read_is_shared_and_changes_no_bit(make_on_either: Make) -> None:
    make = make_on_either
    roomy = make()
    first = roomy.answer("first", "hello", **system_ask())
    shared = roomy.answer("second", "what now?", **system_ask())
    assert first.usage is not None
    assert shared.usage is not None
    assert first.usage.shared_tokens == 0
    assert shared.usage.shared_tokens == shared.usage.cached_tokens >= 512
    alone = make("alone")
    assert alone.answer("second", "what now?", **system_ask()).tokens == shared.tokens
    logits = [
        runner.worker.between_tokens(
            lambda loaded: loaded.engine.export_layers(loaded.conversations.get("second").state.cache)
        ).result(WAIT_S)
        for runner in (roomy, alone)
    ]
    for one, other in zip(*logits, strict=True):
        assert (one.keys == other.keys).all()
        assert (one.values == other.values).all()


def test_a_common_beginning_is_kept_when_those_who_read_it_are_gone(make: Make) -> None:
    runner = make(in_memory=1)
    shared = []
    for number in range(4):
        done = runner.answer(f"c{number}", f"question {number}", keep=False, **system_ask())
        runner.answer("other", "x" * 10)  # the only one in memory now
        assert done.usage is not None
        shared.append(done.usage.shared_tokens)
    assert shared[:2] == [0, 0]
    assert shared[2:] == [512, 512]


def test_prompts_that_come_together_share_as_well(make_on_either: Make) -> None:
    make = make_on_either
    runner = make()
    held, go = threading.Event(), threading.Event()

    def wait(_: Loaded) -> None:
        held.set()
        assert go.wait(WAIT_S)

    runner.worker.between_tokens(wait)
    assert held.wait(WAIT_S)
    runs = [runner.submit(f"c{number}", f"question {number}", **system_ask()) for number in range(6)]
    go.set()
    shared = [done.usage.shared_tokens for run in runs if (done := run.done.result(WAIT_S)).usage]
    assert sum(shared) >= 5 * 512


def test_a_window_that_moved_on_is_not_shared_and_the_kept_beginning_is(
    tmp_path: Path, small_models: dict[str, Path]
) -> None:
    sliding = TransformersEngine.load(small_models["gemma3"], name="small-gemma", device="cpu", threads=1)
    runner = Runner(tmp_path / "sliding", sliding, small_models["gemma3"])
    alone = Runner(tmp_path / "alone", sliding, small_models["gemma3"])
    try:
        texts = [f"question {number}" + "?" * 60 for number in range(4)]
        answers = [runner.answer(f"c{number}", text, **system_ask()) for number, text in enumerate(texts)]
        assert [done.usage.shared_tokens for done in answers if done.usage] == [0, 0, 512, 512]
        assert alone.answer("c3", texts[3], **system_ask()).tokens == answers[3].tokens
    finally:
        runner.stop()
        alone.stop()


# --- a process that dies -------------------------------------------------------------------------------------------


def stop_at(runner: Runner, index: int) -> threading.Event:
    """Hold the answer at a token, which sets the event, until the worker is told to stop."""
    begun = threading.Event()

    def hold(_run: str, token: RunToken) -> None:
        if token.index == index:
            begun.set()
            wait_for(lambda: runner.worker._stopping, "the worker is not told to stop")

    runner.on_token = hold
    return begun


def test_an_answer_under_way_goes_on_from_its_checkpoint(make_on_either: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    make = make_on_either
    monkeypatch.setattr("services.model_runner.rounds.CHECKPOINT_S", 0.0)
    ask = {"temperature": 0.9, "seed": 4, "max_new_tokens": 60}
    whole = make("whole").answer("c", "tell me", **ask)
    before = make("node")
    begun = stop_at(before, 30)
    cut = before.submit("c", "tell me", command="tester/1", **ask)
    assert begun.wait(WAIT_S)
    before.stop()
    assert not cut.done.done()
    after = make("node")
    other = after.loaded.conversations.history("c")
    assert other is None, "half an answer is none"
    done = after.answer("c", "tell me", command="tester/1", **ask)
    assert after.tokens[0].index >= 30, "it began from the start"
    assert [token.index for token in after.tokens] == list(range(after.tokens[0].index, 60))
    kept = after.tokens[0].index
    assert (done.tokens[:kept], len(done.tokens), done.finish_reason) == (whole.tokens[:kept], 60, "length")
    assert done.text[:10] == whole.text[:10]
    # Tokens that are read again are close and not bit-equal; with another seed, or draw, hardly one would be the same.
    assert sum(one == other for one, other in zip(done.tokens[kept:], whole.tokens[kept:], strict=True)) >= 8
    assert after.count("resumed.answers") == 1
    # It is over: the same words asked anew are another turn.
    again = after.answer("c", "tell me", command="tester/2", **ask)
    assert again.usage is not None
    assert whole.usage is not None
    assert again.usage.prompt_tokens > whole.usage.prompt_tokens + 60


def test_half_an_answer_that_was_cut_is_dropped_when_another_turn_is_asked(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.model_runner.rounds.CHECKPOINT_S", 0.0)
    before = make("node")
    first = before.answer("c", "hello")
    begun = stop_at(before, 10)
    before.submit("c", "tell me", command="tester/1", max_new_tokens=100)
    assert begun.wait(WAIT_S)
    before.stop()
    after = make("node")
    done = after.answer("c", "something else", command="tester/2")
    assert done.usage is not None
    assert first.usage is not None
    assert after.tokens[0].index == 0
    late = after.answer("c", "tell me", command="tester/1")
    assert late.usage is not None
    assert late.usage.prompt_tokens > done.usage.prompt_tokens
    assert after.count("resumed.answers") == 0
