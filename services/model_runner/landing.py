"""Where a snapshot's chunks land: on the disk, and at once in the KV cache that is being put together.

The answer to a resume does not wait for the disk. A chunk is written as it comes, so that a transfer that is cut goes
on where it was, and is synced after the answer, before the manifest is put that names it: the store never holds a
snapshot whose chunks a power cut could take.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor, wait

from edge.snapshot_store import SnapshotStore
from protocol.errors import MindstreamError, ModelError, StorageError
from protocol.layout import ChunkRef
from protocol.manifest import SnapshotManifest
from services.model_runner.intake import Intake

log = logging.getLogger(__name__)

MOST_WAITING = 32
"""Chunks that have come and are not worked on yet; then the receiver waits."""


class Landing:
    """Takes chunks as a ``ChunkTarget`` of ``BlobReceiver``, and hands them on to threads.

    Args:
        intake: decrypts and decodes them.
        workers: threads that do so.
    """

    def __init__(self, store: SnapshotStore, manifest: SnapshotManifest, intake: Intake, workers: ThreadPoolExecutor):
        self._store = store
        self._intake = intake
        self._workers = workers
        self._refs = manifest.chunks
        self._places: dict[bytes, list[int]] = defaultdict(list)
        for index, ref in enumerate(self._refs):
            self._places[ref.digest].append(index)
        self._landed: set[bytes] = set()
        self._unsynced: list[ChunkRef] = []
        self._new: list[ChunkRef] = []
        """Those that were not on the disk before."""
        self._room = threading.Semaphore(MOST_WAITING)
        self._changed = threading.Condition()
        self._under_way = 0
        self._failure: MindstreamError | None = None
        self._failed = False
        self.busy_s = 0.0
        """That threads have worked on chunks, all together."""

    # --- as a target ----------------------------------------------------------------------------------------

    def has(self, ref: ChunkRef) -> bool:
        """Whether a chunk has landed."""
        return ref.digest in self._landed

    def put_chunk(self, ref: ChunkRef, data: bytes | memoryview) -> None:
        """Take a chunk that was verified. Raises what went wrong with an earlier one: SnapshotRefused, StorageError."""
        self._check()
        self._room.acquire()
        with self._changed:
            self._under_way += 1
            self._landed.add(ref.digest)
        self._workers.submit(self._work, ref, data).add_done_callback(self._done)

    # --- from this disk -------------------------------------------------------------------------------------

    def take_stored(self) -> int:
        """Take in what is on this disk already; the bytes that were whole. What is damaged there is removed.

        Raises SnapshotRefused, StorageError.
        """
        todo = [(index, ref) for index, ref in enumerate(self._refs) if self._store.has(ref)]
        jobs = [self._workers.submit(self._take_stored, index, ref) for index, ref in todo]
        wait(jobs)
        return sum(job.result() for job in jobs)

    def _take_stored(self, index: int, ref: ChunkRef) -> int:
        started_s = time.perf_counter()
        if self._failed:
            return 0
        data = self._store.verified_chunk(ref, index)
        if data is None:
            return 0
        try:
            self._intake.put(index, data)
        except MindstreamError:
            self._failed = True
            raise
        with self._changed:
            self._landed.add(ref.digest)
            self.busy_s += time.perf_counter() - started_s
        return len(data)

    # --- the rest -------------------------------------------------------------------------------------------

    def _work(self, ref: ChunkRef, data: bytes | memoryview) -> None:
        started_s = time.perf_counter()
        for index in self._places[ref.digest]:
            self._intake.put(index, data)
        if not self._store.has(ref):
            self._new.append(ref)
        self._store.put_chunk(ref, data, sync=False)
        with self._changed:
            self.busy_s += time.perf_counter() - started_s
            self._unsynced.append(ref)

    def _done(self, job: Future[None]) -> None:
        error = None if job.cancelled() else job.exception()
        self._room.release()
        with self._changed:
            self._under_way -= 1
            if isinstance(error, MindstreamError):
                self._failure = self._failure or error
            elif error is not None:
                self._failure = self._failure or ModelError(f"taking a chunk in: {type(error).__name__}: {error}")
            self._changed.notify_all()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def finish(self) -> None:
        """Wait until all that has landed is worked on. Raises what went wrong with a chunk."""
        self.abandon()
        self._check()

    def abandon(self) -> None:
        """Wait until nothing is worked on any more; nothing may land from now on. What has come stays, for another try;
        not where the disk is full, which would stay full of it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._under_way)
        if isinstance(self._failure, StorageError):
            while self._new:
                self._store.drop_chunk(self._new.pop())

    def sync(self) -> None:
        """Have all that has landed on the disk. Raises StorageError."""
        with self._changed:
            refs, self._unsynced = self._unsynced, []
        self._store.sync_chunks(refs)
