"""Saving by the ladder, checkpoints, transcoding and the timeline, on a small model with a real broker."""

from __future__ import annotations

import errno
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from broker.embedded import EmbeddedBroker
from edge.bus import Bus
from edge.config import Config
from edge.db import Database
from edge.keys import Peers
from edge.service import Context
from edge.snapshot_store import SnapshotStore
from protocol.errors import Cancelled, ModelError, NotFound, SnapshotRefused, StorageError
from protocol.identity import Identity
from protocol.ids import uuid7
from protocol.manifest import open_manifest, snapshot_id
from protocol.messages import ModelSnapshot, SnapshotProgress, SnapshotSaved, SnapshotTranscode, SnapshotWishes
from protocol.provenance import read_chain
from protocol.sharing import Opened, open_snapshot
from services.model_runner import moments, snapshot
from services.model_runner.chat import ChatFormat
from services.model_runner.checkpoints import Checkpoints
from services.model_runner.conversations import Conversations
from services.model_runner.first_step import check, compare
from services.model_runner.generation import generate
from services.model_runner.parking import Parking
from services.model_runner.rounds import Loaded
from services.model_runner.saving import Saving
from services.model_runner.timeline import Timeline
from services.model_runner.transcoding import Transcoding
from services.model_runner.transformers_engine import TransformersEngine
from services.model_runner.worker import Worker
from tests.services.model_runner.test_rounds import CONTEXT_TOKENS, Runner
from tests.support.waiting import wait_for

WAIT_S = 60.0
ANY = {"most_kl": 1e9, "least_top1": 0.0}
"""Whatever the self-test of a model with random weights says."""


@pytest.fixture(scope="module")
def bus() -> Iterator[Bus]:
    with EmbeddedBroker() as broker:
        found = Bus(url=broker.url, node="tomato", client="model_runner")
        found.start()
        yield found
        found.stop()


class Node(Runner):
    """A worker, and all that saves."""

    def __init__(
        self, db: Database, engine: TransformersEngine, folder: Path, data: Path, bus: Bus, config: Config
    ) -> None:
        identity = Identity("tomato", bytes(range(32)))
        self.counted: Counter[str] = Counter()
        self.context = Context(config, identity, Peers(data, identity), data, "")
        self.store = SnapshotStore(data / "snapshots")
        self.timeline = Timeline(self.store, identity, self.context.peers)
        self.tokens, self.said = defaultdict(list), []
        self.on_token = lambda _run, _token: None
        self.parked: list[str] = []
        conversations = Conversations(
            db,
            engine,
            in_memory=2,
            now_us=lambda: 0,
            on_evict=lambda name, left: self.parked.append(f"{name} {left}"),
            parking=Parking(data / "parked", engine, identity=identity, most_bytes=10**9, on_drop=lambda *_: None),
        )
        self.loaded = Loaded(
            engine,
            ChatFormat.load(folder),
            conversations,
            CONTEXT_TOKENS,
            "",
            max_batch=1,
            watch=lambda *given: self.checkpoints.watch(*given),
        )
        self.worker = Worker(lambda: self.loaded, self._say)
        self.worker.start()
        self.saving = Saving(self.context, bus, self.worker, self.store, key_was_shared=self.timeline.key_was_shared)
        self.checkpoints = Checkpoints(config.snapshot, identity, self.saving, self.timeline, self.store, self._count)
        self.transcoding = Transcoding(self.context, self.worker, self.store, self.saving)

    def _count(self, counter: str, _text: str) -> None:
        self.counted[counter] += 1

    def save(self, conversation: str, label: str = "", **wishes: Any) -> SnapshotSaved:
        wanted = SnapshotWishes(**wishes) if wishes else None
        return self.saving.save(ModelSnapshot(conversation, label, wanted)).result(WAIT_S)

    def transcode(self, identifier: str, label: str = "", **wishes: Any) -> SnapshotSaved:
        return self.transcoding.transcode(SnapshotTranscode(identifier, SnapshotWishes(**wishes), label)).result(WAIT_S)

    def opened(self, identifier: str) -> Opened:
        return open_snapshot(
            self.store.manifest(identifier), identifier, self.context.identity, self.context.peers.keyring()
        )

    def resumed(self, identifier: str, lossy: bool = False) -> snapshot.Unpacked:
        manifest, private, key, _ = self.opened(identifier)
        chunks = self.store.chunks(manifest)
        engine = self.loaded.engine
        return snapshot.restore(engine, snapshot.read(engine, manifest, private, key, chunks, lossy=lossy))

    def idle(self) -> bool:
        """Whether no checkpoint is being written."""
        writing = self.checkpoints._writing
        return writing is None or writing.done()

    def stop(self) -> None:
        self.worker.stop()
        self.saving.stop()
        self.loaded.conversations.parking.stop()  # type: ignore[union-attr]


@pytest.fixture
def node(
    db: Database, engine: TransformersEngine, small_models: dict[str, Path], tmp_path: Path, bus: Bus
) -> Iterator[Node]:
    config = Config()
    config.snapshot.moments_distance_tokens = 8
    found = Node(db, engine, small_models["llama"], tmp_path, bus, config)
    yield found
    found.stop()


def chunk_files(node: Node) -> set[str]:
    """Of all chunks, synced or not."""
    folder = node.context.data_dir / "snapshots"
    return {path.name for part in ("chunks", "arriving") for path in (folder / part).rglob("*") if path.is_file()}


# --- the ladder ---------------------------------------------------------------------------------------------------


def test_a_plain_save_is_raw_and_checks_itself_at_the_first_step(node: Node) -> None:
    node.answer("talk", "hello " * 60)
    saved = node.save("talk")
    assert (saved.codec, saved.fidelity, saved.tried) == ("raw", None, [])
    resumed = node.resumed(saved.snapshot)
    assert resumed.how == "exact"
    first = check(node.loaded.engine, resumed)
    assert first is not None
    assert (first.logits, first.kl) == ("equal", 0.0)


def test_saving_changes_nothing_of_the_answer_that_goes_on(node: Node) -> None:
    sampling = {"temperature": 0.9, "seed": 5, "max_new_tokens": 60}
    alone = node.answer("alone", "the same text " * 30, **sampling)
    run = node.submit("together", "the same text " * 30, **sampling)
    wait_for(lambda: node.tokens[run.identifier], "its first token")
    saves = [node.save("together", codec=codec, **ANY) for codec in ("raw", "lossless", "int8", "tokens")]
    assert run.done.result(WAIT_S).tokens == alone.tokens
    assert [saved.codec for saved in saves] == ["raw", "lossless", "int8", "tokens"]


def test_auto_takes_the_smallest_rung_that_is_faithful_enough_and_says_what_it_measured(node: Node) -> None:
    node.answer("talk", "hello " * 60)
    saved = node.save("talk", codec="auto", **ANY)
    assert saved.codec == "rotated4"
    assert saved.ratio > 3
    assert saved.fidelity is not None
    assert saved.fidelity.tested_tokens == 128
    assert sorted(saved.fidelity.measured) == ["mean_kl", "top1"]
    certificate = self_certificate(node, saved)
    assert certificate.encode_ms > 0
    assert certificate.decode_ms > 0
    assert certificate.test_ms > 0
    kl = saved.fidelity.mean_kl
    assert kl is not None
    stricter = node.save("talk", codec="auto", most_kl=kl / 2, least_top1=0.0)
    assert stricter.codec in ("int8", "lossless")
    assert stricter.tried[0].startswith("rotated4: mean KL")
    exact = node.save("talk", codec="auto", most_kl=0.0, least_top1=1.0)
    assert (exact.codec, exact.fidelity) == ("lossless", None)
    assert [line.partition(":")[0] for line in exact.tried] == ["rotated4", "int8", "transform"]


def self_certificate(node: Node, saved: SnapshotSaved) -> Any:
    found = node.opened(saved.snapshot).manifest.certificate
    assert found is not None
    return found


def test_a_rung_that_is_named_and_not_faithful_enough_is_refused_with_its_figures(node: Node) -> None:
    node.answer("talk", "hello " * 60)
    with pytest.raises(ModelError, match=r"rotated4: mean KL .* nats, 0 at most") as caught:
        node.save("talk", codec="rotated4", most_kl=0.0, least_top1=1.0)
    assert caught.value.field == "most_kl"
    with pytest.raises(ModelError, match="no basis"):
        node.save("talk", codec="transform")


def test_a_context_too_short_to_test_has_the_rungs_usual_figures(node: Node) -> None:
    node.answer("talk", prompt="a", max_new_tokens=1)
    saved = node.save("talk", codec="int8")
    assert saved.fidelity is not None
    assert (saved.fidelity.tested_tokens, saved.fidelity.measured) == (0, [])
    assert "SmolLM2" in self_certificate(node, saved).usual_on


def test_a_lossy_snapshot_is_resumed_where_that_is_allowed_and_says_how_close(node: Node) -> None:
    node.answer("talk", "hello " * 60)
    saved = node.save("talk", codec="int8", **ANY)
    assert node.resumed(saved.snapshot).how == "recomputed"
    lossy = node.resumed(saved.snapshot, lossy=True)
    assert lossy.how == "lossy"
    first = check(node.loaded.engine, lossy)
    assert first is not None
    assert first.logits in ("close", "other")
    assert first.kl >= 0


def test_token_ids_alone_are_a_snapshot_of_no_chunks(node: Node) -> None:
    node.answer("talk", "hello " * 60)
    whole, small = node.save("talk"), node.save("talk", codec="tokens")
    opened = node.opened(small.snapshot)
    assert opened.manifest.chunks == []
    assert small.ratio == 0
    assert small.size_bytes < whole.size_bytes / 20
    resumed = node.resumed(small.snapshot)
    assert (resumed.how, resumed.reason) == ("recomputed", "it holds token ids alone")
    assert resumed.state.tokens == node.resumed(whole.snapshot).state.tokens


def test_logits_that_differ_are_told_by_their_divergence() -> None:
    row = np.array([1.0, 2.0, 3.0], np.float32)
    assert compare(row, row.copy()) == ("equal", 0.0)
    nudged = row + np.array([0, 1e-4, 0], np.float32)
    assert compare(row, nudged).logits == "close"
    assert 0 < compare(row, nudged).kl < 1e-6
    assert compare(row, row[::-1].copy()).logits == "other"
    # Zero and minus zero are two bit patterns.
    assert compare(np.zeros(3, np.float32), -np.zeros(3, np.float32)).logits == "close"


# --- many, and what goes wrong ------------------------------------------------------------------------------------


def test_parked_conversations_are_saved_from_their_kv_and_not_read_again(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"talk-{number}" for number in range(5)]
    for number, name in enumerate(names):
        node.answer(name, f"text number {number} " * 30)
    assert len(node.parked) >= 3
    assert all(line.endswith(" parked") for line in node.parked)
    read: list[int] = []
    prefill = node.loaded.engine.prefill
    monkeypatch.setattr(
        node.loaded.engine, "prefill", lambda cache, tokens, *rest: read.append(1) or prefill(cache, tokens, *rest)
    )
    saves = [node.saving.save(ModelSnapshot(name)) for name in names]
    for name, saved in zip(names, saves, strict=True):
        resumed = node.resumed(saved.result(WAIT_S).snapshot)
        first = check(node.loaded.engine, resumed)
        assert first is not None
        assert first.logits == "equal", name
    assert not read


def test_a_conversation_that_is_read_again_is_read_in_pieces_while_another_answers(node: Node) -> None:
    node.answer("long", "a long text to read " * 40)
    for name in ("other", "third"):  # and out of memory it goes, with no room to be parked
        node.loaded.conversations.parking._most_bytes = 0  # type: ignore[union-attr]
        node.answer(name, "hello")
    assert "long tokens" in node.parked
    run = node.submit("talking", "hello", max_new_tokens=80)
    saved = node.save("long")
    assert run.done.result(WAIT_S).finish_reason == "length"
    assert node.resumed(saved.snapshot).how == "exact"


def test_a_full_disk_leaves_nothing_half_done_and_the_next_save_is_whole(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.answer("talk", "hello " * 60)
    first = node.save("talk")
    before = chunk_files(node)
    node.answer("talk", "and more " * 40)
    meanwhile: list[set[str]] = []

    def full(_signed: object) -> str:
        meanwhile.append(chunk_files(node))
        raise StorageError("writing: the disk is full", reason=os.strerror(errno.ENOSPC))

    monkeypatch.setattr(node.store, "put_manifest", full)
    with pytest.raises(StorageError):
        node.save("talk")
    assert meanwhile[0] > before
    assert chunk_files(node) == before
    monkeypatch.undo()
    assert node.resumed(first.snapshot).how == "exact"
    assert node.resumed(node.save("talk").snapshot).how == "exact"


@pytest.mark.parametrize("phase", ["wait", "look", "test", "write"])
def test_a_save_that_is_cancelled_leaves_nothing_and_the_next_one_is_whole(node: Node, phase: str) -> None:
    node.answer("talk", "a pot by the door " * 12)
    run = uuid7()
    said: list[SnapshotProgress] = []

    def say(run: str, progress: SnapshotProgress) -> None:
        said.append(progress)
        if progress.phase == phase:
            assert node.saving.cancel(run)

    node.saving._say_progress = say
    wishes = SnapshotWishes("int8", prune="heavy:0.5", **ANY)
    with pytest.raises(Cancelled):
        node.saving.save(ModelSnapshot("talk", wishes=wishes, run=run)).result(WAIT_S)
    assert said[-1].phase == phase
    assert node.store.identifiers() == []
    assert chunk_files(node) == set()
    assert not node.saving.cancel(run)
    assert node.resumed(node.save("talk").snapshot).how == "exact"


def test_what_a_killed_process_left_is_swept_once_it_is_old(node: Node) -> None:
    node.answer("talk", "hello")
    saved = node.save("talk")
    whole = chunk_files(node)
    folder = node.context.data_dir / "snapshots"
    for path in (folder / "chunks" / ("ab" * 32), folder / "chunks" / ".x.tmp", folder / "manifests" / ".y.tmp"):
        path.write_bytes(b"half")
    assert node.store.sweep() == 0  # a transfer that was cut may go on with them
    assert node.store.sweep(older_than_s=-1) == 12
    assert chunk_files(node) == whole
    assert [path.name for path in (folder / "manifests").iterdir()] == [saved.snapshot]


# --- named checkpoints --------------------------------------------------------------------------------------------


def test_a_label_names_the_newest_of_its_snapshots_and_the_chain_of_parents_stands_in_the_timeline(node: Node) -> None:
    node.answer("talk", "hello")
    first = node.save("talk", label="before the fork")
    node.answer("talk", "more")
    assert len(node.loaded.conversations.get("talk").state.tokens) > first.tokens
    second = node.save("talk", label="before the fork")
    assert node.timeline.labelled("talk", "before the fork") == second.snapshot
    with pytest.raises(NotFound, match="talk@after"):
        node.timeline.labelled("talk", "after")
    points = node.timeline.ask("talk", node.loaded.chat.decode).moments
    assert [point.snapshot for point in points] == [first.snapshot, second.snapshot]
    assert [point.parent for point in points] == ["", first.snapshot]
    assert [point.why for point in points] == ["asked", "asked"]
    assert points[0].tokens < points[1].tokens
    assert all(0 < len(point.text) <= 200 for point in points)


# --- transcoding --------------------------------------------------------------------------------------------------


def test_a_snapshot_is_transcoded_with_its_way_and_its_first_step(node: Node) -> None:
    node.answer("talk", "hello " * 60)
    source = node.save("talk", label="kept")
    made = node.transcode(source.snapshot, codec="int8", **ANY)
    manifest, _, _, chain = node.opened(made.snapshot)
    assert made.snapshot != source.snapshot
    assert manifest.parent.hex() == source.snapshot
    assert [step.statement.kind for step in chain] == ["created", "transcoded"]
    assert chain[1].statement.details == {"from": bytes.fromhex(source.snapshot)}
    assert (made.codec, made.label) == ("int8", "kept")
    assert made.size_bytes < source.size_bytes
    assert self_certificate(node, made).against == ""
    lossy = node.resumed(made.snapshot, lossy=True)
    np.testing.assert_array_equal(lossy.logits, node.resumed(source.snapshot).logits)
    again = node.transcode(made.snapshot, codec="rotated4", **ANY)
    assert self_certificate(node, again).against == "int8"
    assert node.opened(again.snapshot).provenance[-1].statement.kind == "transcoded"
    assert node.resumed(source.snapshot).how == "exact"


def test_an_exact_rung_does_not_make_an_inexact_snapshot_exact(node: Node) -> None:
    node.answer("talk", "hello " * 60)
    lossy = node.save("talk", codec="rotated4", **ANY)
    raw = node.transcode(lossy.snapshot, codec="raw", **ANY)
    assert raw.fidelity is not None
    assert self_certificate(node, raw) == self_certificate(node, lossy)
    assert node.resumed(raw.snapshot).how == "recomputed"
    one, other = (node.resumed(each.snapshot, lossy=True) for each in (lossy, raw))
    assert (one.how, other.how) == ("lossy", "lossy")
    for mine, theirs in zip(
        *(node.loaded.engine.export_layers(each.state.cache) for each in (one, other)), strict=True
    ):
        np.testing.assert_array_equal(mine.keys, theirs.keys)


def test_a_snapshot_of_token_ids_alone_cannot_get_its_kv_by_transcoding(node: Node) -> None:
    node.answer("talk", "hello")
    with pytest.raises(SnapshotRefused, match="token ids alone"):
        node.transcode(node.save("talk", codec="tokens").snapshot, codec="raw")
    made = node.transcode(node.save("talk").snapshot, codec="tokens")
    assert made.codec == "tokens"
    assert node.resumed(made.snapshot).how == "recomputed"


# --- key moments --------------------------------------------------------------------------------------------------


def test_key_moments_are_checkpointed_and_resumed_token_by_token(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "LEAST_ENTROPY", 0.0)
    monkeypatch.setattr(moments, "THRESHOLD", 0.6)
    node.context.config.snapshot.moments = True
    sampling = {"temperature": 0.9, "seed": 3, "max_new_tokens": 300, "salience": 0.8}
    done = node.answer("talk", "hello " * 60, **sampling)
    wait_for(node.idle, "its checkpoints were written")
    assert node.counted["saved.moment"] >= 2, node.counted
    assert not node.counted["failed.moment"], node.counted
    points = node.timeline.ask("talk", node.loaded.chat.decode).moments
    assert len(points) == node.counted["saved.moment"]
    assert points[0].why == "salient"
    live = node.loaded.conversations.get("talk").state.tokens
    for point in points:
        manifest = node.opened(point.snapshot).manifest
        assert manifest.automatic
        assert manifest.codec.name == "lossless"
        assert point.salience == 0.8
        assert len(point.alternatives) == 5
        state = node.resumed(point.snapshot).state
        assert state.tokens == live[: point.tokens]
        left = len(live) - point.tokens
        state.settings = state.settings.__class__(max_new_tokens=state.new_tokens + left, ignore_eos=True)
        assert [token.token for token in generate(node.loaded.engine, state)] == live[point.tokens :]
    assert done.finish_reason == "length"
    whole = [point for point in points if point.tokens > 512]
    assert whole
    assert whole[-1].own_bytes < whole[-1].size_bytes  # its whole blocks stand in the others as well
    # Nobody's next save is of another key for them.
    key = node.loaded.conversations.get("talk").key
    node.save("talk")
    assert node.loaded.conversations.get("talk").key is key


def test_moments_beyond_the_budget_are_thinned(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "LEAST_ENTROPY", 0.0)
    monkeypatch.setattr(moments, "THRESHOLD", 0.5)
    node.context.config.snapshot.moments = True
    node.context.config.snapshot.moments_count = 2
    for turn in range(4):
        node.answer("talk", f"turn {turn}", max_new_tokens=60, temperature=0.9, salience=1.0)
        wait_for(node.idle, "its checkpoints were written")
    assert node.counted["thinned.moment"] >= 1, node.counted
    assert len(node.timeline.points("talk")) == 2
    for point in node.timeline.points("talk"):
        assert node.resumed(point.identifier).how == "exact"
    labelled = node.save("talk", label="mine")
    assert labelled.snapshot in {point.identifier for point in node.timeline.points("talk")}


def test_without_being_asked_no_checkpoint_is_taken(node: Node) -> None:
    node.answer("talk", "hello", max_new_tokens=100, temperature=1.0, salience=1.0)
    assert node.timeline.points() == []


def test_every_statement_and_signature_of_what_was_saved_holds(node: Node) -> None:
    node.answer("talk", "hello")
    saved = node.save("talk", label="x")
    signed = node.store.manifest(saved.snapshot)
    keyring = node.context.peers.keyring()
    manifest = open_manifest(signed, keyring)
    assert manifest.label == "x"
    assert not manifest.automatic
    assert snapshot_id(signed) == saved.snapshot
    chain = read_chain(signed.provenance, bytes.fromhex(saved.snapshot), manifest.creator, keyring)
    assert [step.statement.kind for step in chain] == ["created"]
