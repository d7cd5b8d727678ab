"""Taking a snapshot's KV over: saved by its holder if need be, fetched, and decoded while it comes."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotDone
from typing import Any, NamedTuple

import msgspec

from edge.answers import remaining_ms
from edge.blobs import BlobReceiver
from edge.bus import Bus
from edge.mailbox import Mailbox
from edge.service import Context
from edge.snapshot_store import SnapshotStore
from protocol.codec import Received
from protocol.errors import AskExpired, BlobError
from protocol.manifest import SignedManifest
from protocol.messages import ModelSnapshot, SnapshotManifestAsk, SnapshotSaved, SnapshotTranscode, SnapshotWishes
from protocol.sharing import Opened, open_snapshot
from services.model_runner import snapshot
from services.model_runner.codecs import basis_digest
from services.model_runner.cost_book import CostBook
from services.model_runner.engine import KVCache, LayerState, ModelSpec
from services.model_runner.handoff import Handoff, Unusable, since_ms
from services.model_runner.landing import Landing
from services.model_runner.rounds import Loaded
from services.model_runner.saving import FindBasis
from services.model_runner.telling import Say, telling
from services.model_runner.worker import Worker

log = logging.getLogger(__name__)

MANIFEST_TTL_MS = 10_000
"""A holder that has not sent its manifest by then is away."""
ANSWER_MARGIN_MS = 1_000
"""So long before the asker's patience ends it is told that the holder is silent."""
TRANSFER_TIMEOUT_S = 540.0
LOOK_EVERY_S = 0.05


AskHere = Callable[[msgspec.Struct], "Future[Any]"]
"""Has this node answer what it asks itself: an ask over the bus could wait behind the very ask that needs it."""
FetchBasis = Callable[[ModelSpec, str, bytes], None]
"""Fetch the basis of a model with that digest from a holder. Raises an error of the tree."""


def no_basis(_spec: ModelSpec, _holder: str, _wanted: bytes) -> None:
    """Where none are fetched."""


class Taken(NamedTuple):
    """A snapshot whose KV is here."""

    opened: Opened
    identifier: str
    signed: SignedManifest
    found: snapshot.Read
    landing: Landing


class Taking:
    """Takes over what other nodes hold, or what is on this disk.

    Args:
        blob_bus: a connection of its own for chunks, so that tokens do not wait behind them.
        stopping: asked now and then while chunks come; True ends that.
        mailbox: of this host, for chunks of its other nodes.
        ask_here: has this node answer what it asks itself.
        find_basis, fetch_basis: for the rung ``transform``.
    """

    def __init__(
        self,
        context: Context,
        bus: Bus,
        blob_bus: Bus,
        worker: Worker,
        store: SnapshotStore,
        book: CostBook,
        stopping: Callable[[], bool],
        mailbox: Mailbox | None,
        *,
        ask_here: AskHere,
        find_basis: FindBasis,
        fetch_basis: FetchBasis,
        say_progress: Say,
    ) -> None:
        self._context = context
        self._node = context.identity.node
        self._bus = bus
        self._blob_bus = blob_bus
        self._worker = worker
        self._store = store
        self._book = book
        self._stopping = stopping
        self._mailbox = mailbox
        self._ask_here = ask_here
        self._find_basis = find_basis
        self._fetch_basis = fetch_basis
        self._say_progress = say_progress
        self._decoders = max(1, min(4, os.cpu_count() or 1))
        self._threads = ThreadPoolExecutor(self._decoders, "chunk decoder")

    def stop(self) -> None:
        """Begin nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    # --- asking the holder ----------------------------------------------------------------------------------

    def ask(self, holder: str, ask: msgspec.Struct, message: Received, doing: str) -> Any:
        """Ask the holder for something small, while the asker waits. Raises BlobError when it is silent, and what it
        answers with."""
        patience_ms = max(1, remaining_ms(message) - ANSWER_MARGIN_MS)
        ttl_ms = patience_ms if holder == self._node else min(MANIFEST_TTL_MS, patience_ms)
        try:
            return self._ask_later(holder, ask, ttl_ms).result(ttl_ms / 1000 + 1)
        except (AskExpired, NotDone) as error:
            raise _silent(holder, doing, ttl_ms) from error

    def _ask_later(self, holder: str, ask: msgspec.Struct, ttl_ms: int) -> Future[Any]:
        return self._ask_here(ask) if holder == self._node else self._bus.ask_later(holder, ask, ttl_ms=ttl_ms)

    def manifest(self, holder: str, identifier: str, message: Received) -> SignedManifest:
        """A snapshot's, from this node's disk or from its holder. Raises BlobError when that is silent."""
        if holder == self._node:
            return self._store.manifest(identifier)
        ask = SnapshotManifestAsk(identifier, self._context.identity.sealing_key)
        signed: SignedManifest = self.ask(holder, ask, message, f"fetching snapshot {identifier[:12]}")
        return signed

    def _save(self, handoff: Handoff) -> tuple[Opened, str, SignedManifest]:
        """Have the conversation saved by the rung that was chosen, or the snapshot transcoded to it."""
        ask, started_s = handoff.ask, time.monotonic()
        wishes = SnapshotWishes(handoff.best.codec, most_kl=ask.most_kl, least_top1=ask.least_top1, test=False)  # type: ignore[arg-type]
        what: msgspec.Struct = (
            SnapshotTranscode(ask.snapshot, wishes, durable=False)
            if handoff.named
            else ModelSnapshot(ask.source, wishes=wishes, durable=False)
        )
        ttl_ms = max(1, remaining_ms(handoff.message) - ANSWER_MARGIN_MS)
        answer = self._ask_later(ask.holder, what, ttl_ms)
        while True:
            handoff.check_wanted()
            try:
                saved: SnapshotSaved = answer.result(LOOK_EVERY_S)
                break
            except AskExpired as error:
                raise _silent(ask.holder, f"having {handoff.name!r} saved", ttl_ms) from error
            except NotDone:
                if remaining_ms(handoff.message) <= 0:
                    raise _silent(ask.holder, f"having {handoff.name!r} saved", ttl_ms) from None
        handoff.phases.save_ms = since_ms(started_s)
        started_s = time.monotonic()
        signed = self.manifest(ask.holder, saved.snapshot, handoff.message)
        opened = open_snapshot(signed, saved.snapshot, self._context.identity, self._context.peers.keyring())
        handoff.phases.ask_ms += since_ms(started_s)
        return opened, saved.snapshot, signed

    def _have_basis(self, handoff: Handoff, wanted: bytes) -> None:
        """Fetch the basis of what was decided on, where it is not here: that was weighed."""
        if not wanted or self._find_basis(handoff.engine.spec, wanted) is not None:
            return
        started_s = time.monotonic()
        self._fetch_basis(handoff.engine.spec, handoff.ask.holder, wanted)
        handoff.phases.transfer_ms += since_ms(started_s)

    # --- taking ---------------------------------------------------------------------------------------------

    def take(self, handoff: Handoff) -> Taken:
        """Fetch what was decided on, and decode it.

        Raises Outrun; Unusable; SnapshotRefused for chunks that do not hold what they should; BlobError, StorageError.
        """
        as_it_is = handoff.named and handoff.best.codec == handoff.manifest.codec.name
        found = (handoff.opened, handoff.identifier, handoff.signed) if as_it_is else self._save(handoff)
        opened, identifier, signed = found
        self._have_basis(handoff, basis_digest(opened.manifest.codec))
        manifest, private, key, _ = opened
        cache, layers = self._worker.between_tokens(lambda loaded: self._open(loaded, handoff, opened)).result()
        landing: Landing | None = None
        try:
            variant = handoff.variant
            basis = self._find_basis(handoff.engine.spec, basis_digest(manifest.codec))
            intake = snapshot.intake(handoff.engine, manifest, private, key, basis, variant, layers)
            landing = Landing(self._store, manifest, intake, self._threads)
            self._fetch(handoff, identifier, landing, opened)
            read = snapshot.read_taken(handoff.engine, manifest, private, intake, variant, cache)
        except BaseException:
            if landing is not None:
                landing.abandon()
            if cache is not None:
                cache.close()
            raise
        return Taken(opened, identifier, signed, read, landing)

    def _open(self, loaded: Loaded, handoff: Handoff, opened: Opened) -> tuple[KVCache | None, list[LayerState] | None]:
        """A cache that is written into from outside, where the engine has such. On the worker's thread."""
        engine, manifest = loaded.engine, opened.manifest
        refused = snapshot.refusal(engine, manifest, opened.private)
        if refused is not None:
            raise refused
        basis, lossy = self._find_basis(engine.spec, basis_digest(manifest.codec)), handoff.ask.lossy
        if reason := snapshot.why_not_exact(engine, manifest, lossy=lossy, basis=basis, variant=handoff.variant):
            raise Unusable(reason)
        if manifest.kept:
            return None, None  # its rows are not its positions
        if handoff.variant is not None:
            return None, None  # converted, and in part computed, once it is whole
        capacity = snapshot.capacity_of(engine, manifest, opened.private)
        return engine.open_cache(manifest.cached_tokens, capacity) or (None, None)

    def _fetch(self, handoff: Handoff, identifier: str, landing: Landing, opened: Opened) -> None:
        manifest, holder = opened.manifest, handoff.ask.holder
        handoff.total_bytes = sum(ref.size_bytes for ref in manifest.chunks)
        handoff.lock.enter_context(self._store.writing())
        started_s = time.monotonic()
        here_bytes = handoff.here_bytes = landing.take_stored()
        if holder != self._node and here_bytes < handoff.total_bytes:
            handoff.fetching_s = time.monotonic()

            tell = telling(handoff.ask.run, self._say_progress)

            def progress(here: int, total: int) -> None:
                handoff.here_bytes, handoff.fetched_bytes = here, here - here_bytes
                tell("fetch", here, total)

            receiver = BlobReceiver(
                self._bus,
                self._blob_bus,
                landing,
                progress,
                lambda: self._stopping() or handoff.outrun.is_set(),
                mailbox=self._mailbox,
            )
            try:
                receiver.pull(holder, identifier, manifest, timeout_s=TRANSFER_TIMEOUT_S)
            except BlobError:
                handoff.check_wanted()
                raise
            finally:
                took_s = time.monotonic() - handoff.fetching_s
                self._book.fetched(holder, handoff.fetched_bytes, took_s)
                handoff.phases.transfer_ms += took_s * 1000
        elif here_bytes < handoff.total_bytes:
            raise BlobError(
                f"reading a snapshot of {manifest.conversation}: {handoff.total_bytes - here_bytes:,} of its "
                f"{handoff.total_bytes:,} bytes are missing or were damaged on the disk",
                hint="fetch it from another node, or save the conversation again",
                reason="chunks missing",
            )
        else:
            handoff.phases.transfer_ms += since_ms(started_s)
        landing.finish()
        handoff.phases.decode_ms = landing.busy_s * 1000 / self._decoders


def _silent(holder: str, doing: str, ttl_ms: int) -> BlobError:
    return BlobError(
        f"{doing}: {holder} has not answered in {ttl_ms / 1000:g} s",
        hint="is that its name, and is its model runner up? `mindstream status` shows who is there",
        field="holder",
        reason="holder silent",
    )
