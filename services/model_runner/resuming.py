"""Resuming: a snapshot, from this node's disk or from the node that holds it, to a conversation that goes on here.

The engine is asked first whether it can take the KV in, and only then are chunks fetched. Where it cannot, or where the
chunks do not hold what they should, the tokens are read again, and the answer says why.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec

from edge.answers import remaining_ms
from edge.blobs import BlobReceiver
from edge.bus import Bus
from edge.mailbox import Mailbox
from edge.service import Context
from edge.snapshot_store import SnapshotStore
from protocol.codec import Received
from protocol.errors import AskExpired, BlobError, MalformedMessage, ModelError, SnapshotRefused, TrustError
from protocol.manifest import SignedManifest, SnapshotManifest
from protocol.messages import ModelResume, ModelResumed, SnapshotManifestAsk
from protocol.provenance import add_statement
from protocol.sharing import Opened, open_snapshot
from services.model_runner import snapshot
from services.model_runner.conversations import Conversation
from services.model_runner.engine import Engine
from services.model_runner.rounds import Loaded
from services.model_runner.saving import extra_of
from services.model_runner.worker import Worker

log = logging.getLogger(__name__)

MANIFEST_TTL_MS = 10_000
"""A holder that has not sent its manifest by then is away."""
ANSWER_MARGIN_MS = 1_000
"""So long before the asker's patience ends it is told that the holder is silent."""
TRANSFER_TIMEOUT_S = 540.0


class Resuming:
    """Answers asks to resume.

    Args:
        blob_bus: a connection of its own for chunks, so that tokens do not wait behind them.
        stopping: asked now and then while chunks come; True ends that.
        mailbox: of this host, for chunks of its other nodes.
    """

    def __init__(
        self,
        context: Context,
        bus: Bus,
        blob_bus: Bus,
        worker: Worker,
        store: SnapshotStore,
        stopping: Callable[[], bool],
        mailbox: Mailbox | None = None,
    ) -> None:
        self._mailbox = mailbox
        self._context = context
        self._node = context.identity.node
        self._bus = bus
        self._blob_bus = blob_bus
        self._worker = worker
        self._store = store
        self._stopping = stopping
        self._threads = ThreadPoolExecutor(2, "snapshot fetcher")

    def stop(self) -> None:
        """Begin nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def resume(self, message: Received) -> Future[ModelResumed]:
        """Fetch a snapshot and make a conversation of it; the future ends when its next token can be generated."""
        return self._threads.submit(self._resume, message)

    def _resume(self, message: Received) -> ModelResumed:
        ask: ModelResume = message.data
        started_s = time.monotonic()
        signed = self._fetch_manifest(ask, remaining_ms(message))
        opened = open_snapshot(signed, ask.snapshot, self._context.identity, self._context.peers.keyring())
        manifest = opened.manifest
        name = ask.conversation or manifest.conversation
        # The engine may still be loading: wait for it on its own thread before anything is fetched.
        engine, reason = self._worker.between_tokens(lambda loaded: self._examine(loaded, opened, name)).result()
        fetched_bytes = len(signed.manifest)
        chunks: list[bytes] = []
        if not reason:
            with self._store.writing():
                chunks, chunks_bytes = self._fetch(ask, manifest)
                if ask.holder != self._node:
                    self._store.put_manifest(self._moved(signed, ask))
            fetched_bytes += chunks_bytes
        transferred_s = time.monotonic()
        found = self._read(engine, opened, chunks)
        resumed = self._worker.between_tokens(
            lambda loaded: self._restore(loaded, opened, name, found, ask.snapshot)
        ).result()
        return ModelResumed(
            conversation=name,
            how=resumed.how,
            reason=resumed.reason,
            tokens=manifest.cached_tokens + 1,
            size_bytes=fetched_bytes,
            transfer_ms=(transferred_s - started_s) * 1000,
            restore_ms=(time.monotonic() - transferred_s) * 1000,
        )

    def _moved(self, signed: SignedManifest, ask: ModelResume) -> SignedManifest:
        """As this node keeps it: with what the node here says of its way."""
        snapshot_digest = bytes.fromhex(ask.snapshot)
        try:
            chain = add_statement(
                self._context.identity, signed.provenance, snapshot_digest, "moved", {"from": ask.holder}
            )
        except MalformedMessage as error:
            self._bus.counters.add("dropped.statement")
            log.warning("snapshot %s: %s", ask.snapshot[:12], error)
            return signed
        return msgspec.structs.replace(signed, provenance=chain)

    def _read(self, engine: Engine, opened: Opened, chunks: list[bytes]) -> snapshot.Read:
        """What the chunks hold, or, where they do not hold what they should, the tokens to read again."""
        manifest, private, key, _ = opened
        try:
            return snapshot.read(engine, manifest, private, key, chunks)
        except SnapshotRefused as error:
            self._bus.counters.add("refused.snapshot_kv")
            self._bus.events.report("refused-snapshot-kv", "warning", str(error))
            return snapshot.read(engine, manifest, private, key, [], from_tokens=f"{error.field}: {error.reason}")

    def _examine(self, loaded: Loaded, opened: Opened, name: str) -> tuple[Engine, str]:
        """The engine, and why the KV cannot be used and the tokens must be read again; empty when it can.

        Raises SnapshotRefused.
        """
        refused = snapshot.refusal(loaded.engine, opened.manifest, opened.private)
        if refused is not None:
            raise refused
        self._check_not_running(name)
        return loaded.engine, snapshot.why_not_exact(loaded.engine, opened.manifest)

    def _check_not_running(self, name: str) -> None:
        if name in self._worker.running:
            raise ModelError(
                f"resuming conversation {name!r}: one of that name is being answered here",
                hint="wait for its end, cancel it, or give the resumed one another name",
                field="conversation",
                reason="busy",
            )

    def _fetch_manifest(self, ask: ModelResume, asker_waits_ms: int) -> SignedManifest:
        """The manifest, from this node's disk or from its holder. Raises BlobError when that is silent."""
        if ask.holder == self._node:
            return self._store.manifest(ask.snapshot)
        ttl_ms = max(1, min(MANIFEST_TTL_MS, asker_waits_ms - ANSWER_MARGIN_MS))
        try:
            signed: SignedManifest = self._bus.ask(
                ask.holder, SnapshotManifestAsk(ask.snapshot, self._context.identity.sealing_key), ttl_ms=ttl_ms
            )
        except AskExpired as error:
            raise BlobError(
                f"fetching snapshot {ask.snapshot[:12]}: {ask.holder} has not answered in {ttl_ms / 1000:g} s",
                hint="is that its name, and is its model runner up? `mindstream status` shows who is there",
                field="holder",
                reason="holder silent",
            ) from error
        return signed

    def _fetch(self, ask: ModelResume, manifest: SnapshotManifest) -> tuple[list[bytes], int]:
        """Every chunk, verified, and the bytes that crossed the bus for them.

        Chunks that were damaged on this node's disk are fetched once more. Raises BlobError.
        """
        if ask.holder == self._node:
            return self._store.chunks(manifest), 0
        receiver = BlobReceiver(
            self._bus, self._blob_bus, self._store, should_stop=self._stopping, mailbox=self._mailbox
        )
        fetched = receiver.pull(ask.holder, ask.snapshot, manifest, timeout_s=TRANSFER_TIMEOUT_S)
        try:
            return self._store.chunks(manifest), fetched
        except (BlobError, TrustError) as error:
            self._bus.counters.add("blob.damaged")
            self._bus.events.report("damaged-chunk", "warning", f"fetched once more from {ask.holder}: {error}")
        fetched += receiver.pull(ask.holder, ask.snapshot, manifest, timeout_s=TRANSFER_TIMEOUT_S)
        return self._store.chunks(manifest), fetched

    def _restore(
        self, loaded: Loaded, opened: Opened, name: str, found: snapshot.Read, identifier: str
    ) -> snapshot.Unpacked:
        self._check_not_running(name)  # a run may have begun while the chunks were on their way
        messages, turn_start = extra_of(opened.manifest, opened.private)
        resumed = snapshot.restore(loaded.engine, found)
        if resumed.how != "exact":
            snapshot.recompute(loaded.engine, resumed.state)
        parent = bytes.fromhex(identifier)
        conversation = Conversation(name, resumed.state, messages, turn_start, key=opened.key, parent=parent)
        loaded.conversations.save(loaded.conversations.hold(conversation))
        return resumed
