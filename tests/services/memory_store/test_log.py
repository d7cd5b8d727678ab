"""Puts, the outbox, and what a log holds: numbered, chained, signed, each once, and there after a restart."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edge.db import fetch_value, open_database
from protocol.entries import GENESIS, Origin, entry_hash, read_content, read_header, verify
from protocol.errors import MalformedMessage, NotFound, StorageError
from protocol.ids import uuid7
from protocol.messages import MemoryPut, MemoryStored
from services.memory_store.chain import MEMORY_LOG_SCHEMA
from services.memory_store.log import MAX_RANGE_ENTRIES, MemoryLog
from tests.services.memory_store.conftest import MakeNode, Node, Put, put_of


def everyone(node: Node) -> Origin:
    return Origin(node.identity.node, "everyone", node.log.log_id)


def test_puts_are_numbered_without_gaps_chained_and_signed(tomato: Node) -> None:
    stored = tomato.put("one", "two") + tomato.put("three")
    assert [each.seq for each in stored] == [1, 2, 3]
    prev, last_hlc = GENESIS, 0
    for number, entry in enumerate(tomato.log.range(everyone(tomato), 1, 99).entries, start=1):
        header = verify(entry, tomato.keyring)
        assert (header.seq, header.prev, header.node) == (number, prev, "tomato")
        assert header.hlc > last_hlc
        prev, last_hlc = entry_hash(entry.header), header.hlc
    (frontier,) = tomato.log.vector().origins
    assert (frontier.seq, frontier.hash) == (3, prev)


def test_the_content_of_an_entry_is_what_was_put(tomato: Node) -> None:
    message = MemoryPut(text="ripe \u2600 red", role="user", conversation="c1", time_us=1234567)
    tomato.log.put_many([Put(uuid7(), "tomato/cli", message)])
    content = read_content(tomato.log.range(everyone(tomato), 1, 1).entries[0])
    assert content is not None
    assert (content.text, content.role, content.conversation) == (message.text, "user", "c1")
    assert (content.time_us, content.source) == (1234567, "tomato/cli")


def test_a_put_without_a_time_is_of_now(tomato: Node) -> None:
    tomato.put("one")
    content = read_content(tomato.log.range(everyone(tomato), 1, 1).entries[0])
    assert content is not None
    assert content.time_us == tomato.now_ms * 1000


def test_a_repeated_put_is_stored_once_and_gets_the_same_number(tomato: Node) -> None:
    put = put_of("once")
    first, within = tomato.log.put_many([put, put])
    (again,) = tomato.log.put_many([put])
    tomato.reopen()
    (after_restart,) = tomato.log.put_many([put])
    assert isinstance(first, MemoryStored)
    assert not first.already
    for each in (within, again, after_restart):
        assert isinstance(each, MemoryStored)
        assert each.already
        assert (each.seq, each.log_id, each.id) == (first.seq, first.log_id, first.id)
    assert tomato.log.digest().entries == 1


def test_the_putters_own_id_goes_before_the_envelopes(tomato: Node) -> None:
    mine = uuid7()
    results = tomato.log.put_many([Put(uuid7(), "tomato/cli", MemoryPut(text="same", id=mine)) for _ in range(2)])
    assert [isinstance(each, MemoryStored) and (each.id, each.already) for each in results] == [
        (mine, False),
        (mine, True),
    ]


def test_a_put_repeated_at_another_node_is_known_by_its_id(tomato: Node, sprout: Node) -> None:
    put = put_of("once")
    tomato.log.put_many([put])
    sprout.log.merge(tomato.publish())
    (result,) = sprout.log.put_many([put])
    assert isinstance(result, MemoryStored)
    assert (result.already, result.node, result.seq) == (True, "tomato", 1)


def test_a_bad_put_has_its_error_in_its_place_and_the_others_are_stored(tomato: Node) -> None:
    first = put_of("one")
    results = tomato.log.put_many(
        [
            first,
            put_of("bad id", id="not-a-uuid"),
            put_of("bad scope", scope="family"),
            put_of("\U0001f345" * 65536 + "x"),
            put_of("other text", id=first.id),
            put_of("two"),
        ]
    )
    assert [each.seq if isinstance(each, MemoryStored) else each.field for each in results] == [
        1,
        "id",
        "scope",
        "text",
        "id",
        2,
    ]
    assert all(isinstance(each, MalformedMessage) and each.hint for each in results[1:5])


def test_an_empty_batch_is_no_entry(tomato: Node) -> None:
    assert tomato.log.put_many([]) == []
    assert tomato.log.digest().entries == 0


def test_after_a_restart_the_chain_and_the_clock_go_on(tomato: Node, sprout: Node) -> None:
    tomato.put("one")
    stamp = tomato.log.clock.last
    tomato.now_ms -= 3_600_000  # the wall clock was set back meanwhile
    log_id = tomato.log.log_id
    tomato.reopen()
    assert tomato.log.log_id == log_id
    assert tomato.log.log_id_reason == ""
    tomato.put("two")
    entries = tomato.publish()
    assert read_header(entries[1]).hlc > stamp
    assert sprout.log.merge(entries).merged.stored == 2


def test_private_puts_are_numbered_apart_and_never_told_of(tomato: Node) -> None:
    tomato.put("secret one", "secret two", scope="private")
    assert tomato.log.vector().origins == []
    assert tomato.log.digest().entries == 0
    assert tomato.log.unpublished().entries == []
    private = Origin("tomato", "private", tomato.log.log_id)
    with pytest.raises(NotFound):
        tomato.log.range(private, 1, 2)
    (stored,) = tomato.put("public")
    assert stored.seq == 1
    assert tomato.log.stats()["entries"]["/".join(private)] == 2


def test_the_outbox_gives_what_is_not_published_also_after_a_restart(tomato: Node) -> None:
    tomato.put("one", "two")
    assert len(tomato.log.unpublished().entries) == 2
    tomato.log.mark_published(tomato.log.unpublished(max_bytes=1))
    assert [read_header(each).seq for each in tomato.log.unpublished().entries] == [2]
    tomato.log.flush()
    tomato.reopen()
    assert [read_header(each).seq for each in tomato.log.unpublished().entries] == [2]
    tomato.publish()
    tomato.put("three")  # this commit writes the position down
    tomato.reopen()
    assert [read_header(each).seq for each in tomato.log.unpublished().entries] == [3]


def test_a_crash_before_the_position_is_written_publishes_again_and_loses_nothing(tomato: Node, sprout: Node) -> None:
    tomato.put("one", "two")
    entries = tomato.publish()
    tomato.reopen()
    assert tomato.publish() == entries
    sprout.log.merge(entries)
    assert sprout.log.merge(entries).merged.already == 2


def test_a_batch_of_the_outbox_is_bounded_in_bytes_and_says_that_there_is_more(tomato: Node) -> None:
    tomato.put(*(f"{number} " * 500 for number in range(100)))
    batch = tomato.log.unpublished(max_bytes=20_000)
    assert batch.more
    assert 1 < len(batch.entries) < 100
    assert sum(len(each.header) + len(each.content or b"") for each in batch.entries) <= 20_000


def test_marking_nothing_or_the_same_twice_is_harmless(tomato: Node) -> None:
    tomato.put("one")
    batch = tomato.log.unpublished()
    for _ in range(2):
        tomato.log.mark_published(batch)
        tomato.log.mark_published(tomato.log.unpublished())
    assert tomato.log.stats()["unpublished"] == 0


def test_a_range_gives_exactly_what_was_asked_for_as_far_as_it_is_held(tomato: Node) -> None:
    tomato.put(*(f"number {number}" for number in range(10)))
    origin = everyone(tomato)

    def seqs(first: int, last: int, **limits: int) -> list[int]:
        return [read_header(each).seq for each in tomato.log.range(origin, first, last, **limits).entries]

    assert seqs(3, 5) == [3, 4, 5]
    assert seqs(9, 2**63) == [9, 10]
    assert seqs(11, 20) == []
    assert seqs(2**62, 2**63) == []
    assert seqs(5, 4) == []
    assert seqs(4, 10, max_bytes=1) == [4], "one at least, or a large entry could never be repaired"
    assert tomato.log.range(origin, 4, 10, max_bytes=1).more
    assert not tomato.log.range(origin, 4, 10).more


def test_a_range_has_at_most_its_number_of_entries(tomato: Node) -> None:
    for _ in range(3):
        tomato.put(*(["x"] * (MAX_RANGE_ENTRIES // 2)))
    batch = tomato.log.range(everyone(tomato), 1, 10**9, max_bytes=10**9)
    assert len(batch.entries) == MAX_RANGE_ENTRIES
    assert batch.more


def test_a_range_of_an_unknown_origin_is_not_found(tomato: Node) -> None:
    with pytest.raises(NotFound, match="no such origin"):
        tomato.log.range(Origin("nobody", "everyone", uuid7()), 1, 2)


def test_equal_holdings_have_equal_digests_and_a_commit_changes_them(tomato: Node, sprout: Node) -> None:
    assert tomato.log.digest() == sprout.log.digest()
    empty = tomato.log.digest()
    tomato.put("one")
    assert tomato.log.digest() != empty
    assert len(tomato.log.digest().digest) == 64
    sprout.put("two")
    from_tomato, from_sprout = tomato.publish(), sprout.publish()
    tomato.log.merge(from_sprout)
    sprout.log.merge(from_tomato)
    assert tomato.log.digest() == sprout.log.digest()
    assert tomato.log.digest().entries == 2


def test_a_data_folder_on_another_machine_begins_a_new_log(tomato: Node, sprout: Node, make_node: MakeNode) -> None:
    tomato.put("one", "two")
    sprout.log.merge(tomato.publish())
    tomato.log.flush()
    tomato.log.db.close()
    copy = tomato.folder.with_name("copy")
    shutil.copytree(tomato.folder, copy)
    tomato.open()
    clone = make_node("tomato", folder=copy, identity=tomato.identity)
    assert clone.log.log_id == tomato.log.log_id
    clone.machine = b"machine 2"
    clone.reopen()
    assert clone.log.log_id != tomato.log.log_id
    assert "another machine" in clone.log.log_id_reason
    minted = clone.log.log_id
    clone.reopen()
    assert clone.log.log_id == minted
    tomato.put("mine")
    clone.put("the clone's")
    assert sprout.log.merge(tomato.publish() + clone.publish()).merged.stored == 2


def test_an_unknown_machine_id_mints_nothing(tomato: Node) -> None:
    log_id = tomato.log.log_id
    tomato.machine = b""
    tomato.reopen()
    assert tomato.log.log_id == log_id
    tomato.machine = b"machine 1"
    tomato.reopen()
    assert tomato.log.log_id == log_id


def test_a_log_that_learns_its_machine_later_notices_a_move(make_node: MakeNode) -> None:
    node = make_node("tomato")
    for machine, same in ((b"", True), (b"machine 2", False), (b"machine 2", True), (b"machine 3", False)):
        before = node.log.log_id
        node.machine = machine
        node.reopen()
        assert (node.log.log_id == before) is same


def test_two_logs_on_one_file_keep_one_chain(tomato: Node, sprout: Node) -> None:
    second_db = open_database(tomato.folder / "memory.db", schema=MEMORY_LOG_SCHEMA)
    second = MemoryLog(second_db, tomato.identity, lambda: tomato.keyring, machine=b"machine 1")
    for number in range(5):
        tomato.put(f"first {number}")
        assert isinstance(second.put_many([put_of(f"second {number}")])[0], MemoryStored)
    entries = tomato.publish()
    assert sprout.log.merge(entries).merged.stored == 10
    assert second.digest() == tomato.log.digest()
    second_db.close()


def test_a_commit_that_fails_stores_nothing_and_the_next_goes_on_from_the_same_number(tomato: Node) -> None:
    tomato.put("one")
    connection = tomato.log.db._writer
    pages = fetch_value(connection, "PRAGMA page_count")
    fetch_value(connection, f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(StorageError) as caught:
        tomato.log.put_many([put_of("word " * 10_000) for _ in range(10)])
    assert caught.value.reason == "disk full"
    fetch_value(connection, "PRAGMA max_page_count = 1000000")
    assert tomato.log.digest().entries == 1
    (stored,) = tomato.put("two")
    assert stored.seq == 2


def test_the_status_shows_what_is_held(tomato: Node, sprout: Node, tmp_path: Path) -> None:
    tomato.put("one", "two")
    sprout.log.merge(tomato.publish())
    stats = sprout.log.stats()
    assert stats["entries"] == {f"tomato/everyone/{tomato.log.log_id}": 2}
    assert (stats["memories"], stats["early"], stats["unpublished"]) == (2, 0, 0)
    assert stats["bytes"] > 0
    assert stats["counters"]["stored"] == 2
