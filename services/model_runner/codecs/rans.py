"""Entropy coding with tables that both ends have: interleaved rANS, vectorised over its lanes.

Asymmetric numeral systems (J. Duda, arXiv 1311.2540) with 32-bit states, 16-bit words and 12-bit probabilities
(F. Giesen, arXiv 1402.3392): at most one word moves per lane and symbol, so that a numpy call serves all lanes at once.
A message is a list of runs; all symbols of a run have the same table, and each lane takes one symbol of a run.

No table is in the message. Every lane ends in the state in which the encoder began, so most damage is found out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.model_runner.codecs.base import Array, Bytes, Floats, Reader, number

PROBABILITY_BITS = 12
TOTAL = 1 << PROBABILITY_BITS
MOST_SYMBOLS = 255
"""Of a table, the last being the escape."""
_LOW = 1 << 16
_WORD_BITS = 16

Words = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Table:
    """Frequencies of the symbols 0 to n − 1, and what each stands for."""

    frequencies: Words
    """(n,), each at least 1, ``TOTAL`` together."""
    values: Floats
    """(n,): what a decoder puts for each; the escape's is 0."""
    starts: Words
    entries: Words
    """(TOTAL,): of each slot, its symbol's frequency << 16 | the slot's distance from the symbol's start."""
    symbols: Bytes
    """(TOTAL,)."""
    slot_values: Floats
    """(TOTAL,)."""

    @classmethod
    def of(cls, frequencies: Sequence[int] | Array, values: Sequence[float] | Array) -> Table:
        """Raises ValueError unless the frequencies make a table."""
        counts = np.asarray(frequencies, np.int64)
        if not 2 <= len(counts) <= MOST_SYMBOLS or counts.min() < 1 or counts.sum() != TOTAL:
            raise ValueError(f"{len(counts)} frequencies of {counts.sum()} together, at least {counts.min()}")
        if len(values) != len(counts):
            raise ValueError(f"{len(values)} values for {len(counts)} symbols")
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        symbols = np.repeat(np.arange(len(counts), dtype=np.uint8), counts)
        entries = (counts[symbols] << 16) | (np.arange(TOTAL) - starts[symbols])
        with np.errstate(over="ignore"):  # what is then infinite is refused by whoever reads a basis
            own = np.asarray(values, np.float32)
        return cls(
            counts.astype(np.uint32),
            own,
            starts.astype(np.uint32),
            entries.astype(np.uint32),
            symbols,
            own[symbols],
        )


def scaled_frequencies(counts: Array) -> list[int]:
    """Frequencies of ``TOTAL`` together for symbols seen ``counts`` times, at least 1 each."""
    weights = np.asarray(counts, np.float64)
    room = TOTAL - len(weights)
    found = 1 + np.floor(weights / weights.sum() * room).astype(np.int64)
    found[int(found.argmax())] += TOTAL - int(found.sum())
    return [int(each) for each in found]


@dataclass(frozen=True)
class Run:
    """Symbols with one table: as many as ``lanes``."""

    table: int
    lanes: int


def encode(runs: Sequence[Run], tables: Sequence[Table], symbols: Bytes) -> bytes:
    """All symbols of ``runs``, one run after another, as bytes."""
    lanes = max((run.lanes for run in runs), default=0)
    states = np.full(lanes, _LOW, np.uint64)
    words: list[Array] = []
    at = len(symbols)
    for run in reversed(runs):
        own = symbols[at - run.lanes : at]
        at -= run.lanes
        table = tables[run.table]
        frequency = table.frequencies[own].astype(np.uint64)
        part = states[: run.lanes]
        full = np.flatnonzero(part >= frequency << np.uint64(32 - PROBABILITY_BITS))
        moved = part[full]
        words.append(moved.astype("<u2"))
        part[full] = moved >> np.uint64(_WORD_BITS)
        high, low = np.divmod(part, frequency)
        part[:] = (high << np.uint64(PROBABILITY_BITS)) + low + table.starts[own]
    words.reverse()
    body = np.concatenate(words) if words else np.zeros(0, "<u2")
    return b"".join([number(len(body)), states.astype("<u4").tobytes(), body.tobytes()])


def decode(reader: Reader, runs: Sequence[Run], tables: Sequence[Table]) -> Array:
    """The slot of each symbol, uint16, in the order in which they were encoded; ``Table.symbols`` and
    ``Table.slot_values`` say what a slot stands for. Raises SnapshotRefused."""
    lanes = max((run.lanes for run in runs), default=0)
    total = sum(run.lanes for run in runs)
    # A symbol moves one word at most.
    count = reader.number("words", total)
    states = reader.array("states", "<u4", (lanes,)).astype(np.uint32)
    stream = reader.array("words", "<u2", (count,)).astype(np.uint32)
    slots = np.empty(total, np.uint16)
    slot = np.empty(lanes, np.uint32)
    entry = np.empty(lanes, np.uint32)
    at = word = 0
    for run in runs:
        own = run.lanes
        part, taken, found = states[:own], slot[:own], entry[:own]
        np.bitwise_and(part, TOTAL - 1, out=taken)
        slots[at : at + own] = taken
        at += own
        np.take(tables[run.table].entries, taken, out=found, mode="clip")
        part >>= PROBABILITY_BITS
        part *= found >> 16
        found &= 0xFFFF
        part += found
        low = np.flatnonzero(part < _LOW)
        if word + len(low) > count:
            raise reader.refuse("words", "they end before the symbols do")
        part[low] = (part[low] << _WORD_BITS) | stream[word : word + len(low)]
        word += len(low)
    if word != count or (states != _LOW).any():
        raise reader.refuse("words", "the states at the end are not those at the beginning")
    return slots
