"""Conversations: what of them outlives the process, and which have their KV cache in memory.

Tokens, messages and the sampler's state are committed at the end of every run. A cache is not: after a restart, or
when it had to make room, the tokens are read again (close, not bit-equal), and the counters say so. A snapshot is
the exact way to keep one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import msgspec

from edge.db import Database, Schema, fetch_all, fetch_one
from protocol.errors import ConversationUnknown, ModelError
from protocol.messages import ChatMessage
from services.model_runner.engine import Engine
from services.model_runner.generation import GenerationSettings, GenerationState, begin
from services.model_runner.sampling import Sampler

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


class Conversation:
    """One conversation in memory."""

    def __init__(self, name: str, state: GenerationState, messages: list[ChatMessage], turn_start: int) -> None:
        self.name = name
        self.state = state
        self.messages = messages
        self.turn_start = turn_start
        self.last_command = ""
        self.keep = True
        """Whether it is kept on disk; else it goes when its memory is wanted."""

    @property
    def chats(self) -> bool:
        """Whether it speaks in messages, by the model's chat template; else it is plain text."""
        return bool(self.messages)

    def record(self) -> Record:
        """What is to be kept on disk."""
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
            last_command=self.last_command,
        )


def unknown(name: str) -> ConversationUnknown:
    """For a conversation that is not here."""
    return ConversationUnknown(
        f"looking for conversation {name!r}: this node has none of that name",
        hint="begin it with a message, or hand it off from the node that has it",
        field="conversation",
        reason="unknown",
    )


class Conversations:
    """The conversations of one node and one model. Used by the worker thread alone, but for ``names``.

    Args:
        db: opened with the schema ``CONVERSATIONS``.
        engine: the model that they speak with.
        in_memory: how many may have a KV cache at one time; the one unused for longest goes first.
        now_us: the wall clock, for people.
        on_evict: called with the name of a conversation whose cache had to go.
    """

    def __init__(
        self,
        db: Database,
        engine: Engine,
        *,
        in_memory: int,
        now_us: Callable[[], int],
        on_evict: Callable[[str], None],
    ) -> None:
        self._db = db
        self._engine = engine
        self._in_memory = in_memory
        self._now_us = now_us
        self._on_evict = on_evict
        self._live: OrderedDict[str, Conversation] = OrderedDict()
        self.in_use: set[str] = set()
        """Conversations that are being answered: they stay in memory, or two states of one would come to be."""

    def names(self) -> list[str]:
        """Every conversation on this node, the newest first."""
        with self._db.read("listing conversations") as connection:
            return [
                name for (name,) in fetch_all(connection, "SELECT name FROM conversations ORDER BY updated_us DESC")
            ]

    def find(self, name: str) -> Conversation | None:
        """A conversation, from memory or from its tokens on disk (its cache is then empty until it is used)."""
        known = self._live.get(name)
        if known is not None:
            self._live.move_to_end(name)
            return known
        with self._db.read(f"reading conversation {name}") as connection:
            row = fetch_one(connection, "SELECT tokenizer, record FROM conversations WHERE name = ?", (name,))
        if row is None:
            return None
        if row[0] != self._engine.spec.digests.tokenizer:
            raise ModelError(
                f"going on with conversation {name!r}: it was held with a model of another tokenizer",
                hint="begin a new conversation, or start the model runner with that model",
                reason="other tokenizer",
            )
        record = msgspec.msgpack.decode(row[1], type=Record)
        capacity = min(record.capacity_tokens, self._engine.spec.context_tokens)
        state = begin(self._engine, record.tokens, settings=record.settings, capacity_tokens=capacity)
        state.sampler = Sampler.from_state(record.sampler)
        state.new_tokens = record.new_tokens
        state.finish_reason = record.finish_reason
        conversation = Conversation(name, state, record.messages, record.turn_start)
        conversation.last_command = record.last_command
        return self.hold(conversation)

    def get(self, name: str) -> Conversation:
        """Like find(); raises ConversationUnknown."""
        found = self.find(name)
        if found is None:
            raise unknown(name)
        return found

    def hold(self, conversation: Conversation) -> Conversation:
        """Keep it in memory, in place of any other of its name, making room if need be."""
        before = self._live.get(conversation.name)
        if before is not None and before is not conversation:
            before.state.cache.close()
        self._live[conversation.name] = conversation
        self._live.move_to_end(conversation.name)
        while len(self._live) > self._in_memory:
            name = next((each for each in self._live if each != conversation.name and each not in self.in_use), None)
            if name is None:
                break
            self._live.pop(name).state.cache.close()
            self._on_evict(name)
        return conversation

    def forget(self, name: str) -> None:
        """Let go of what is in memory of it: it is again as it was kept last."""
        known = self._live.pop(name, None)
        if known is not None:
            known.state.cache.close()

    def save(self, conversation: Conversation) -> None:
        """Commit it. Raises StorageError."""
        with self._db.transaction(f"keeping conversation {conversation.name}") as connection:
            connection.execute(
                "INSERT INTO conversations (name, tokenizer, record, updated_us) VALUES (?1, ?2, ?3, ?4)"
                " ON CONFLICT (name) DO UPDATE SET tokenizer = ?2, record = ?3, updated_us = ?4",
                (
                    conversation.name,
                    self._engine.spec.digests.tokenizer,
                    msgspec.msgpack.encode(conversation.record()),
                    self._now_us(),
                ),
            )
