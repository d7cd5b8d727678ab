"""The command journal: durable commands are carried out once, also across deaths and reboots; dead letters are kept."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.db import Database, fetch_value, open_database
from edge.journal import JOURNAL, MARGIN_MS, MAX_ATTEMPTS, MAX_FAILURES, Command, CommandJournal
from edge.ttl import boot_id, boottime_ms
from protocol import codec, topics
from protocol.codec import Received
from protocol.messages import ModelGenerate


class Clock:
    """CLOCK_BOOTTIME, wound by hand."""

    def __init__(self) -> None:
        self.ms = 1_000_000

    def __call__(self) -> int:
        return self.ms


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    database = open_database(tmp_path / "journal.db", schema=JOURNAL)
    yield database
    database.close()


@pytest.fixture
def journal(db: Database, clock: Clock) -> CommandJournal:
    return CommandJournal(db, now_ms=clock, boot="boot-1")


def ask(node: str = "tomato", *, id: str = "", ttl_ms: int = 60_000) -> tuple[Received, bytes]:
    """A durable ask as it comes from the bus."""
    topic = topics.ASK.format_topic(node=node, target="sprout", service="model_runner", verb="generate")
    payload = codec.encode(ModelGenerate(conversation="c1"), source=f"{node}/cli", id=id, reply_to="cli", ttl_ms=ttl_ms)
    return codec.decode(topics.parse(topic), payload), payload


def test_a_new_command_is_new_then_running_then_answered(journal: CommandJournal) -> None:
    received, payload = ask()
    assert journal.accept(received, payload, 60_000) == "new"
    assert journal.accept(received, payload, 60_000) == "running"
    journal.finish(received, b"the answer")
    assert journal.accept(received, payload, 60_000) == b"the answer"


def test_an_error_is_an_answer_too(journal: CommandJournal) -> None:
    received, payload = ask()
    journal.accept(received, payload, 60_000)
    journal.finish(received, b"the error", failed=True)
    assert journal.accept(received, payload, 60_000) == b"the error"


def test_an_empty_answer_is_an_answer(journal: CommandJournal) -> None:
    received, payload = ask()
    journal.accept(received, payload, 60_000)
    journal.finish(received, b"")
    assert journal.accept(received, payload, 60_000) == b""


def test_a_batch_is_one_commit_and_knows_duplicates_within_itself(journal: CommandJournal, db: Database) -> None:
    first, second = ask(), ask()
    before = db.data_version()
    results = journal.accept_many([Command(*first, 60_000), Command(*second, 60_000), Command(*first, 60_000)])
    assert results == ["new", "new", "running"]
    assert db.data_version() == before + 1


def test_two_askers_may_use_one_id(journal: CommandJournal) -> None:
    mine, my_payload = ask("tomato", id="00000000-0000-7000-8000-000000000001")
    theirs, their_payload = ask("carrot", id=mine.id)
    assert journal.accept(mine, my_payload, 60_000) == "new"
    journal.finish(mine, b"for tomato")
    assert journal.accept(theirs, their_payload, 60_000) == "new"


def test_a_command_that_ran_out_is_expired_and_stays_so(journal: CommandJournal) -> None:
    received, payload = ask()
    assert journal.accept(received, payload, 0) == "expired"
    assert journal.accept(received, payload, 60_000) == "expired"
    assert journal.unfinished().commands == []


def test_after_a_restart_unfinished_commands_come_back_in_order_with_what_is_left_of_their_time(
    journal: CommandJournal, db: Database, clock: Clock
) -> None:
    asks = [ask() for _ in range(3)]
    for received, payload in asks:
        journal.accept(received, payload, 60_000)
    journal.finish(asks[1][0], b"done")
    clock.ms += 10_000
    recovery = CommandJournal(db, now_ms=clock, boot="boot-1").unfinished()
    assert [each.payload for each in recovery.commands] == [asks[0][1], asks[2][1]]
    assert [each.ttl_ms for each in recovery.commands] == [50_000, 50_000]
    assert [each.topic for each in recovery.commands] == [asks[0][0].topic.raw] * 2
    assert (recovery.expired, recovery.dead) == (0, 0)


def test_after_a_restart_what_ran_out_meanwhile_is_expired_and_counted(
    journal: CommandJournal, db: Database, clock: Clock
) -> None:
    received, payload = ask()
    journal.accept(received, payload, 60_000)
    clock.ms += 60_000
    restarted = CommandJournal(db, now_ms=clock, boot="boot-1")
    assert restarted.unfinished() == ([], 1, 0)
    assert restarted.unfinished() == ([], 0, 0)
    assert restarted.accept(received, payload, 1) == "expired"


def test_after_a_reboot_the_age_is_unknown_and_that_is_expired(
    journal: CommandJournal, db: Database, clock: Clock
) -> None:
    received, payload = ask()
    journal.accept(received, payload, 600_000)
    clock.ms = 5_000  # the clock began anew: by it, nothing would have run out
    restarted = CommandJournal(db, now_ms=clock, boot="boot-2")
    assert restarted.unfinished() == ([], 1, 0)
    assert restarted.accept(received, payload, 600_000) == "expired"


def test_a_command_that_no_process_survives_becomes_a_dead_letter(
    journal: CommandJournal, db: Database, clock: Clock
) -> None:
    received, payload = ask()
    journal.accept(received, payload, 60_000)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        recovery = CommandJournal(db, now_ms=clock, boot="boot-1").unfinished()
        assert [each.attempts for each in recovery.commands] == [attempt]
    assert CommandJournal(db, now_ms=clock, boot="boot-1").unfinished() == ([], 0, 1)
    (letter,) = journal.dead_letters()
    assert (letter.topic, letter.payload, letter.attempts) == (received.topic.raw, payload, MAX_ATTEMPTS)
    assert journal.accept(received, payload, 60_000) == "expired"


def test_an_answer_is_kept_past_the_time_to_live_and_then_purged(journal: CommandJournal, clock: Clock) -> None:
    received, payload = ask()
    journal.accept(received, payload, 60_000)
    journal.finish(received, b"the answer")
    clock.ms += 60_000 + MARGIN_MS
    assert journal.purge() == 0
    assert journal.accept(received, payload, 1) == b"the answer"
    clock.ms += 1
    assert journal.purge() == 1
    assert journal.accept(received, payload, 60_000) == "new"


def test_answers_of_an_earlier_boot_are_kept_for_the_margin_of_this_one(
    journal: CommandJournal, db: Database, clock: Clock
) -> None:
    received, payload = ask()
    journal.accept(received, payload, 60_000)
    journal.finish(received, b"the answer")
    clock.ms = 5_000
    rebooted = CommandJournal(db, now_ms=clock, boot="boot-2")
    assert rebooted.purge() == 0
    assert rebooted.accept(received, payload, 60_000) == b"the answer"
    clock.ms = MARGIN_MS + 1
    assert rebooted.purge() == 1


def test_purging_never_takes_an_unfinished_command(journal: CommandJournal, clock: Clock) -> None:
    received, payload = ask()
    journal.accept(received, payload, 1)
    clock.ms += 10 * MARGIN_MS
    assert journal.purge() == 0
    assert journal.accept(received, payload, 1) == "running"


def test_a_finished_commands_payload_is_not_kept(journal: CommandJournal, db: Database) -> None:
    received, payload = ask()
    journal.accept(received, payload, 60_000)
    journal.finish(received, b"done")
    with db.read() as connection:
        assert fetch_value(connection, "SELECT sum(length(payload)) FROM commands") == 0


def test_failures_are_counted_across_restarts_until_forgotten(
    journal: CommandJournal, db: Database, clock: Clock
) -> None:
    assert journal.count_failure("a") == 1
    assert CommandJournal(db, now_ms=clock, boot="boot-2").count_failure("a") == 2
    assert journal.count_failure("b") == 1
    journal.forget_failures("a")
    assert journal.count_failure("a") == 1


def test_the_failures_counted_are_bounded(journal: CommandJournal, db: Database) -> None:
    with db.transaction() as connection:
        connection.execute(
            "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
            " INSERT INTO failures SELECT 'k' || i, 1, i FROM n",
            (MAX_FAILURES,),
        )
    journal.count_failure("new")
    with db.read() as connection:
        assert fetch_value(connection, "SELECT count(*) FROM failures") == MAX_FAILURES
    assert journal.count_failure("k1") == 1, "the longest forgotten went"


def test_dead_letters_are_kept_newest_first_and_the_oldest_are_dropped_and_counted(db: Database) -> None:
    journal = CommandJournal(db, max_dead_letters=3)
    dropped = [journal.dead_letter("a/b", bytes([number]), ValueError(f"bad {number}"), 3) for number in range(5)]
    assert dropped == [0, 0, 0, 1, 1]
    assert [letter.payload for letter in journal.dead_letters()] == [b"\4", b"\3", b"\2"]
    assert journal.dead_letters(limit=1)[0].error == "bad 4"
    assert journal.dead_letter_counts() == (3, 2)


def test_dead_letters_are_bounded_in_bytes_but_the_newest_always_stays(db: Database) -> None:
    journal = CommandJournal(db, max_dead_letter_bytes=1000)
    assert journal.dead_letter("a/b", bytes(600), "e", 1) == 0
    assert journal.dead_letter("a/b", bytes(600), "e", 1) == 1
    assert journal.dead_letter("a/b", bytes(5000), "e" * 100_000, 1) == 1
    (letter,) = journal.dead_letters()
    assert len(letter.payload) == 5000
    assert len(letter.error) < 10_000


ACCEPT_AND_DIE = """
import os, signal, sys
from pathlib import Path
from edge.db import open_database
from edge.journal import JOURNAL, CommandJournal
from protocol import codec, topics
journal = CommandJournal(open_database(Path(sys.argv[1]), schema=JOURNAL))
payload = bytes.fromhex(sys.argv[3])
received = codec.decode(topics.parse(sys.argv[2]), payload)
assert journal.accept(received, payload, 60_000) == "new"
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_an_accepted_command_survives_kill_9_and_this_boots_clock_judges_it(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    received, payload = ask()
    child = subprocess.run(
        [sys.executable, "-c", ACCEPT_AND_DIE, str(path), received.topic.raw, payload.hex()], timeout=150
    )
    assert child.returncode == -9
    database = open_database(path, schema=JOURNAL)
    (command,) = CommandJournal(database).unfinished().commands
    assert command.payload == payload
    assert 0 < command.ttl_ms <= 60_000
    database.close()


def test_boottime_runs_on_and_the_boot_has_one_id() -> None:
    assert 0 < boottime_ms() <= boottime_ms()
    assert boot_id() == boot_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
