"""Saving: a conversation to a snapshot on this node's disk, signed and sealed for all that this node trusts.

Copied between two tokens on the worker's thread, then sealed and written on a thread of its own, while the next tokens
are already being generated.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec

from edge.bus import Bus
from edge.service import Context
from edge.snapshot_store import SnapshotStore
from protocol.errors import MindstreamError, SnapshotRefused
from protocol.identity import digest
from protocol.manifest import PrivatePart, SignedManifest, SnapshotManifest, seal_manifest
from protocol.messages import ChatMessage, ModelSnapshot, SnapshotAnnounce, SnapshotSaved
from protocol.provenance import add_statement
from protocol.sealing import DataKey
from protocol.sharing import known_to_others, wrap_for_all
from services.model_runner import snapshot
from services.model_runner.conversations import Conversation
from services.model_runner.rounds import Loaded
from services.model_runner.worker import Worker

log = logging.getLogger(__name__)


class Extra(msgspec.Struct):
    """What the runner keeps with a generation state in a snapshot."""

    messages: list[ChatMessage]
    turn_start: int


def extra_of(manifest: SnapshotManifest, private: PrivatePart) -> tuple[list[ChatMessage], int]:
    """Messages and start of the present answer. Raises SnapshotRefused when they are not what we wrote."""
    try:
        extra = msgspec.convert(snapshot.extra_of(manifest, private), Extra)
    except msgspec.ValidationError as error:
        raise SnapshotRefused(f"resuming {manifest.conversation!r}: its messages: {error}", field="state") from None
    return extra.messages, max(0, min(extra.turn_start, manifest.cached_tokens + 1))


class Saving:
    """Answers asks to save."""

    def __init__(self, context: Context, bus: Bus, worker: Worker, store: SnapshotStore) -> None:
        self._context = context
        self._bus = bus
        self._worker = worker
        self._store = store
        # One: each holds a copy of a KV cache until it is on the disk.
        self._thread = ThreadPoolExecutor(1, "snapshot saver")

    def stop(self) -> None:
        """Begin nothing more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def save(self, ask: ModelSnapshot) -> Future[SnapshotSaved]:
        """Save a conversation; the future ends when it is on the disk."""
        return self._thread.submit(self._save, ask.conversation, time.monotonic())

    def _save(self, name: str, started_s: float) -> SnapshotSaved:
        conversation, copied = self._worker.between_tokens(lambda loaded: self._copy(loaded, name)).result()
        if self._must_change_key(copied):
            conversation.key = DataKey.generate()
            copied = copied._replace(key=conversation.key)
            log.info("%s is sealed with another key from now on: not all that have the last one are trusted", name)
        with self._store.writing():
            manifest = snapshot.seal(copied, self._store.put_chunk)
            signed = self._sign(manifest, copied.key)
            identifier = self._store.put_manifest(signed)
        conversation.parent = bytes.fromhex(identifier)
        size_bytes = manifest.total_bytes + len(signed.manifest)
        model, tokens = manifest.model, manifest.cached_tokens + 1
        try:
            self._bus.say(SnapshotAnnounce(identifier, name, model, tokens, size_bytes), timeout_s=5.0)
        except MindstreamError as error:
            # It is on the disk all the same, and the asker is told its id.
            self._bus.counters.add("dropped.announce")
            log.warning("snapshot %s could not be announced: %s", identifier[:12], error)
        return SnapshotSaved(identifier, name, model, tokens, size_bytes, (time.monotonic() - started_s) * 1000)

    def _copy(self, loaded: Loaded, name: str) -> tuple[Conversation, snapshot.Copied]:
        """Copy a conversation, on the worker's thread."""
        conversation = loaded.conversations.get(name)
        state = conversation.state
        if not state.prefilled:
            snapshot.recompute(loaded.engine, state)
        messages = conversation.messages
        if name in self._worker.running and len(state.tokens) > conversation.turn_start:
            # In the middle of an answer: what has been said of it belongs to the history, wherever it goes on.
            if messages and messages[-1].role == "assistant":
                messages = messages[:-1]
            said = loaded.chat.decode(state.tokens[conversation.turn_start :])
            messages = [*messages, ChatMessage("assistant", said)]
        return conversation, snapshot.copy(
            loaded.engine,
            state,
            conversation=name,
            creator=self._context.identity.node,
            key=conversation.key,
            extra=msgspec.to_builtins(Extra(messages, conversation.turn_start)),
            parent=conversation.parent,
        )

    def _sign(self, manifest: SnapshotManifest, key: DataKey) -> SignedManifest:
        """A manifest signed, its key wrapped for this node and for all that it trusts, its provenance begun."""
        identity = self._context.identity
        signed = seal_manifest(identity, manifest)
        signed.wraps = wrap_for_all(identity, key, self._context.peers.keyring())
        signed.provenance = add_statement(identity, [], digest(signed.manifest), "created")
        return signed

    def _must_change_key(self, copied: snapshot.Copied) -> bool:
        """Whether somebody may have the conversation's key whom this node does not trust (any more)."""
        if not copied.parent:
            return False  # nothing was sealed with it that others have seen
        try:
            parent = self._store.manifest(copied.parent.hex())
        except MindstreamError:
            return True  # who has it stood there
        return known_to_others(parent, copied.key.id, self._context.peers.keyring())
