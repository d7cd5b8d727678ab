"""The model runner as a process, with the real model: asked over a bus, saved, handed over, killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from broker.child import spawn
from broker.embedded import EmbeddedBroker
from edge.bus import Bus
from edge.snapshot_store import SnapshotStore
from protocol.codec import Received
from protocol.errors import (
    BadSignature,
    BlobError,
    ContextOverflow,
    ConversationUnknown,
    InvalidPrompt,
    ModelError,
    ModelUnavailable,
    NotFound,
    SnapshotRefused,
    UnknownPeer,
)
from protocol.identity import Identity, digest
from protocol.ids import uuid7
from protocol.manifest import SignedManifest, SnapshotManifest, seal_manifest, snapshot_id
from protocol.messages import (
    ChatMessage,
    MemoryPut,
    ModelCancel,
    ModelGenerate,
    ModelResume,
    ModelResumed,
    ModelSnapshot,
    RunDone,
    RunToken,
    SnapshotManifestAsk,
    SnapshotSaved,
    SnapshotTimelineAsk,
    SnapshotTranscode,
    SnapshotWishes,
)
from tests.support.nodes import CHECKOUT, Node, Watcher, two_nodes, wait_for
from tests.support.waiting import DEADLINE_S

pytestmark = pytest.mark.model

SERVICE = "model_runner"
TTL_MS = 90_000
CONTEXT_TOKENS = 512
# One thread a node: two nodes share this machine's cores with each other and with whatever else runs. Each answer's
# steps alone: what is compared here is compared bit for bit.
MODEL = f"[model]\nthreads = 1\nmax_context_tokens = {CONTEXT_TOKENS}\nmax_batch = 1\n"
QUESTION = "What is the capital of France?"
STORY = "Tell me a story about a robot in Paris."


@dataclass
class Pair:
    """``tomato`` and ``sprout``, each with a model, and one who talks with them."""

    tomato: Node
    sprout: Node
    watcher: Watcher
    bus: Bus

    def ask_later(self, node: str, conversation: str, text: str = "", **settings: Any) -> Future[RunDone]:
        """Let ``node`` answer ``text``, or go on with its answer when there is none."""
        messages = [ChatMessage("user", text)] if text else []
        settings = {"max_new_tokens": 16} | settings
        return self.bus.ask_later(node, ModelGenerate(conversation, messages, **settings), ttl_ms=TTL_MS)

    def ask(self, node: str, conversation: str, text: str = "", **settings: Any) -> RunDone:
        return self.ask_later(node, conversation, text, **settings).result()

    def save(self, conversation: str) -> SnapshotSaved:
        saved: SnapshotSaved = self.bus.ask("tomato", ModelSnapshot(conversation), ttl_ms=TTL_MS)
        return saved

    def resume(self, snapshot: str, holder: str = "tomato", name: str = "", ttl_ms: int = TTL_MS) -> ModelResumed:
        resumed: ModelResumed = self.bus.ask("sprout", ModelResume(snapshot, holder, name, way="chunks"), ttl_ms=ttl_ms)
        return resumed


class Run:
    """A run under way whose tokens are heard."""

    def __init__(self, pair: Pair, node: str, conversation: str, text: str = "", **settings: Any) -> None:
        self.id = uuid7()
        self.tokens: list[RunToken] = []
        self._stop_hearing = pair.bus.hear(RunToken, self._hear, node=node, run=self.id)
        pair.bus.wait_subscribed(DEADLINE_S)
        self.answer = pair.ask_later(node, conversation, text, run=self.id, **settings)

    def _hear(self, message: Received) -> None:
        self.tokens.append(message.data)

    def wait_tokens(self, count: int) -> None:
        wait_for(lambda: len(self.tokens) >= count, f"{len(self.tokens)} of {count} tokens came")

    def end(self) -> RunDone:
        """The answer, once all of its tokens have been heard as well."""
        done = self.answer.result()
        self.wait_tokens(len(done.tokens))
        self._stop_hearing()
        return done


def new(name: str) -> str:
    """A name that no other test's conversation has."""
    return f"{name}-{uuid7()}"


@pytest.fixture(scope="module")
def pair(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two nodes on one broker, for all tests of this file: loading a model takes seconds."""
    folder = tmp_path_factory.mktemp("nodes")
    with EmbeddedBroker() as broker, two_nodes(folder, broker.url, (SERVICE,), MODEL) as (tomato, sprout):
        watcher = Watcher(broker.url)
        bus = Bus(url=broker.url, node="tester", client="talker")
        bus.start()
        try:
            for node in (tomato, sprout):
                watcher.wait_ready(node.name, (SERVICE,))
            yield Pair(tomato, sprout, watcher, bus)
        finally:
            bus.stop()
            watcher.bus.stop()


# --- generating -----------------------------------------------------------------------------------------------


def test_an_answer_comes_token_by_token_in_order_and_is_their_concatenation(pair: Pair) -> None:
    ends: list[RunDone] = []
    run = Run(pair, "tomato", new("stream"), QUESTION)
    stop_hearing = pair.bus.hear(RunDone, lambda message: ends.append(message.data), node="tomato", run=run.id)
    pair.bus.wait_subscribed(DEADLINE_S)
    done = run.end()
    wait_for(lambda: ends, "the run's end was not said")
    stop_hearing()
    assert "Paris" in done.text
    assert done.finish_reason == "stop"
    assert [token.index for token in run.tokens] == list(range(len(done.tokens)))
    assert [token.token for token in run.tokens] == done.tokens
    assert "".join(token.text for token in run.tokens) == done.text
    assert all(token.logprob <= 0 and token.entropy >= 0 for token in run.tokens)
    assert (ends[0].run, ends[0].text, ends[0].tokens) == (run.id, done.text, done.tokens)


def test_a_second_turn_reads_only_what_is_new(pair: Pair) -> None:
    conversation = new("turns")
    first = pair.ask("tomato", conversation, QUESTION)
    second = pair.ask("tomato", conversation, "And of Italy?")
    assert first.usage is not None
    assert second.usage is not None
    assert first.usage.cached_tokens == 0
    # All but the pending token.
    assert second.usage.cached_tokens == first.usage.prompt_tokens + first.usage.completion_tokens - 1
    assert second.usage.prompt_tokens > second.usage.cached_tokens
    assert "Rome" in second.text


def test_without_messages_the_answer_goes_on_where_it_was_cut(pair: Pair) -> None:
    whole = pair.ask("tomato", new("whole"), STORY, max_new_tokens=24)
    conversation = new("cut")
    parts = [pair.ask("tomato", conversation, STORY, max_new_tokens=9)]
    parts += [pair.ask("tomato", conversation, max_new_tokens=count) for count in (1, 14)]
    assert [part.finish_reason for part in parts] == ["length"] * 3
    assert [token for part in parts for token in part.tokens] == whole.tokens
    assert "".join(part.text for part in parts) == whole.text


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(pair: Pair) -> None:
    whole = pair.ask("tomato", new("free"), STORY, max_new_tokens=20)
    words = whole.text.split()
    stop = f"{words[5]} {words[6]}"
    run = Run(pair, "tomato", new("stopped"), STORY, max_new_tokens=20, stop=[stop, "never said"])
    done = run.end()
    assert done.finish_reason == "stop"
    assert done.text == whole.text[: whole.text.index(stop)]
    assert "".join(token.text for token in run.tokens) == done.text


def test_a_run_is_cancelled_after_its_current_token_and_the_conversation_goes_on(pair: Pair) -> None:
    conversation = new("cancelled")
    run = Run(pair, "tomato", conversation, STORY, max_new_tokens=400, ignore_eos=True)
    run.wait_tokens(3)
    assert pair.bus.ask("tomato", ModelCancel(run.id), ttl_ms=TTL_MS).found
    done = run.end()
    assert done.finish_reason == "cancelled"
    assert 3 <= len(done.tokens) < 100
    assert "".join(token.text for token in run.tokens) == done.text
    assert "Paris" in pair.ask("tomato", conversation, QUESTION).text
    assert not pair.bus.ask("tomato", ModelCancel(run.id), ttl_ms=TTL_MS).found


def test_a_queued_run_is_cancelled_at_once_and_leaves_no_trace(pair: Pair) -> None:
    tries: list[tuple[str, Run, RunDone]] = []

    def cancelled_while_queued() -> bool:
        """False when the long answer was over before the other run had been cancelled: nothing was seen then."""
        conversation = new("long")
        long = Run(pair, "tomato", conversation, STORY, max_new_tokens=400, ignore_eos=True)
        long.wait_tokens(1)
        queued = Run(pair, "tomato", conversation, QUESTION)  # behind the one on the same conversation
        wait_for(
            lambda: queued.answer.done() or pair.bus.ask("tomato", ModelCancel(queued.id), ttl_ms=TTL_MS).found,
            "the run was not queued",
        )
        tries.append((conversation, long, queued.end()))
        return not long.answer.done()

    wait_for(cancelled_while_queued, "the long answer was over first, each time")
    conversation, long, done = tries[-1]
    assert (done.finish_reason, done.tokens, done.text) == ("cancelled", [], "")
    pair.bus.ask("tomato", ModelCancel(long.id), ttl_ms=TTL_MS)
    said = long.end()
    after = pair.ask("tomato", conversation, "Go on.", max_new_tokens=1)
    assert said.usage is not None
    assert after.usage is not None
    assert after.usage.cached_tokens == said.usage.prompt_tokens + len(said.tokens) - 1


def test_conversations_answered_together_do_not_disturb_each_other(pair: Pair) -> None:
    alone = [pair.ask("tomato", name, text) for name in [new("alone")] for text in (QUESTION, STORY)]
    one, other = new("one"), new("other")
    answers = [
        pair.ask_later("tomato", name, text)
        for name, text in ((one, QUESTION), (other, "What is 2 + 2?"), (one, STORY), (other, "And 3 + 3?"))
    ]
    first, _, second, fourth = (answer.result() for answer in answers)
    assert [first.tokens, second.tokens] == [done.tokens for done in alone]
    assert second.usage is not None
    assert second.usage.cached_tokens > 0
    assert fourth.usage is not None
    assert fourth.usage.cached_tokens > 0


def test_a_seed_gives_the_same_answer_again(pair: Pair) -> None:
    answers = [
        pair.ask("tomato", new("seed"), STORY, temperature=1.0, top_p=0.95, top_k=50, seed=seed, max_new_tokens=20)
        for seed in (5, 5, 6)
    ]
    assert answers[0].tokens == answers[1].tokens
    assert answers[0].tokens != answers[2].tokens


# --- what cannot be answered ------------------------------------------------------------------------------------


def test_a_conversation_that_nobody_began_is_refused(pair: Pair) -> None:
    with pytest.raises(ConversationUnknown, match="nobody") as caught:
        pair.ask("tomato", "nobody")
    assert caught.value.hint
    assert caught.value.remote == "tomato/model_runner"
    with pytest.raises(ConversationUnknown, match="nobody"):
        pair.save("nobody")


def test_a_turn_above_the_context_is_refused_and_the_conversation_stays_as_it_was(pair: Pair) -> None:
    conversation = new("overflow")
    pair.ask("tomato", conversation, QUESTION)
    with pytest.raises(ContextOverflow, match=str(CONTEXT_TOKENS)):
        pair.ask("tomato", conversation, "word " * (CONTEXT_TOKENS + 100))
    with pytest.raises(ContextOverflow):
        pair.ask("tomato", new("overflow"), "word " * (CONTEXT_TOKENS + 100))
    after = pair.ask("tomato", conversation, "And of Italy?")
    assert "Rome" in after.text
    assert after.usage is not None
    assert after.usage.cached_tokens > 0


def test_an_empty_stop_text_is_refused(pair: Pair) -> None:
    with pytest.raises(InvalidPrompt, match="stop"):
        pair.ask("tomato", new("empty-stop"), QUESTION, stop=[""])


# --- saving and resuming ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_p": 0.95, "seed": 11}], ids=["greedy", "sampled"])
def test_a_handed_over_conversation_says_the_next_64_tokens_the_first_would_have_said(
    pair: Pair, sampling: dict[str, Any]
) -> None:
    conversation = new("handoff")
    pair.ask("tomato", conversation, QUESTION, **sampling)
    cut = pair.ask("tomato", conversation, STORY, max_new_tokens=17, ignore_eos=True, **sampling)
    saved = pair.save(conversation)
    resumed = pair.resume(saved.snapshot)
    assert (resumed.how, resumed.conversation, resumed.tokens) == ("exact", conversation, saved.tokens)
    assert resumed.size_bytes >= saved.size_bytes * 0.9
    futures = [pair.ask_later(node, conversation, max_new_tokens=64, ignore_eos=True) for node in ("tomato", "sprout")]
    here, there = (future.result() for future in futures)
    assert len(here.tokens) == 64
    assert there.tokens == here.tokens
    assert there.text == here.text
    assert there.usage is not None
    assert here.usage is not None
    # Nothing was read again, on either side.
    assert there.usage.cached_tokens == here.usage.cached_tokens == saved.tokens - 1
    assert cut.finish_reason == "length"


def test_a_snapshot_is_taken_in_the_middle_of_an_answer_and_while_another_goes_on(pair: Pair) -> None:
    still, talking = new("still"), new("talking")
    pair.ask("tomato", still, QUESTION)
    run = Run(pair, "tomato", talking, STORY, max_new_tokens=160, ignore_eos=True)
    run.wait_tokens(5)
    saved_still, saved_talking = pair.save(still), pair.save(talking)
    assert not run.answer.done()
    for saved in (saved_still, saved_talking):
        assert pair.resume(saved.snapshot).how == "exact"
    # What had been said of the answer belongs to the history there: the next turn builds on it, nothing is read again.
    assert "Rome" in pair.ask("sprout", still, "And of Italy?").text
    turn = pair.ask("sprout", talking, "What is its name?")
    assert turn.usage is not None
    assert turn.usage.cached_tokens == saved_talking.tokens - 1
    whole = run.end()
    # The other way to go on: with the very answer that was cut.
    pair.resume(saved_talking.snapshot, name=f"{talking}-2")
    rest = pair.ask("sprout", f"{talking}-2", max_new_tokens=20, ignore_eos=True)
    said = saved_talking.tokens - (whole.usage.prompt_tokens if whole.usage else 0)
    assert 5 <= said < 160
    assert rest.tokens == whole.tokens[said : said + 20]


def test_a_snapshot_is_resumed_under_another_name_beside_the_first(pair: Pair) -> None:
    conversation, other = new("original"), new("renamed")
    pair.ask("tomato", conversation, QUESTION)
    saved = pair.save(conversation)
    assert pair.resume(saved.snapshot, name=other).conversation == other
    again = pair.resume(saved.snapshot, name=other)
    assert again.size_bytes < saved.size_bytes / 10, "its chunks were fetched a second time"
    assert "Rome" in pair.ask("sprout", other, "And of Italy?").text
    with pytest.raises(ConversationUnknown):
        pair.ask("sprout", conversation)


def test_a_labelled_checkpoint_is_branched_elsewhere_and_its_first_step_is_checked(pair: Pair) -> None:
    name = new("forked")
    pair.ask("tomato", name, STORY)
    labelled = pair.bus.ask("tomato", ModelSnapshot(name, label="the fork"), ttl_ms=TTL_MS)
    more = pair.ask("tomato", name, "And then?")
    pair.save(name)
    branch = f"{name}-branch"
    ask = ModelResume("", "tomato", branch, source=f"{name}@the fork", way="chunks")
    resumed: ModelResumed = pair.bus.ask("sprout", ask, ttl_ms=TTL_MS)
    assert (resumed.snapshot, resumed.how, resumed.logits) == (labelled.snapshot, "exact", "equal")
    assert pair.ask("sprout", branch, "And then?").tokens == more.tokens
    with pytest.raises(NotFound, match="@nowhere"):
        pair.bus.ask("sprout", ModelResume("", "tomato", branch, source=f"{name}@nowhere"), ttl_ms=TTL_MS)
    made = pair.bus.ask(
        "tomato", SnapshotTranscode(labelled.snapshot, SnapshotWishes("int8", 1e9, 0.0), "small"), ttl_ms=TTL_MS
    )
    assert (made.codec, made.label) == ("int8", "small")
    assert made.size_bytes < labelled.size_bytes
    assert made.fidelity.measured
    moments = pair.bus.ask("tomato", SnapshotTimelineAsk(name), ttl_ms=TTL_MS).moments
    assert [moment.label for moment in moments] == ["the fork", "", "small"]
    assert moments[2].parent == labelled.snapshot
    lossy: ModelResumed = pair.bus.ask(
        "sprout",
        ModelResume(made.snapshot, "tomato", branch, way="chunks", lossy=True, most_kl=1e9, least_top1=0.0),
        ttl_ms=TTL_MS,
    )
    assert lossy.how == "lossy"
    assert lossy.logits in ("close", "other")
    assert lossy.logits_kl is not None


def test_a_conversation_that_is_handed_back_brings_its_new_blocks_alone(pair: Pair) -> None:
    conversation = new("back")
    pair.ask("tomato", conversation, "word " * 260, max_new_tokens=4, ignore_eos=True)
    assert pair.resume(pair.save(conversation).snapshot).how == "exact"
    there = pair.ask("sprout", conversation, max_new_tokens=4, ignore_eos=True)
    saved: SnapshotSaved = pair.bus.ask("sprout", ModelSnapshot(conversation), ttl_ms=TTL_MS)
    back: ModelResumed = pair.bus.ask(
        "tomato", ModelResume(saved.snapshot, "sprout", f"{conversation}-back", way="chunks"), ttl_ms=TTL_MS
    )
    assert (back.how, back.tokens) == ("exact", saved.tokens)
    assert saved.tokens > 256 + len(there.tokens)
    # Its first 256 positions are at tomato: what came is the rest, and the manifest.
    assert back.size_bytes < saved.size_bytes / 2


@pytest.mark.parametrize("way", ["chunks", "tokens"])
def test_a_conversation_is_handed_over_by_name_and_the_answer_explains_itself(pair: Pair, way: str) -> None:
    conversation = new("by-name")
    pair.ask("tomato", conversation, QUESTION)
    ask = ModelResume("", "tomato", source=conversation, way=way, explain=True)  # type: ignore[arg-type]
    resumed: ModelResumed = pair.bus.ask("sprout", ask, ttl_ms=TTL_MS)
    assert (resumed.conversation, resumed.how) == (conversation, "exact" if way == "chunks" else "recomputed")
    assert resumed.way == resumed.options[0].way
    assert {option.way for option in resumed.options} >= {"tokens", "raw", "lossless", "int8", "rotated4"}
    assert [bool(option.reason) for option in resumed.options] == [False] + [True] * (len(resumed.options) - 1)
    brief: ModelResumed = pair.bus.ask("sprout", msgspec.structs.replace(ask, explain=False), ttl_ms=TTL_MS)
    assert not brief.options
    assert resumed.phases is not None
    assert (resumed.phases.prefill_ms > 0) == (way == "tokens")
    there = pair.ask("sprout", conversation, max_new_tokens=8, ignore_eos=True)
    here = pair.ask("tomato", conversation, max_new_tokens=8, ignore_eos=True)
    assert len(there.tokens) == len(here.tokens) == 8
    assert way == "tokens" or there.tokens == here.tokens


def test_a_node_that_is_forgotten_cannot_read_what_is_saved_next(pair: Pair) -> None:
    def key_id(saved: SnapshotSaved) -> bytes:
        signed: SignedManifest = pair.bus.ask("tomato", SnapshotManifestAsk(saved.snapshot), ttl_ms=TTL_MS)
        return msgspec.msgpack.decode(signed.manifest, type=SnapshotManifest).key_id

    conversation = new("forgotten")
    pair.ask("tomato", conversation, QUESTION)
    first = pair.save(conversation)
    assert pair.resume(first.snapshot).how == "exact"
    assert key_id(pair.save(conversation)) == key_id(first)
    pair.tomato.peers.forget("sprout")
    try:
        after = pair.save(conversation)
        assert key_id(after) != key_id(first)
        with pytest.raises(SnapshotRefused, match="not wrapped for that reader"):
            pair.resume(after.snapshot)
    finally:
        pair.tomato.trust(pair.sprout)
    # Trusted again, it is given the key when it asks.
    assert pair.resume(after.snapshot).how == "exact"


def test_a_conversation_that_is_being_answered_is_not_replaced(pair: Pair) -> None:
    conversation = new("busy")
    pair.ask("tomato", conversation, QUESTION)
    saved = pair.save(conversation)
    pair.resume(saved.snapshot)
    run = Run(pair, "sprout", conversation, STORY, max_new_tokens=400, ignore_eos=True)
    run.wait_tokens(1)
    with pytest.raises(ModelError, match="is being answered"):
        pair.resume(saved.snapshot)
    pair.bus.ask("sprout", ModelCancel(run.id), ttl_ms=TTL_MS)
    assert run.end().finish_reason == "cancelled"
    assert pair.resume(saved.snapshot).how == "exact"


def _changed(signed: SignedManifest, **fields: Any) -> bytes:
    return msgspec.msgpack.encode({**msgspec.msgpack.decode(signed.manifest), **fields})


def test_a_manifest_that_is_forged_or_of_an_unknown_node_is_refused(pair: Pair) -> None:
    conversation = new("forged")
    pair.ask("tomato", conversation, QUESTION)
    saved = pair.save(conversation)
    genuine: SignedManifest = pair.bus.ask("tomato", SnapshotManifestAsk(saved.snapshot), ttl_ms=TTL_MS)
    manifest = msgspec.msgpack.decode(genuine.manifest, type=SnapshotManifest)
    mallory = Identity.generate("mallory")
    tampered = SignedManifest(_changed(genuine, conversation="mine"), genuine.signature)
    in_tomatos_name = seal_manifest(mallory, manifest)
    own = seal_manifest(mallory, msgspec.structs.replace(manifest, creator="mallory"))
    cases: list[tuple[str, SignedManifest, type[Exception]]] = [
        (saved.snapshot, tampered, SnapshotRefused),  # not the one that was asked for
        (snapshot_id(tampered), tampered, BadSignature),
        (snapshot_id(in_tomatos_name), in_tomatos_name, BadSignature),
        (snapshot_id(own), own, UnknownPeer),
    ]
    served: list[SignedManifest] = []
    with Bus(url=pair.bus.url, node="mallory", client=SERVICE) as bus:
        bus.hear(SnapshotManifestAsk, lambda _: served[-1])
        bus.wait_subscribed(DEADLINE_S)
        for asked, answer, refusal in cases:
            served.append(answer)
            with pytest.raises(refusal) as caught:
                pair.resume(asked, holder="mallory")
            assert type(caught.value) is refusal
            with pytest.raises(NotFound):  # nothing of it was kept
                pair.resume(asked, holder="sprout")
    assert len(served) == len(cases)
    with pytest.raises(ConversationUnknown):
        pair.ask("sprout", conversation)


def _damage(node: Node) -> list[Path]:
    """Flip a bit in every chunk that a node keeps."""
    chunks = list((node.data_dir / SERVICE / "snapshots" / "chunks").iterdir())
    for path in chunks:
        body = bytearray(path.read_bytes())
        body[len(body) // 2] ^= 1
        path.write_bytes(body)
    return chunks


def _wait_until_whole(node: Node, snapshot: str) -> None:
    """A resume is answered before its chunks are on the disk."""
    folder = node.data_dir / SERVICE / "snapshots"

    def whole() -> bool:
        if not (folder / "manifests" / snapshot).exists():
            return False
        refs = msgspec.msgpack.decode(SnapshotStore(folder).manifest(snapshot).manifest, type=SnapshotManifest).chunks
        paths = [folder / "chunks" / ref.digest.hex() for ref in refs]
        return all(path.exists() and digest(path.read_bytes()).hex() == path.name for path in paths)

    wait_for(whole, f"{snapshot[:12]} is not whole on the disk of {node.name}")


def test_chunks_that_were_damaged_on_a_disk_are_never_used_and_heal(pair: Pair) -> None:
    conversation = new("damaged")
    pair.ask("tomato", conversation, QUESTION)
    saved = pair.save(conversation)
    pair.resume(saved.snapshot)
    _wait_until_whole(pair.sprout, saved.snapshot)
    # Here: they are fetched once more, unasked.
    assert _damage(pair.sprout)
    healed = pair.resume(saved.snapshot)
    assert healed.how == "exact"
    assert healed.size_bytes > saved.size_bytes * 0.9
    _wait_until_whole(pair.sprout, saved.snapshot)
    # There: the holder notices before it sends them, and says so. Saving the conversation again heals it.
    for path in _damage(pair.sprout):
        path.unlink()
    assert _damage(pair.tomato)
    with pytest.raises(BlobError, match="tomato has lost"):
        pair.resume(saved.snapshot)
    saved = pair.save(conversation)
    assert pair.resume(saved.snapshot).how == "exact"
    _wait_until_whole(pair.sprout, saved.snapshot)
    # With nobody to fetch them from, it is said.
    _damage(pair.sprout)
    with pytest.raises(BlobError, match="damaged"):
        pair.resume(saved.snapshot, holder="sprout")


def test_a_holder_that_is_away_is_named_before_the_asker_gives_up(pair: Pair) -> None:
    with pytest.raises(BlobError, match="nowhere has not answered") as caught:
        pair.resume("0" * 64, holder="nowhere", ttl_ms=3_000)
    assert "mindstream status" in caught.value.hint
    with pytest.raises(NotFound, match="does not hold it"):
        pair.resume("0" * 64, holder="tomato")


# --- a node without a model -------------------------------------------------------------------------------------


def test_a_node_without_its_model_says_so_and_its_other_services_are_fine(tmp_path: Path) -> None:
    with EmbeddedBroker() as broker:
        node = Node(tmp_path, "bare", broker.url, (SERVICE, "memory_store"), '[model]\nname = "gpt-nowhere"\n')
        watcher = Watcher(broker.url)
        try:
            node.start()
            wait_for(lambda: watcher.state("bare", SERVICE) == "degraded", "it did not become degraded")
            watcher.wait_ready("bare", ("memory_store",))
            reason = watcher.services["bare", SERVICE].reason
            assert "gpt-nowhere" in reason
            assert "known: " in reason
            assert "smollm2-135m-instruct" in reason
            for ask in (
                ModelGenerate("c", [ChatMessage("user", "hello")]),
                ModelSnapshot("c"),
                ModelResume("0" * 64, "bare"),
            ):
                with pytest.raises(ModelUnavailable, match="gpt-nowhere"):
                    watcher.bus.ask("bare", ask, ttl_ms=TTL_MS)
            watcher.bus.ask("bare", MemoryPut("it remembers all the same"), ttl_ms=TTL_MS)
            wait_for(lambda: watcher.node_state("bare") == "ready", "the node is not ready without its model")
        finally:
            watcher.bus.stop()
            if node.process is not None:
                assert node.stop() == 0


def test_a_runner_that_waits_for_its_broker_stops_when_asked_to(tmp_path: Path) -> None:
    with EmbeddedBroker() as broker:
        url = broker.url
    node = Node(tmp_path, "alone", url, (SERVICE,))
    with (tmp_path / "stderr").open("wb") as stderr:
        process = spawn(
            [sys.executable, "-m", "edge.service", SERVICE, "--config", str(node.config)], cwd=CHECKOUT, stderr=stderr
        )
    try:
        wait_for((node.data_dir / SERVICE / "journal.db").exists, "it did not open its files")
        process.terminate()
        code = process.wait(DEADLINE_S)
    finally:
        process.kill()
        process.wait()
    assert (code, "Traceback" in (tmp_path / "stderr").read_text()) == (0, False)


# --- the process dies: last, because it takes the conversations' caches with it --------------------------------------


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_an_answer_that_a_restart_cut_is_given_all_the_same_once(pair: Pair, how: signal.Signals) -> None:
    conversation = new("cut-short")
    first = pair.ask("tomato", conversation, QUESTION)
    run = Run(pair, "tomato", conversation, STORY, max_new_tokens=60, ignore_eos=True)
    run.wait_tokens(4)
    assert not run.answer.done()
    pid = pair.watcher.pid("tomato", SERVICE)
    os.kill(pid, how)
    done = run.answer.result()
    wait_for(lambda: pair.watcher.pid("tomato", SERVICE) not in (0, pid), "it was not started again")
    assert (done.finish_reason, len(done.tokens)) == ("length", 60)
    assert done.usage is not None
    assert first.usage is not None
    # It went on from the tokens that were kept, which had to be read again, and the turn was not appended twice.
    assert done.usage.cached_tokens == 0
    assert done.usage.prompt_tokens < first.usage.prompt_tokens + first.usage.completion_tokens + 60
    third = pair.ask("tomato", conversation, "Thank you.", max_new_tokens=2)
    assert third.usage is not None
    assert third.usage.cached_tokens == done.usage.prompt_tokens + 60 - 1
