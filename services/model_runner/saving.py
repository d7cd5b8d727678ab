"""Saving: a conversation to a snapshot on this node's disk, signed and sealed for all that this node trusts.

Copied between two tokens on the worker's thread, then encoded, sealed and written on a thread of its own, while the
next tokens are already being generated. The self-test of a codec (``encoding``) reads on the worker's thread, in short
pieces between the rounds of those that are being answered.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple, TypeVar

import msgspec
import numpy as np

from edge.bus import Bus
from edge.service import Context
from edge.snapshot_store import SnapshotStore
from protocol.errors import MindstreamError, ModelError, SnapshotRefused
from protocol.identity import digest
from protocol.layout import DTYPE_BYTES, TOKENS, ChunkRef
from protocol.manifest import Certificate, PrivatePart, SignedManifest, SnapshotManifest, seal_manifest
from protocol.messages import (
    ChatMessage,
    ModelSnapshot,
    SnapshotAnnounce,
    SnapshotFidelity,
    SnapshotProgress,
    SnapshotSaved,
    SnapshotWishes,
)
from protocol.provenance import SignedStatement, add_statement
from protocol.sealing import SEAL_BYTES, DataKey
from protocol.sharing import known_to_others, wrap_for_all
from services.model_runner import snapshot
from services.model_runner.codecs.base import Array
from services.model_runner.codecs.basis import Basis
from services.model_runner.codecs.ladder import Asked
from services.model_runner.codecs.raw import Raw
from services.model_runner.conversations import Conversation
from services.model_runner.encoding import AUTO, NO_BASIS, Encoded, encode, wanted_rungs
from services.model_runner.engine import Engine, LayerState, Logits, ModelSpec, chunk_ends
from services.model_runner.moments import Moment
from services.model_runner.parking import Fetched
from services.model_runner.pruning import PIECE_TOKENS as LOOK_TOKENS
from services.model_runner.pruning import Floats, Seen, look
from services.model_runner.rounds import Loaded
from services.model_runner.shrinking import Shrunk, shrink
from services.model_runner.telling import OnBytes, Say, silent, telling, unless
from services.model_runner.worker import Worker

log = logging.getLogger(__name__)

PIECE_TOKENS = 16
"""So many tokens of a self-test are read at a time, between two rounds of those that are being answered."""
T = TypeVar("T")


class Extra(msgspec.Struct, omit_defaults=True):
    """What the runner keeps with a generation state in a snapshot."""

    messages: list[ChatMessage]
    turn_start: int
    moment: Moment | None = None
    """Of a checkpoint that nobody asked for."""
    salient: list[tuple[int, float]] = []
    """As ``Conversation.salient``."""


def read_extra(manifest: SnapshotManifest, private: PrivatePart) -> Extra:
    """What was kept with the state. Raises SnapshotRefused when it is not what we wrote."""
    try:
        return msgspec.convert(snapshot.extra_of(manifest, private), Extra)
    except msgspec.ValidationError as error:
        raise SnapshotRefused(f"resuming {manifest.conversation!r}: its messages: {error}", field="state") from None


def extra_of(manifest: SnapshotManifest, private: PrivatePart) -> tuple[list[ChatMessage], int]:
    """Messages and start of the present answer. Raises as ``read_extra``."""
    extra = read_extra(manifest, private)
    return extra.messages, max(0, min(extra.turn_start, manifest.cached_tokens + 1))


class Written(NamedTuple):
    """A snapshot on the disk."""

    identifier: str
    manifest: SnapshotManifest
    signed: SignedManifest

    @property
    def size_bytes(self) -> int:
        """Of chunks and manifest."""
        return self.manifest.total_bytes + len(self.signed.manifest)


FindBasis = Callable[[ModelSpec, bytes], Basis | None]
"""The basis of a model: the one whose BLAKE3 is given, or, for none, the best there is."""


class Saving:
    """Answers asks to save.

    Args:
        find_basis: for the rung ``transform``.
        key_was_shared: whether a snapshot of a conversation that is not its parent was given to a node that is not
            trusted any more (``timeline``).
        say_progress: called with an ask's run and how far it is; it must not take long.
    """

    def __init__(
        self,
        context: Context,
        bus: Bus,
        worker: Worker,
        store: SnapshotStore,
        *,
        find_basis: FindBasis = lambda _spec, _wanted: None,
        key_was_shared: Callable[[str, DataKey], bool] = lambda _conversation, _key: False,
        say_progress: Say = lambda _run, _said: None,
    ) -> None:
        self._context = context
        self._bus = bus
        self._worker = worker
        self._store = store
        self._settings = context.config.snapshot
        self.find_basis = find_basis
        self._key_was_shared = key_was_shared
        self._say_progress = say_progress
        self._on_bytes: OnBytes = silent
        """For whoever asked for what is being done now; of the thread that saves alone."""
        self._asked: dict[str, threading.Event] = {}
        """Of each run that is waiting or under way: whether it is cancelled."""
        # One: each holds a copy of a KV cache until it is on the disk.
        self._thread = ThreadPoolExecutor(1, "snapshot saver")
        self._syncer = ThreadPoolExecutor(1, "snapshot syncer")

    def start(self) -> None:
        """Remove what a process that was killed has left half done."""
        self._thread.submit(self._sweep)

    def _sweep(self) -> None:
        try:
            freed_bytes = self._store.sweep()
        except MindstreamError as error:
            log.warning("%s", error)
            return
        if freed_bytes:
            log.info("%.1f MB of snapshots that never came to be were removed", freed_bytes / 1e6)

    def stop(self) -> None:
        """Begin nothing more."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._syncer.shutdown(wait=True)

    def save(self, ask: ModelSnapshot) -> Future[SnapshotSaved]:
        """Save a conversation; the future ends when it is on the disk."""
        started_s = time.monotonic()
        return self.later(lambda: self._save(ask, started_s), ask.run)

    def later(self, work: Callable[[], T], run: str = "") -> Future[T]:
        """Do ``work`` on the thread that saves: one copy of a cache at a time is in memory. How far it is is said under
        ``run``, by which it can be cancelled: it then raises Cancelled."""
        cancelled = threading.Event()
        on_bytes = unless(cancelled, telling(run, self._say_progress))

        def do() -> T:
            self._on_bytes = on_bytes
            try:
                on_bytes("wait", 0, 0)
                return work()
            finally:
                self._on_bytes = silent
                if run:
                    self._asked.pop(run, None)

        if run:
            self._asked[run] = cancelled
            self._say_progress(run, SnapshotProgress("wait", 0, 0))  # another may be under way
        return self._thread.submit(do)

    def cancel(self, run: str) -> bool:
        """Stop a save or a transcode as soon as may be, nothing of it being kept; whether there was one."""
        found = self._asked.get(run)
        if found is not None:
            found.set()
        return found is not None

    def _save(self, ask: ModelSnapshot, started_s: float) -> SnapshotSaved:
        wishes = self.wishes(ask.wishes)
        self.bring_back(ask.conversation)
        conversation, copied, engine = self._copy_when_read(ask, wishes)
        if self.must_change_key(copied):
            conversation.key = DataKey.generate()
            copied = copied._replace(key=conversation.key)
            log.info(
                "%s is sealed with another key from now on: not all that have the last one are trusted",
                ask.conversation,
            )
        shrunk = self.shrink(engine, copied, wishes)

        def created(own: bytes) -> list[SignedStatement]:
            return add_statement(self._context.identity, [], own, "created", shrunk.statement)

        written = self.write(
            shrunk.copied,
            shrunk.encoded,
            lambda manifest: self.sign(manifest, copied.key, created),
            durable=ask.durable,
        )
        conversation.parent = bytes.fromhex(written.identifier)
        self.announce(written)
        return said(written, shrunk.encoded, started_s)

    def wishes(self, given: SnapshotWishes | None) -> SnapshotWishes:
        """What is asked for, or what the configuration says where nothing is."""
        settings = self._settings
        return given or SnapshotWishes(
            codec=settings.codec,  # type: ignore[arg-type]  # of the same names, by its pattern
            most_kl=settings.most_kl,
            least_top1=settings.least_top1,
        )

    def bring_back(self, name: str) -> None:
        """Take a parked conversation into memory, bit for bit, in place of reading its tokens again."""

        def fetch(loaded: Loaded) -> Future[Fetched] | None:
            parking, known = loaded.conversations.parking, loaded.conversations.live(name)
            if parking is None or known is not None or name in self._worker.running or not parking.has(name):
                return None
            return parking.fetch(name)

        def restore(loaded: Loaded, fetched: Fetched) -> None:
            if loaded.conversations.live(name) is None and name not in self._worker.running:
                loaded.conversations.restore(fetched)

        fetching = self._worker.between_tokens(fetch).result()
        if fetching is None:
            return
        try:
            fetched = fetching.result()
            self._worker.between_tokens(lambda loaded: restore(loaded, fetched)).result()
        except MindstreamError as error:
            self._bus.counters.add("refused.parked")
            self._bus.events.report(
                "refused-parked", "warning", f"{name} could not come back from disk, it is read again: {error}"
            )

    # --- copying --------------------------------------------------------------------------------------------------

    def _copy_when_read(
        self, ask: ModelSnapshot, wishes: SnapshotWishes
    ) -> tuple[Conversation, snapshot.Copied, Engine]:
        """Copy a conversation once its tokens have been read: at once where they are, else they are read in pieces."""
        on_bytes = self._on_bytes

        def copy(loaded: Loaded) -> tuple[Conversation, snapshot.Copied, Engine] | None:
            conversation = loaded.conversations.get(ask.conversation)
            tokens_only = wishes.codec == TOKENS.name
            if not (conversation.state.prefilled or tokens_only):
                return None
            copied = self.copy(loaded, conversation, label=ask.label, tokens_only=tokens_only, peek=wishes.test)
            return conversation, copied, loaded.engine

        def read(loaded: Loaded) -> Generator[None, None, tuple[Conversation, snapshot.Copied, Engine]]:
            engine = loaded.engine
            while True:
                found = copy(loaded)
                if found is not None:
                    return found
                state = loaded.conversations.get(ask.conversation).state
                start = state.cache.length
                end = chunk_ends(start, len(state.tokens) - 1, engine.chunk_tokens)[0]
                on_bytes("read", start, len(state.tokens) - 1)
                engine.prefill(state.cache, state.tokens[start:end])
                yield

        return self._worker.between_tokens(copy).result() or self._worker.in_pieces(read).result()

    def copy(
        self,
        loaded: Loaded,
        conversation: Conversation,
        *,
        label: str = "",
        tokens_only: bool = False,
        peek: bool = False,
        moment: Moment | None = None,
        sealed: snapshot.Sealed | None = None,
    ) -> snapshot.Copied:
        """Copy a conversation, on the worker's thread.

        Args:
            peek: whether the next token's logits are wanted: one step, after which the cache is as it was.
            moment: why nobody had to ask for it.
            sealed: what an earlier snapshot has of it.
        """
        state, name, engine = conversation.state, conversation.name, loaded.engine
        messages = conversation.messages
        if name in self._worker.running and len(state.tokens) > conversation.turn_start:
            # In the middle of an answer: what has been said of it belongs to the history, wherever it goes on.
            if messages and messages[-1].role == "assistant":
                messages = messages[:-1]
            spoken = loaded.chat.decode(state.tokens[conversation.turn_start :])
            messages = [*messages, ChatMessage("assistant", spoken)]
        return snapshot.copy(
            engine,
            state,
            conversation=name,
            creator=self._context.identity.node,
            key=conversation.key,
            extra=msgspec.to_builtins(Extra(messages, conversation.turn_start, moment, conversation.salient)),
            logits=self._peek(engine, conversation) if peek and not tokens_only else None,
            parent=conversation.parent,
            label=label,
            automatic=moment is not None,
            tokens_only=tokens_only,
            sealed_before=sealed.of(state.cache, conversation.key, sealed.codec) if sealed is not None else None,
        )

    def _peek(self, engine: Engine, conversation: Conversation) -> Logits | None:
        """What reading the pending token will give; None where there is no room for it."""
        state = conversation.state
        try:
            return engine.peek(state.cache, state.tokens[-1])
        except ModelError as error:
            log.info("the snapshot of %s is without the next token's logits: %s", conversation.name, error)
            return None

    # --- encoding and writing -------------------------------------------------------------------------------------

    def encode(
        self,
        engine: Engine,
        copied: snapshot.Copied,
        wishes: SnapshotWishes,
        source: SnapshotManifest | None = None,
    ) -> Encoded | None:
        """The parts of ``copied``, by the rung that ``wishes`` ask for; None where that is done while they are
        written (``raw``), or there are none. ``source`` is the snapshot whose KV it is. Raises ModelError."""
        inherited, against = _inherited(source)
        if copied.tokens_only or (wishes.codec == Raw.name and inherited is None):
            return None
        basis = self.find_basis(engine.spec, b"")
        candidates = wanted_rungs(wishes.codec, basis)
        encoded = encode(
            engine,
            copied,
            candidates,
            Asked(wishes.most_kl, wishes.least_top1),
            self._read,
            against=against,
            inherited=inherited,
            tested=wishes.test,
        )
        return _without_basis(encoded) if basis is None and wishes.codec == AUTO else encoded

    def shrink(
        self,
        engine: Engine,
        copied: snapshot.Copied,
        wishes: SnapshotWishes,
        source: SnapshotManifest | None = None,
    ) -> Shrunk:
        """As ``encode``, after pruning where ``wishes`` ask for that, or for a budget. Raises ModelError."""
        if copied.tokens_only or not (wishes.prune or wishes.budget_ratio):
            return Shrunk(copied, self.encode(engine, copied, wishes, source), {})
        tokens, salience = copied.tokens[:-1], _salience(copied)
        on_bytes = self._on_bytes

        def look_at(layers: Sequence[LayerState], needs: frozenset[str]) -> Seen:
            def looking(loaded: Loaded) -> Generator[None, None, Seen]:
                pieces = [loaded.chat.piece(token) for token in tokens]
                looked, found = 0, look(loaded.engine, tokens, layers, pieces, needs)
                try:
                    while True:
                        next(found)
                        looked += LOOK_TOKENS
                        on_bytes("look", looked, 0)
                        yield
                except StopIteration as stopped:
                    seen: Seen = stopped.value
                    return replace(seen, salience=salience)
                finally:
                    found.close()

            return self._worker.in_pieces(looking).result()

        basis = self.find_basis(engine.spec, b"")
        inherited, against = _inherited(source)
        shrunk = shrink(
            engine,
            copied,
            wishes,
            lambda codec: wanted_rungs(codec, basis),
            look_at,
            self._read,
            against=against,
            inherited=inherited,
        )
        if basis is None and shrunk.encoded is not None and (wishes.codec == AUTO or wishes.budget_ratio):
            return shrunk._replace(encoded=_without_basis(shrunk.encoded))
        return shrunk

    def _read(self, layers: Sequence[LayerState], tokens: Sequence[int]) -> Array:
        """As ``codecs.ladder.read_after``, between the rounds of those that are being answered."""
        on_bytes = self._on_bytes

        def read(loaded: Loaded) -> Generator[None, None, Array]:
            engine = loaded.engine
            cache = engine.import_layers(layers, layers[0].seen_tokens + len(tokens))
            try:
                rows = []
                for start in range(0, len(tokens), PIECE_TOKENS):
                    yield
                    on_bytes("test", start, len(tokens))
                    rows.append(engine.read(cache, tokens[start : start + PIECE_TOKENS]))
                return np.concatenate(rows)
            finally:
                cache.close()

        return self._worker.in_pieces(read).result()

    def write(
        self,
        copied: snapshot.Copied,
        encoded: Encoded | None,
        sign: Callable[[SnapshotManifest], SignedManifest],
        *,
        durable: bool = True,
    ) -> Written:
        """Seal and write a copied state: whole, or nothing of it stays. Raises StorageError, and SnapshotRefused when
        parts that were sealed before are not on the disk any more.

        Unless ``durable`` it can be fetched when this returns, and is synced to the disk by another thread.
        """
        on_bytes, written = self._on_bytes, 0
        total = copied.size_bytes if encoded is None else sum(len(part) for part in encoded.parts.values())
        on_bytes("write", 0, total)
        with contextlib.ExitStack() as writing:
            store = writing.enter_context(self._store.saving())

            def put(ref: ChunkRef, chunk: bytearray) -> None:
                nonlocal written
                store(ref, chunk)
                written += ref.size_bytes - SEAL_BYTES
                on_bytes("write", written, total)

            before = [chunk for part in copied.sealed_before.values() for chunk in part.chunks()]
            if not all(self._store.has(chunk) for chunk in before):
                raise SnapshotRefused(
                    f"saving {copied.conversation}: parts of it that were saved before are gone",
                    hint="save it again",
                    field="blocks",
                    reason="chunks missing",
                )
            if encoded is None:
                manifest = snapshot.seal(copied, put)
            else:
                manifest = snapshot.seal(copied, put, encoded.codec, encoded.certificate, encoded.parts)
            signed = sign(manifest)
            if durable:
                return Written(self._store.put_manifest(signed), manifest, signed)
            identifier = self._store.hold_manifest(signed)
            self._syncer.submit(self._sync, identifier, writing.pop_all())
            return Written(identifier, manifest, signed)

    def _sync(self, identifier: str, writing: contextlib.ExitStack) -> None:
        try:
            with writing:
                self._store.put_held_manifest(identifier)
        except MindstreamError as error:
            self._bus.counters.add("failed.snapshot_kept")
            self._bus.events.report(
                "snapshot-not-kept", "warning", f"snapshot {identifier[:12]} was given away and is not kept: {error}"
            )

    def sign(
        self,
        manifest: SnapshotManifest,
        key: DataKey,
        provenance: Callable[[bytes], list[SignedStatement]] | None = None,
    ) -> SignedManifest:
        """A manifest signed, its key wrapped for this node and for all that it trusts, its provenance begun, or what
        ``provenance`` makes of the manifest's digest."""
        identity = self._context.identity
        signed = seal_manifest(identity, manifest)
        signed.wraps = wrap_for_all(identity, key, self._context.peers.keyring())
        own = digest(signed.manifest)
        signed.provenance = provenance(own) if provenance else add_statement(identity, [], own, "created")
        return signed

    def announce(self, written: Written) -> None:
        """Say that it is here."""
        manifest = written.manifest
        told = SnapshotAnnounce(
            written.identifier,
            manifest.conversation,
            manifest.model,
            manifest.cached_tokens + 1,
            written.size_bytes,
        )
        try:
            self._bus.say(told, timeout_s=5.0)
        except MindstreamError as error:
            # It is on the disk all the same, and the asker is told its id.
            self._bus.counters.add("dropped.announce")
            log.warning("snapshot %s could not be announced: %s", written.identifier[:12], error)

    def must_change_key(self, copied: snapshot.Copied) -> bool:
        """Whether somebody may have the conversation's key whom this node does not trust (any more)."""
        if self._key_was_shared(copied.conversation, copied.key):
            return True
        if not copied.parent:
            return False  # nothing was sealed with it that others have seen
        try:
            parent = self._store.manifest(copied.parent.hex())
        except MindstreamError:
            return True  # who has it stood there
        return known_to_others(parent, copied.key.id, self._context.peers.keyring())


def _salience(copied: snapshot.Copied) -> Floats | None:
    """Of each cached token, (tokens,), 0 to 1, as far as it was said; None where nothing was."""
    try:
        salient = msgspec.convert(copied.progress.extra.get("salient", []), list[tuple[int, float]])
    except msgspec.ValidationError:
        return None  # of another node's snapshot; pruning does without
    if not salient:
        return None
    found = np.zeros(len(copied.tokens) - 1, np.float32)
    for start, salience in salient:
        found[max(0, start) :] = salience
    return found


def _without_basis(encoded: Encoded) -> Encoded:
    """As it was encoded without the smallest codec, which is said: its basis may be had."""
    return encoded._replace(tried=[*encoded.tried, NO_BASIS])


def _inherited(source: SnapshotManifest | None) -> tuple[Certificate | None, str]:
    """Certificate and codec of the snapshot whose KV is encoded again; none where that is exact."""
    found = source.certificate if source is not None else None
    return found, source.codec.name if source is not None and found is not None else ""


def said(written: Written, encoded: Encoded | None, started_s: float) -> SnapshotSaved:
    """What an asker is told of a snapshot that was begun at ``time.monotonic()`` ``started_s``."""
    manifest = written.manifest
    return SnapshotSaved(
        snapshot=written.identifier,
        conversation=manifest.conversation,
        model=manifest.model,
        tokens=manifest.cached_tokens + 1,
        size_bytes=written.size_bytes,
        took_ms=(time.monotonic() - started_s) * 1000,
        codec=manifest.codec.name,
        label=manifest.label,
        kept_tokens=manifest.kept_tokens if manifest.kept else 0,
        ratio=ratio(manifest),
        fidelity=fidelity_of(manifest),
        tried=[f"{each.rung}: {each.reason}" for each in encoded.tried] if encoded else [],
    )


def fidelity_of(manifest: SnapshotManifest) -> SnapshotFidelity | None:
    """As it is said on the bus; None where it is exact."""
    found = manifest.certificate
    if found is None:
        return None
    return SnapshotFidelity(found.tested_tokens, found.mean_kl, found.top1, found.measured)


def ratio(manifest: SnapshotManifest) -> float:
    """How many times smaller its encoded KV is than 16 bits a number of all its positions; 0 where there is none."""
    encoded = sum(part.encoded_bytes for place, part in manifest.parts() if place.kind in ("full", "sliding"))
    numbers = 0
    for layer in manifest.layers:
        held = {"full": layer.seen_tokens, "recurrent": 0}.get(layer.kind, layer.tokens)
        numbers += 2 * layer.kv_heads * layer.head_dim * held
    return numbers * DTYPE_BYTES["bfloat16"] / encoded if encoded else 0.0
