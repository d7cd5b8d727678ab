"""Nodes with memory logs in real databases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest

from edge.db import open_database
from protocol.entries import SignedEntry
from protocol.identity import Identity, Keyring
from protocol.ids import uuid7
from protocol.messages import MemoryPut, MemoryStored
from services.memory_store.log import MEMORY_LOG_SCHEMA, MemoryLog


class Put(NamedTuple):
    """A put, as much of a received message as the log looks at."""

    id: str
    source: str
    data: MemoryPut


def put_of(text: str, *, id: str = "", scope: str = "everyone") -> Put:
    return Put(id or uuid7(), "tomato/cli", MemoryPut(text=text, scope=scope))


@dataclass
class Node:
    """A node's name, keys and log; its clock is wound by hand."""

    identity: Identity
    folder: Path
    keyring: Keyring
    machine: bytes = b"machine 1"
    now_ms: int = 1_800_000_000_000
    log: MemoryLog = field(init=False)

    def __post_init__(self) -> None:
        self.open()

    def open(self) -> None:
        db = open_database(self.folder / "memory.db", schema=MEMORY_LOG_SCHEMA)
        self.log = MemoryLog(
            db,
            self.identity,
            lambda: self.keyring,
            now_ms=lambda: self.now_ms,
            machine=self.machine,
            clock_synced=lambda: True,
        )

    def reopen(self) -> None:
        """Stop and start again."""
        self.log.db.close()
        self.open()

    def put(self, *texts: str, scope: str = "everyone") -> list[MemoryStored]:
        """Store texts in one batch."""
        stored = self.log.put_many([put_of(text, scope=scope) for text in texts])
        assert all(isinstance(each, MemoryStored) for each in stored), stored
        return [each for each in stored if isinstance(each, MemoryStored)]

    def publish(self) -> list[SignedEntry]:
        """All that is still to be published, marked as published."""
        entries: list[SignedEntry] = []
        while (batch := self.log.unpublished()).entries:
            self.log.mark_published(batch)
            entries += batch.entries
        return entries


MakeNode = Callable[..., Node]


@pytest.fixture
def make_node(tmp_path: Path) -> Iterator[MakeNode]:
    """Makes nodes that trust each other."""
    nodes: list[Node] = []
    keyring = Keyring()

    def make(name: str, *, folder: Path | None = None, identity: Identity | None = None, trusted: bool = True) -> Node:
        identity = identity or Identity.generate(name)
        if trusted:
            keyring.add(name, identity.fingerprint)
        node = Node(identity, folder or tmp_path / f"{len(nodes)}-{name}", keyring)
        nodes.append(node)
        return node

    yield make
    for node in nodes:
        node.log.db.close()


@pytest.fixture
def tomato(make_node: MakeNode) -> Node:
    return make_node("tomato")


@pytest.fixture
def sprout(make_node: MakeNode) -> Node:
    return make_node("sprout")
