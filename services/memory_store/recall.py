"""Recall by text: BM25 over the words of a query, best first.

Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009, as SQLite's FTS5 has it
(k1 = 1.2, b = 0.75), over stemmed words. What the user wrote is words to look for and can never be query syntax.
"""

from __future__ import annotations

import time
import unicodedata

import apsw

from edge.db import Database, fetch_all, fetch_one
from protocol.entries import SCOPE_PRIVATE
from protocol.messages import MemoryHit, MemoryRecalled
from services.memory_store.chain import SEQ_BITS

MAX_TERMS = 64
"""Different words of a query that are looked for; a longer one is cut."""
MAX_REPLY_BYTES = 900 * 1024
_HIT_OVERHEAD_BYTES = 256
"""Field names, ids and numbers of one hit on the wire, rounded up."""

_ENGLISH = (
    "a about am an and any are as at be been but by can could did do does for from had has have he her him his how i"
    " if in into is it its just me my no not of on or our s she should so some t than that the their them then there"
    " these they this to us was we were what when where which who why will with would you your"
)
STOP_WORDS = frozenset(_ENGLISH.split())
"""English words that are in nearly every text: costly to rank by, and saying little."""


def match_expression(query: str) -> str:
    """The FTS5 expression for any of a query's words; empty when it has none.

    Words are cut as the index cuts them (letters, digits and marks stay, all else separates). Stop words are
    left out, unless there are no others.
    """
    cut = "".join(c if unicodedata.category(c)[0] in "LNM" else " " for c in unicodedata.normalize("NFC", query))
    words = list(dict.fromkeys(cut.lower().split()))
    telling = [word for word in words if word not in STOP_WORDS] or words
    # In quotes a word is a string to FTS5, never AND, NEAR, a column or a prefix; quotes themselves were cut away.
    return " OR ".join(f'"{word}"' for word in telling[:MAX_TERMS])


def recall(
    db: Database, query: str, limit: int, *, include_private: bool = False, max_bytes: int = MAX_REPLY_BYTES
) -> MemoryRecalled:
    """Find up to ``limit`` memories with words of ``query``, best first, equals newest first.

    Args:
        db: opened with the schema ``MEMORY_LOG_SCHEMA``.
        include_private: private memories too: only when this node itself asks.
        max_bytes: of the answer; hits from the first that does not fit on are left out and counted.

    Raises StorageError.
    """
    began_s = time.monotonic()
    expression = match_expression(query)
    hits: list[MemoryHit] = []
    truncated = 0
    if expression:
        with db.read("recalling from") as connection:
            found = _search(connection, expression, limit, include_private)
            size_bytes = 0
            for position, score in found:
                hit = _read_hit(connection, position, score)
                size_bytes += _HIT_OVERHEAD_BYTES + len(hit.text.encode()) + len(hit.conversation.encode())
                if size_bytes > max_bytes:
                    break
                hits.append(hit)
            truncated = len(found) - len(hits)
    return MemoryRecalled(hits=hits, took_ms=(time.monotonic() - began_s) * 1000, truncated=truncated)


def _search(connection: apsw.Connection, expression: str, limit: int, include_private: bool) -> list[tuple[int, float]]:
    """Position and score (greater is better), best first."""
    # The origin is in the position, so that no other table is read for the many rows that rank too low.
    hidden = "" if include_private else "AND rowid >> ?2 NOT IN (SELECT number FROM origins WHERE scope = ?3)"
    rows = fetch_all(
        connection,
        f"SELECT rowid, -rank FROM memories_fts WHERE memories_fts MATCH ?1 {hidden} ORDER BY rank LIMIT ?4",
        (expression, SEQ_BITS, SCOPE_PRIVATE, limit),
    )
    return [(int(position), float(score)) for position, score in rows]


def _read_hit(connection: apsw.Connection, position: int, score: float) -> MemoryHit:
    row = fetch_one(
        connection,
        "SELECT id, node, text, role, conversation, time_us FROM memories JOIN origins ON number = ?2"
        " WHERE position = ?1",
        (position, position >> SEQ_BITS),
    )
    assert row is not None, "the full-text index has a row that the view has not"
    identifier, node, text, role, conversation, time_us = row
    seq = position & ((1 << SEQ_BITS) - 1)
    return MemoryHit(identifier, node, seq, text, role, conversation, time_us, score)
