"""Conversations: what of them outlives the process, and which have their KV cache in memory.

Tokens, messages and the sampler's state are committed at the end of every run, and now and then in the middle of one
(a checkpoint, so that a long answer is not lost with the process). A cache that had to make room is parked on disk
and comes back bit for bit; where that cannot be, and after a restart, the tokens are read again (close, not
bit-equal), and the counters say so. A snapshot is the exact way to keep one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from edge.db import Database, Schema, fetch_all, fetch_one
from protocol.errors import ConversationUnknown, ModelError
from protocol.messages import ChatMessage
from protocol.sealing import DataKey
from services.model_runner import snapshot
from services.model_runner.engine import Engine
from services.model_runner.generation import GenerationSettings, GenerationState, begin
from services.model_runner.parking import Fetched, Parking
from services.model_runner.sampling import Sampler

Evicted = Literal["parked", "tokens", "gone"]
"""What is left of a conversation whose cache had to go: the cache on disk, its tokens, or nothing."""

CONVERSATIONS = Schema(
    "conversations",
    0x4D536376,  # "MScv"
    (
        """
        CREATE TABLE conversations (
            name TEXT PRIMARY KEY,
            tokenizer BLOB NOT NULL,    -- digest: token ids mean nothing to another tokenizer
            record BLOB NOT NULL,       -- msgpack of Record
            updated_us INTEGER NOT NULL
        );
        """,
        """
        CREATE TABLE checkpoints (      -- of answers under way
            name TEXT PRIMARY KEY,
            tokenizer BLOB NOT NULL,
            record BLOB NOT NULL        -- msgpack of Record; last_command is the ask that is being answered
        );
        """,
    ),
)


class Record(msgspec.Struct):
    """What is kept of a conversation on disk."""

    tokens: list[int]
    """All of them, the pending one last."""
    messages: list[ChatMessage]
    turn_start: int
    """Where in ``tokens`` the present answer begins."""
    new_tokens: int
    finish_reason: str
    sampler: dict[str, Any]
    settings: GenerationSettings
    capacity_tokens: int
    last_command: str = ""
    """The ask that the present answer was given to: carried out again after a crash, it is not answered twice."""
    constrained_tokens: int = 0
    data_key: bytes = b""
    """Secret: what its snapshots are sealed with, so that they share their blocks."""
    parent: bytes = b""
    """Digest of the snapshot that it was saved as last, or resumed from; empty when there is none."""
    salient: list[tuple[int, float]] = []
    """As ``Conversation.salient``."""


class Conversation:
    """One conversation in memory."""

    def __init__(
        self,
        name: str,
        state: GenerationState,
        messages: list[ChatMessage],
        turn_start: int,
        *,
        key: DataKey | None = None,
        parent: bytes = b"",
        salient: Sequence[tuple[int, float]] = (),
    ) -> None:
        self.name = name
        self.key = key or DataKey.generate()
        self.parent = parent
        self.state = state
        self.messages = messages
        self.turn_start = turn_start
        self.salient = list(salient)
        """From which token on what was said had which salience, 0 to 1; none before the first."""
        self.last_command = ""
        self.keep = True
        """Whether it is kept on disk; else it goes when its memory is wanted."""
        self.whole_chunks: list[bytes] = []
        """Keys (``prefixes.chunk_keys``) of the chunks at its beginning that its cache has from whole chunks of
        prefill."""
        self.foreign = False
        """Whether some of these came from the pool on another node's word: what follows them is not put there."""
        self.closed = False
        """Its cache is gone."""

    def note_salience(self, start: int, salience: float) -> None:
        """From token ``start`` on a run's ``salience`` holds."""
        if salience != (self.salient[-1][1] if self.salient else 0.0):
            self.salient.append((start, salience))

    def close(self) -> None:
        """Give the cache's memory back."""
        self.closed = True
        self.state.cache.close()

    def record(self, command: str = "") -> Record:
        """What is to be kept on disk; ``command`` is the ask that is being answered, if one is."""
        state = self.state
        return Record(
            tokens=state.tokens,
            messages=self.messages,
            turn_start=self.turn_start,
            new_tokens=state.new_tokens,
            finish_reason=state.finish_reason,
            sampler=state.sampler.to_state(),
            settings=state.settings,
            capacity_tokens=state.cache.capacity_tokens,
            last_command=command or self.last_command,
            constrained_tokens=state.constrained_tokens,
            data_key=self.key.secret,
            parent=self.parent,
            salient=self.salient,
        )


class History(NamedTuple):
    """What a conversation's next turn builds on."""

    tokens: list[int]
    """All of them, the pending one last."""
    messages: list[ChatMessage]

    @property
    def chats(self) -> bool:
        """Whether it speaks in messages, by the model's chat template; else it is plain text."""
        return bool(self.messages)


def unknown(name: str) -> ConversationUnknown:
    """For a conversation that is not here."""
    return ConversationUnknown(
        f"looking for conversation {name!r}: this node has none of that name",
        hint="begin it with a message, or hand it off from the node that has it",
        field="conversation",
        reason="unknown",
    )


class Conversations:
    """The conversations of one node and one model. Used by the worker thread alone, but for ``names`` and what says
    otherwise.

    Args:
        db: opened with the schema ``CONVERSATIONS``.
        engine: the model that they speak with.
        in_memory: how many may have a KV cache at one time; the one unused for longest goes first.
        now_us: the wall clock, for people.
        on_evict: called with the name of a conversation whose cache had to go, and what is left of it.
        parking: where their caches go; None: nowhere.
    """

    def __init__(
        self,
        db: Database,
        engine: Engine,
        *,
        in_memory: int,
        now_us: Callable[[], int],
        on_evict: Callable[[str, Evicted], None],
        parking: Parking | None = None,
    ) -> None:
        self._db = db
        self._engine = engine
        self._in_memory = in_memory
        self._now_us = now_us
        self._on_evict = on_evict
        self.parking = parking
        self._live: OrderedDict[str, Conversation] = OrderedDict()
        self.in_use: set[str] = set()
        """Conversations that are being answered: they stay in memory, or two states of one would come to be."""
        with db.read("looking for answers that were cut short") as connection:
            self._checkpoints = {name for (name,) in fetch_all(connection, "SELECT name FROM checkpoints")}

    def names(self) -> list[str]:
        """Every conversation on this node, the newest first."""
        with self._db.read("listing conversations") as connection:
            return [
                name for (name,) in fetch_all(connection, "SELECT name FROM conversations ORDER BY updated_us DESC")
            ]

    # --- looking --------------------------------------------------------------------------------------------

    def live(self, name: str) -> Conversation | None:
        """A conversation that is in memory."""
        known = self._live.get(name)
        if known is not None:
            self._live.move_to_end(name)
        return known

    def history(self, name: str) -> History | None:
        """What a conversation's next turn builds on, without taking it into memory. Raises ModelError."""
        known = self._live.get(name)
        if known is not None:
            return History(known.state.tokens, known.messages)
        record = self._record("conversations", name)
        return None if record is None else History(record.tokens, record.messages)

    def find(self, name: str) -> Conversation | None:
        """A conversation, from memory or from its tokens on disk (its cache is then empty until it is used)."""
        known = self.live(name)
        if known is not None:
            return known
        record = self._record("conversations", name)
        return None if record is None else self.hold(self._of(name, record))

    def kept(self, name: str) -> Conversation | None:
        """A conversation as it is on disk, its cache empty; it is not taken into memory. The caller's to close."""
        record = self._record("conversations", name)
        return None if record is None else self._of(name, record)

    def get(self, name: str) -> Conversation:
        """Like find(); raises ConversationUnknown."""
        found = self.find(name)
        if found is None:
            raise unknown(name)
        return found

    def idle(self) -> list[Conversation]:
        """Those in memory that are not being answered, the one unused for longest first."""
        return [each for name, each in self._live.items() if name not in self.in_use]

    def busy(self) -> list[Conversation]:
        """Those in memory that are being answered."""
        return [each for name, each in self._live.items() if name in self.in_use]

    def _record(self, table: str, name: str) -> Record | None:
        with self._db.read(f"reading conversation {name}") as connection:
            row = fetch_one(connection, f"SELECT tokenizer, record FROM {table} WHERE name = ?", (name,))
        if row is None:
            return None
        if row[0] != self._engine.spec.digests.tokenizer:
            raise ModelError(
                f"going on with conversation {name!r}: it was held with a model of another tokenizer",
                hint="begin a new conversation, or start the model runner with that model",
                reason="other tokenizer",
            )
        return msgspec.msgpack.decode(row[1], type=Record)

    def _of(self, name: str, record: Record) -> Conversation:
        capacity = min(record.capacity_tokens, self._engine.spec.context_tokens)
        state = begin(self._engine, record.tokens, settings=record.settings, capacity_tokens=capacity)
        state.sampler = Sampler.from_state(record.sampler)
        state.new_tokens = record.new_tokens
        state.finish_reason = record.finish_reason
        state.constrained_tokens = record.constrained_tokens
        key = DataKey(record.data_key) if record.data_key else None
        conversation = Conversation(
            name, state, record.messages, record.turn_start, key=key, parent=record.parent, salient=record.salient
        )
        conversation.last_command = record.last_command
        return conversation

    # --- memory ---------------------------------------------------------------------------------------------

    def hold(self, conversation: Conversation) -> Conversation:
        """Keep it in memory, in place of any other of its name, making room if need be."""
        before = self._live.get(conversation.name)
        if before is not None and before is not conversation:
            before.close()
        self._live[conversation.name] = conversation
        self._live.move_to_end(conversation.name)
        while len(self._live) > self._in_memory:
            idle = next((each for each in self.idle() if each is not conversation), None)
            if idle is None:
                break
            self.evict(idle)
        return conversation

    def evict(self, conversation: Conversation) -> None:
        """Free the memory of an idle one: its cache is parked where it can be."""
        del self._live[conversation.name]
        left: Evicted = "tokens" if conversation.keep else "gone"
        if conversation.keep and self.parking is not None and conversation.state.prefilled:
            whole = [key.hex() for key in conversation.whole_chunks]
            extra = {"whole_chunks": whole, "foreign": conversation.foreign}
            copied = snapshot.copy(
                self._engine,
                conversation.state,
                conversation=conversation.name,
                creator=self.parking.node,
                key=conversation.key,
                extra=extra,
            )
            if self.parking.park(copied):
                left = "parked"
        conversation.close()
        self._on_evict(conversation.name, left)

    def restore(self, fetched: Fetched) -> Conversation:
        """Take a parked conversation into memory. Raises SnapshotRefused when it is of another model or numerics, or
        not of the tokens that were kept."""
        name = fetched.manifest.conversation
        record = self._record("conversations", name)
        reason = fetched.found.reason
        if record is None or reason:
            raise snapshot.refused(fetched.manifest, "fingerprint", reason or "the conversation is not kept any more")
        if fetched.found.tokens != record.tokens:
            raise snapshot.refused(fetched.manifest, "tokens", "the conversation has gone on since")
        state = snapshot.restore(self._engine, fetched.found).state
        state.sampler = Sampler.from_state(record.sampler)
        state.settings, state.new_tokens, state.finish_reason = record.settings, record.new_tokens, record.finish_reason
        state.constrained_tokens = record.constrained_tokens
        conversation = Conversation(
            name,
            state,
            record.messages,
            record.turn_start,
            key=fetched.key,
            parent=record.parent,
            salient=record.salient,
        )
        conversation.last_command = record.last_command
        extra = snapshot.extra_of(fetched.manifest, fetched.private)
        conversation.whole_chunks = [bytes.fromhex(key) for key in extra["whole_chunks"]]
        conversation.foreign = extra.get("foreign", True)
        return self.hold(conversation)

    def forget(self, name: str) -> None:
        """Let go of what is in memory of it: it is again as it was kept last."""
        known = self._live.pop(name, None)
        if known is not None:
            known.close()

    # --- keeping --------------------------------------------------------------------------------------------

    def encode(self, conversation: Conversation, command: str = "") -> bytes:
        """What is to be kept of it, for ``keep`` or ``keep_checkpoints``."""
        return msgspec.msgpack.encode(conversation.record(command))

    def save(self, conversation: Conversation) -> None:
        """Commit it. Raises StorageError."""
        self.keep(conversation.name, self.encode(conversation))

    def keep(self, name: str, record: bytes) -> None:
        """Commit an encoded conversation, in place of any checkpoint of it. On any thread. Raises StorageError."""
        with self._db.transaction(f"keeping conversation {name}") as connection:
            connection.execute(
                "INSERT INTO conversations (name, tokenizer, record, updated_us) VALUES (?1, ?2, ?3, ?4)"
                " ON CONFLICT (name) DO UPDATE SET tokenizer = ?2, record = ?3, updated_us = ?4",
                (name, self._engine.spec.digests.tokenizer, record, self._now_us()),
            )
            if name in self._checkpoints:
                connection.execute("DELETE FROM checkpoints WHERE name = ?", (name,))
        self._checkpoints.discard(name)

    def keep_checkpoints(self, records: dict[str, bytes]) -> None:
        """Commit how far answers under way have come. On any thread. Raises StorageError."""
        tokenizer = self._engine.spec.digests.tokenizer
        with self._db.transaction(f"keeping {len(records)} answers under way") as connection:
            connection.executemany(
                "INSERT INTO checkpoints (name, tokenizer, record) VALUES (?1, ?2, ?3)"
                " ON CONFLICT (name) DO UPDATE SET tokenizer = ?2, record = ?3",
                [(name, tokenizer, record) for name, record in records.items()],
            )
        self._checkpoints.update(records)

    def checkpoint(self, name: str, command: str) -> Conversation | None:
        """The conversation in the middle of the answer to ``command``, as far as it was kept, its cache empty."""
        record = self._record("checkpoints", name) if name in self._checkpoints else None
        return None if record is None or record.last_command != command else self._of(name, record)

    def drop_checkpoint(self, name: str) -> None:
        """The answer under way has come to nothing. On any thread. Raises StorageError."""
        if name in self._checkpoints:
            with self._db.transaction(f"forgetting half an answer of {name}") as connection:
                connection.execute("DELETE FROM checkpoints WHERE name = ?", (name,))
            self._checkpoints.discard(name)
