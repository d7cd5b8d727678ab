"""The command journal: commands that must be carried out even when the process dies, and dead letters.

A durable command is committed here before it is acknowledged, and its answer before it is sent. After a
restart ``unfinished`` gives back what was not carried out and is still worth it. A repeated command is known
by who asked and the ask's id, for longer than anything may redeliver it. The journal knows nothing of a bus.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import apsw

from edge.db import Database, Schema, fetch_all, fetch_one, fetch_value
from edge.ttl import boot_id, boottime_ms
from protocol.codec import Received

MARGIN_MS = 600_000
"""A row outlives its command's time to live by this: the longest that a redelivery is expected to take."""
MAX_ATTEMPTS = 3
"""A command that the process did not survive this often is a dead letter."""
MAX_DEAD_LETTERS = 1_000
MAX_DEAD_LETTER_BYTES = 64 * 1024 * 1024
MAX_FAILURES = 10_000
"""Messages whose failures are counted at one time; the longest forgotten go first."""
MAX_ERROR_CHARACTERS = 4_000

JOURNAL = Schema(
    "command journal",
    0x4D53636A,  # "MScj"
    (
        """
        CREATE TABLE commands (
            node TEXT NOT NULL,             -- who asked; an id is the asker's own, so both are the key
            id TEXT NOT NULL,
            type TEXT NOT NULL,
            topic TEXT NOT NULL,
            payload BLOB NOT NULL,          -- the envelope as it came; emptied once it is done
            boot_id TEXT NOT NULL,
            deadline_ms INTEGER NOT NULL,   -- CLOCK_BOOTTIME of that boot
            state TEXT NOT NULL CHECK (state IN ('received', 'done', 'failed', 'expired')),
            reply BLOB,
            attempts INTEGER NOT NULL DEFAULT 0,
            PRIMARY KEY (node, id)
        );
        CREATE INDEX commands_unfinished ON commands (state) WHERE state = 'received';
        CREATE TABLE dead_letters (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            time_us INTEGER NOT NULL,       -- Unix microseconds, for people
            topic TEXT NOT NULL,
            payload BLOB NOT NULL,
            error TEXT NOT NULL,
            attempts INTEGER NOT NULL
        );
        CREATE TABLE failures (
            key TEXT PRIMARY KEY,
            count INTEGER NOT NULL,
            touched INTEGER NOT NULL        -- grows with every count: the smallest is the longest forgotten
        );
        CREATE INDEX failures_touched ON failures (touched);
        """,
    ),
)

Acceptance = Literal["new", "running", "expired"] | bytes
"""What a command turns out to be: ``new`` (carry it out), ``running`` (it is under way, its answer will come),
``expired`` (given up: it ran out, or no process survived it), or the bytes of the answer that it had."""


class Command(NamedTuple):
    """A command to be written down."""

    received: Received
    payload: bytes
    """The envelope as it came."""
    ttl_ms: int
    """What is left of its time to live."""


class Unfinished(NamedTuple):
    """A command that a process before this one took on and did not finish."""

    topic: str
    payload: bytes
    ttl_ms: int
    """What is left of its time to live."""
    attempts: int
    """How often it is begun now, this time included."""


class Recovery(NamedTuple):
    """What a restart found."""

    commands: list[Unfinished]
    """To be carried out now, in the order in which they came."""
    expired: int
    """Not worth it any more, or of an unknown age because the machine was rebooted in between."""
    dead: int
    """Begun too often; now dead letters."""


class DeadLetter(NamedTuple):
    """A message that could not be handled, kept for a person to look at."""

    number: int
    time_us: int
    """When it was given up, Unix microseconds."""
    topic: str
    payload: bytes
    error: str
    attempts: int


class CommandJournal:
    """Durable commands and dead letters of one service. Thread-safe.

    Args:
        db: opened with the schema ``JOURNAL``.
        now_ms: CLOCK_BOOTTIME in milliseconds; injected by tests.
        boot: id of this boot; injected by tests.
    """

    def __init__(
        self,
        db: Database,
        *,
        now_ms: Callable[[], int] = boottime_ms,
        boot: str | None = None,
        max_dead_letters: int = MAX_DEAD_LETTERS,
        max_dead_letter_bytes: int = MAX_DEAD_LETTER_BYTES,
    ) -> None:
        self._db = db
        self._now_ms = now_ms
        self._boot_id = boot or boot_id()
        self._max_dead_letters = max_dead_letters
        self._max_dead_letter_bytes = max_dead_letter_bytes

    # --- commands -------------------------------------------------------------------------------------------

    def accept(self, received: Received, payload: bytes, ttl_ms: int) -> Acceptance:
        """Write one command down, or find out that it is known. On the disk when this returns.

        Raises StorageError: then it must not be acknowledged.
        """
        return self.accept_many([Command(received, payload, ttl_ms)])[0]

    def accept_many(self, commands: Sequence[Command]) -> list[Acceptance]:
        """The same for several, in one commit. Raises StorageError for all of them."""
        with self._db.transaction(f"writing down {len(commands)} commands") as connection:
            return [self._accept(connection, command) for command in commands]

    def _accept(self, connection: apsw.Connection, command: Command) -> Acceptance:
        received = command.received
        known = fetch_one(
            connection,
            "SELECT state, reply FROM commands WHERE node = ? AND id = ?",
            (received.node, received.id),
        )
        if known is not None:
            state, reply = known
            if isinstance(reply, bytes):
                return reply
            return "expired" if state == "expired" else "running"
        expired = command.ttl_ms <= 0
        connection.execute(
            "INSERT INTO commands (node, id, type, topic, payload, boot_id, deadline_ms, state)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                received.node,
                received.id,
                received.type,
                received.topic.raw,
                b"" if expired else command.payload,
                self._boot_id,
                self._now_ms() + max(0, command.ttl_ms),
                "expired" if expired else "received",
            ),
        )
        return "expired" if expired else "new"

    def finish(self, received: Received, reply: bytes, *, failed: bool = False) -> None:
        """Keep the answer, to be given again to whoever repeats the command; call it before answering.

        Args:
            reply: the encoded answer, an error's too.
            failed: whether it is an error.

        Raises StorageError: the command then counts as unfinished.
        """
        with self._db.transaction(f"keeping the answer to a {received.type}") as connection:
            connection.execute(
                "UPDATE commands SET state = ?, reply = ?, payload = x'' WHERE node = ? AND id = ?",
                ("failed" if failed else "done", reply, received.node, received.id),
            )

    def unfinished(self) -> Recovery:
        """What was taken on before this process began and not finished: called once, at the start.

        Counts each as begun once more, on the disk, before it is handed out: a command that kills the process
        every time ends as a dead letter. Raises StorageError.
        """
        commands: list[Unfinished] = []
        expired = dead = 0
        with self._db.transaction("looking for unfinished commands") as connection:
            rows = fetch_all(
                connection,
                "SELECT rowid, topic, payload, boot_id, deadline_ms, attempts FROM commands"
                " WHERE state = 'received' ORDER BY rowid",
            )
            for rowid, topic, payload, boot, deadline_ms, attempts in rows:
                left_ms = deadline_ms - self._now_ms()
                if boot != self._boot_id or left_ms <= 0:
                    expired += 1
                    self._give_up(connection, rowid, "expired")
                elif attempts + 1 > MAX_ATTEMPTS:
                    dead += 1
                    self._bury(connection, topic, payload, "the service ended each time it was begun", attempts)
                    self._give_up(connection, rowid, "expired")
                else:
                    connection.execute("UPDATE commands SET attempts = attempts + 1 WHERE rowid = ?", (rowid,))
                    commands.append(Unfinished(topic, payload, left_ms, attempts + 1))
        return Recovery(commands, expired, dead)

    @staticmethod
    def _give_up(connection: apsw.Connection, rowid: int, state: str) -> None:
        connection.execute("UPDATE commands SET state = ?, payload = x'' WHERE rowid = ?", (state, rowid))

    def purge(self) -> int:
        """Forget the commands that nobody can repeat any more; how many. Raises StorageError.

        Those of an earlier boot go once this boot is older than the margin: their age is unknown, but it is
        more than that.
        """
        now_ms = self._now_ms()
        with self._db.transaction("forgetting old commands") as connection:
            connection.execute(
                "DELETE FROM commands WHERE state <> 'received'"
                " AND (CASE WHEN boot_id = ?1 THEN deadline_ms ELSE 0 END) < ?2 - ?3",
                (self._boot_id, now_ms, MARGIN_MS),
            )
            return connection.changes()

    # --- dead letters ---------------------------------------------------------------------------------------

    def count_failure(self, key: str) -> int:
        """Count one more failure of the message that ``key`` names; how many it has had, restarts included."""
        with self._db.transaction("counting a failure") as connection:
            connection.execute(
                "INSERT INTO failures (key, count, touched)"
                " VALUES (?, 1, (SELECT coalesce(max(touched), 0) + 1 FROM failures))"
                " ON CONFLICT (key) DO UPDATE SET count = count + 1, touched = excluded.touched",
                (key,),
            )
            connection.execute(
                "DELETE FROM failures WHERE touched <= (SELECT max(touched) FROM failures) - ?", (MAX_FAILURES,)
            )
            return int(fetch_value(connection, "SELECT count FROM failures WHERE key = ?", (key,)))

    def forget_failures(self, key: str) -> None:
        """The message was handled after all, or is a dead letter now."""
        with self._db.transaction("forgetting failures") as connection:
            connection.execute("DELETE FROM failures WHERE key = ?", (key,))

    def dead_letter(self, topic: str, payload: bytes, error: BaseException | str, attempts: int) -> int:
        """Keep a message that could not be handled; how many older ones had to go for it. Raises StorageError."""
        with self._db.transaction(f"keeping a dead letter of {topic}") as connection:
            return self._bury(connection, topic, payload, str(error), attempts)

    def _bury(self, connection: apsw.Connection, topic: str, payload: bytes, error: str, attempts: int) -> int:
        connection.execute(
            "INSERT INTO dead_letters (time_us, topic, payload, error, attempts) VALUES (?, ?, ?, ?, ?)",
            (time.time_ns() // 1000, topic, payload, error[:MAX_ERROR_CHARACTERS], attempts),
        )
        # The newest always stays; going back from it, what is beyond either bound goes.
        connection.execute(
            "DELETE FROM dead_letters WHERE number IN (SELECT number FROM ("
            " SELECT number, row_number() OVER newest AS place, sum(length(payload)) OVER newest AS total"
            " FROM dead_letters WINDOW newest AS (ORDER BY number DESC))"
            " WHERE place > 1 AND (place > ? OR total > ?))",
            (self._max_dead_letters, self._max_dead_letter_bytes),
        )
        return connection.changes()

    def dead_letters(self, limit: int = 100) -> list[DeadLetter]:
        """The newest dead letters, newest first."""
        with self._db.read("reading dead letters") as connection:
            rows = fetch_all(
                connection,
                "SELECT number, time_us, topic, payload, error, attempts FROM dead_letters"
                " ORDER BY number DESC LIMIT ?",
                (limit,),
            )
            return [DeadLetter(*row) for row in rows]

    def dead_letter_counts(self) -> tuple[int, int]:
        """How many are kept, and how many were dropped ever since to stay within the bounds."""
        with self._db.read("counting dead letters") as connection:
            kept = int(fetch_value(connection, "SELECT count(*) FROM dead_letters"))
            ever = fetch_value(connection, "SELECT seq FROM sqlite_sequence WHERE name = 'dead_letters'")
            return kept, (ever or 0) - kept
