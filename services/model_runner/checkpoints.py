"""Checkpoints of key moments: snapshots that nobody had to ask for, within a budget.

What a moment is says ``moments``. Its state is copied on the worker's thread right after the token that decided
something was chosen, which is then the pending one: it has not been read, so that the answer can be gone on with from
there by any other token as well. Only what no earlier checkpoint has is copied and written: whole blocks of the same
cache are taken over. One checkpoint at a time is being written; a moment that comes meanwhile is passed over and
counted. They are encoded losslessly, sealed for this node alone until another asks for one, and not announced.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future
from weakref import WeakKeyDictionary

from edge.config import SnapshotConfig
from edge.snapshot_store import SnapshotStore
from protocol.errors import BlobError, MindstreamError, SnapshotRefused
from protocol.identity import Identity, digest
from protocol.manifest import SignedManifest, SnapshotManifest, seal_manifest
from protocol.provenance import add_statement
from protocol.sealing import DataKey, wrap_key
from services.model_runner import moments, snapshot
from services.model_runner.answers import Answer
from services.model_runner.blocks import encode_part
from services.model_runner.codecs.base import block_layouts
from services.model_runner.codecs.lossless import Lossless
from services.model_runner.conversations import Conversation
from services.model_runner.encoding import Encoded
from services.model_runner.engine import KVCache, Logits
from services.model_runner.generation import GeneratedToken
from services.model_runner.memory import MIB
from services.model_runner.rounds import Loaded, Report
from services.model_runner.saving import Saving
from services.model_runner.timeline import Timeline

log = logging.getLogger(__name__)


class Checkpoints:
    """Takes checkpoints, and thins them.

    Args:
        report: called with the name of a counter, and what happened, to be said (or nothing).
    """

    def __init__(
        self,
        settings: SnapshotConfig,
        identity: Identity,
        saving: Saving,
        timeline: Timeline,
        store: SnapshotStore,
        report: Report,
    ) -> None:
        self._settings = settings
        self._identity = identity
        self._saving = saving
        self._timeline = timeline
        self._store = store
        self._report = report
        self._watches: WeakKeyDictionary[Conversation, moments.Watch] = WeakKeyDictionary()
        self._sealed: WeakKeyDictionary[Conversation, snapshot.Sealed] = WeakKeyDictionary()
        self._writing: Future[None] | None = None

    def watch(self, loaded: Loaded, answer: Answer, generated: GeneratedToken, logits: Logits) -> None:
        """Look at a token that has just become the pending one; on the worker's thread. Raises nothing."""
        if not self._settings.moments or not answer.conversation.keep or answer.state.finish_reason:
            return
        try:
            self._watch(loaded, answer, generated, logits)
        except Exception as error:
            log.exception("watching %s for key moments failed", answer.conversation.name)
            self._report("failed.moment", f"a checkpoint of {answer.conversation.name} was not taken: {error}")

    def _watch(self, loaded: Loaded, answer: Answer, generated: GeneratedToken, logits: Logits) -> None:
        conversation, salience = answer.conversation, answer.run.ask.salience
        found = self._watches.get(conversation)
        if found is None:
            found = self._watches[conversation] = moments.Watch(self._settings.moments_distance_tokens)
        why, surprise = found.token(generated, salience)
        if not why:
            return
        if self._writing is not None and not self._writing.done():
            self._report("dropped.moment", "")
            return
        found.taken()
        copied = self._saving.copy(
            loaded,
            conversation,
            moment=moments.moment(why, surprise, salience, generated, logits),
            sealed=self._sealed.get(conversation),
        )
        cache = conversation.state.cache
        self._writing = self._saving.later(lambda: self._write(conversation, copied, cache))

    # --- on the thread that saves ---------------------------------------------------------------------------------

    def _write(self, conversation: Conversation, copied: snapshot.Copied, cache: KVCache) -> None:
        name = copied.conversation
        try:
            if self._saving.must_change_key(copied):
                conversation.key = DataKey.generate()
                self._sealed.pop(conversation, None)
                self._report("dropped.moment", "")  # what it took over is sealed with the other key
                return
            codec = Lossless()
            layouts = block_layouts(copied.spec, len(copied.tokens) - 1, copied.kept)
            parts = {part.place: encode_part(codec, copied.spec, part, layouts) for part in copied.parts}
            written = self._saving.write(
                copied, Encoded(codec, parts, None, []), lambda manifest: self._sign(manifest, copied.key)
            )
            self._sealed[conversation] = snapshot.Sealed.after(cache, written.manifest)
            self._report("saved.moment", "")
            self.thin()
        except MindstreamError as error:
            self._sealed.pop(conversation, None)
            if isinstance(error, SnapshotRefused):  # what it took over was thinned or removed: the next one is whole
                self._report("dropped.moment", "")
                return
            self._report("failed.moment", f"a checkpoint of {name} was not taken: {error}")

    def _sign(self, manifest: SnapshotManifest, key: DataKey) -> SignedManifest:
        """For this node alone: who asks for it later gets the key then."""
        own = self._identity.sealing
        signed = seal_manifest(self._identity, manifest)
        signed.wraps = [wrap_key(self._identity, key, own.recipient, own.public_key)]
        signed.provenance = add_statement(self._identity, [], digest(signed.manifest), "created")
        return signed

    def thin(self) -> None:
        """Remove the checkpoints beyond the budget; those with a label, and those of other nodes, stay."""
        kept = [
            point.kept
            for point in self._timeline.points()
            if point.automatic and not point.label and point.creator == self._identity.node
        ]
        settings = self._settings
        gone = moments.to_thin(kept, settings.moments_count, settings.moments_mib * MIB, time.time_ns() // 1000)
        for each in gone:
            try:
                self._store.remove(each.snapshot)
                self._report("thinned.moment", "")
            except BlobError:
                return  # a snapshot is being saved or fetched: with the next one
            except MindstreamError as error:
                log.warning("the checkpoint %s could not be removed: %s", each.snapshot[:12], error)
