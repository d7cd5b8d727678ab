"""Entries of other nodes: proven, in their chain's order, each once; what contradicts or is unproven is said."""

from __future__ import annotations

import random
import shutil

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import services.memory_store.chain as chain
import services.memory_store.merge as merge_module
from edge.db import fetch_value
from protocol.clock import MAX_DRIFT_MS, time_ms_of
from protocol.entries import DOMAIN_ENTRY, GENESIS, EntryHeader, MemoryContent, Origin, SignedEntry, read_header, seal
from protocol.errors import MindstreamError
from protocol.identity import digest
from protocol.ids import uuid7
from services.memory_store.log import Gap
from services.memory_store.recall import recall
from tests.services.memory_store.conftest import MakeNode, Node, put_of


def erased(entry: SignedEntry) -> SignedEntry:
    return SignedEntry(header=entry.header, signature=entry.signature)


def sign(node: Node, header: EntryHeader, content: bytes | None = None, salt: bytes | None = None) -> SignedEntry:
    """Any header at all, signed by the node."""
    encoded = msgspec.msgpack.encode(header)
    return SignedEntry(encoded, node.identity.sign(DOMAIN_ENTRY, encoded), salt, content)


def header_of(node: Node, /, **fields: object) -> EntryHeader:
    """The header of a node's first entry, with some fields changed."""
    header = EntryHeader(
        kind="memory.put",
        id=uuid7(),
        node=node.identity.node,
        scope="everyone",
        log_id=node.log.log_id,
        seq=1,
        prev=GENESIS,
        hlc=1,
        clock_synced=True,
        content_digest=digest(b""),
    )
    return msgspec.structs.replace(header, **fields)


def names(node: Node, entries: list[SignedEntry]) -> list[str]:
    return [event.name for event in node.log.merge(entries).events]


def test_entries_are_stored_verbatim_and_given_on_verbatim(tomato: Node, sprout: Node) -> None:
    tomato.put("one", "two", "three")
    entries = tomato.publish()
    outcome = sprout.log.merge(entries)
    assert (outcome.merged.stored, outcome.events, outcome.own_log_broken) == (3, [], False)
    origin = Origin("tomato", "everyone", tomato.log.log_id)
    assert sprout.log.range(origin, 1, 3).entries == entries
    assert sprout.log.vector() == tomato.log.vector()
    assert sprout.publish() == [], "what came from others is not ours to publish"


def test_repeated_entries_are_known_and_cost_no_signature(
    tomato: Node, sprout: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    tomato.put("one", "two")
    entries = tomato.publish()
    sprout.log.merge(entries + entries)
    monkeypatch.setattr(merge_module, "verify", None)
    assert sprout.log.merge(entries).merged.already == 2


def test_entries_beyond_a_gap_wait_and_are_stored_when_it_is_filled(tomato: Node, sprout: Node) -> None:
    tomato.put(*(f"number {number}" for number in range(1, 11)))
    entries = tomato.publish()
    origin = Origin("tomato", "everyone", tomato.log.log_id)
    assert sprout.log.merge(entries[6:]).merged.waiting == 4
    assert sprout.log.merge(entries[3:5]).merged.waiting == 2
    assert sprout.log.gaps() == [Gap(origin, 1, 3)]
    assert sprout.log.vector().origins == []
    assert sprout.log.merge(entries[:3]).merged.stored == 5
    assert sprout.log.gaps() == [Gap(origin, 6, 6)]
    assert sprout.log.merge(entries[6:]).merged.waiting == 4
    sprout.reopen()
    assert sprout.log.merge(entries[5:6]).merged.stored == 5
    assert sprout.log.gaps() == []
    assert sprout.log.stats()["early"] == 0
    assert sprout.log.digest() == tomato.log.digest()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_any_order_any_repetition_and_any_cut_give_the_same_log(make_node: MakeNode, seed: int) -> None:
    chance = random.Random(seed)
    writers = [make_node("tomato"), make_node("carrot")]
    reader = make_node("sprout")
    entries: list[SignedEntry] = []
    for writer in writers:
        writer.put(*(f"{writer.identity.node} {number}" for number in range(12)))
        entries += writer.publish()
    arriving = entries + chance.sample(entries, 8)
    chance.shuffle(arriving)
    while arriving:
        cut = chance.randint(1, 7)
        outcome = reader.log.merge(arriving[:cut])
        assert outcome.merged.refused == 0, outcome.events
        arriving = arriving[cut:]
    expected = sorted((each.node, each.seq, each.hash) for w in writers for each in w.log.vector().origins)
    assert sorted((each.node, each.seq, each.hash) for each in reader.log.vector().origins) == expected
    assert reader.log.stats()["memories"] == 24
    assert reader.log.stats()["early"] == 0


def test_an_unknown_peers_entries_are_refused_and_said_once(sprout: Node, make_node: MakeNode) -> None:
    stranger = make_node("stranger", trusted=False)
    stranger.put("one", "two", "three")
    outcome = sprout.log.merge(stranger.publish())
    assert outcome.merged.refused == 3
    (event,) = outcome.events
    assert (event.name, event.count) == ("unknown-peer", 3)
    assert event.error is not None
    assert "keys trust stranger" in event.error.hint
    assert sprout.log.stats()["counters"]["refused.unknown_peer"] == 3
    assert sprout.log.stats()["entries"] == {}


def test_a_trusted_name_with_another_key_is_a_bad_signature(tomato: Node, sprout: Node, make_node: MakeNode) -> None:
    impostor = make_node("tomato", trusted=False)
    impostor.put("I am tomato")
    assert names(sprout, impostor.publish()) == ["bad-signature"]


@pytest.mark.parametrize("field", ["header", "signature", "content", "salt"])
def test_any_changed_byte_is_refused(tomato: Node, sprout: Node, field: str) -> None:
    tomato.put("a memory that nobody may change")
    (entry,) = tomato.publish()
    for place in range(len(getattr(entry, field))):
        changed = bytearray(getattr(entry, field))
        changed[place] ^= 1
        outcome = sprout.log.merge([msgspec.structs.replace(entry, **{field: bytes(changed)})])
        assert (outcome.merged.refused, outcome.merged.stored) == (1, 0), place
        assert outcome.events[0].name in {"bad-signature", "malformed", "unknown-peer", "trust"}
    assert sprout.log.merge([entry]).merged.stored == 1


def test_content_cannot_be_cut_by_moving_the_border_with_the_salt(tomato: Node, sprout: Node) -> None:
    tomato.put("one")
    (entry,) = tomato.publish()
    assert entry.salt is not None
    assert entry.content is not None
    moved = msgspec.structs.replace(entry, salt=entry.salt + entry.content[:4], content=entry.content[4:])
    assert names(sprout, [moved]) == ["bad-signature"]
    assert names(sprout, [msgspec.structs.replace(entry, salt=b"", content=entry.salt + entry.content)]) == [
        "bad-signature"
    ]


def test_one_bad_entry_does_not_hold_up_the_good_ones(tomato: Node, sprout: Node, make_node: MakeNode) -> None:
    stranger = make_node("stranger", trusted=False)
    stranger.put("no")
    tomato.put("one", "two")
    garbage = SignedEntry(header=b"\xc1garbage", signature=b"")
    outcome = sprout.log.merge([garbage, *stranger.publish(), *tomato.publish()])
    assert (outcome.merged.stored, outcome.merged.refused) == (2, 2)
    assert sorted(event.name for event in outcome.events) == ["malformed", "unknown-peer"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("node", "a/b"),
        ("scope", "+"),
        ("log_id", "x" * 5000),
        ("id", "x"),
        ("seq", 0),
        ("seq", 2**40),
        ("seq", 2**64 - 1),
        ("hlc", 2**63),
        ("prev", b"short"),
        ("content_digest", b""),
    ],
)
def test_a_signed_header_that_could_not_be_carried_on_is_refused(
    tomato: Node, sprout: Node, field: str, value: object
) -> None:
    outcome = sprout.log.merge([sign(tomato, header_of(tomato, **{field: value}))])
    assert outcome.merged.refused == 1
    (event,) = outcome.events
    assert event.error is not None
    assert (event.error.code, event.error.field) == ("malformed", field)


def test_others_private_entries_are_refused(tomato: Node, sprout: Node) -> None:
    entry = sign(tomato, header_of(tomato, scope="private"))
    outcome = sprout.log.merge([entry])
    assert outcome.merged.refused == 1
    assert "private" in outcome.events[0].text
    assert sprout.log.stats()["entries"] == {}


def test_a_groups_entries_are_kept_and_not_told_of(tomato: Node, sprout: Node) -> None:
    entry = sign(tomato, header_of(tomato, scope="family"))
    assert sprout.log.merge([entry]).merged.stored == 1
    assert sprout.log.vector().origins == []


def test_an_unknown_kind_with_unknown_fields_is_stored_and_given_on_and_is_no_memory(
    tomato: Node, sprout: Node
) -> None:
    fields = msgspec.to_builtins(header_of(tomato, kind="memory.reinforce"), builtin_types=(bytes,))
    encoded = msgspec.msgpack.encode({**fields, "later_field": [1, 2, 3]})
    entry = SignedEntry(encoded, tomato.identity.sign(DOMAIN_ENTRY, encoded))
    assert sprout.log.merge([entry]).merged.stored == 1
    assert sprout.log.range(Origin("tomato", "everyone", tomato.log.log_id), 1, 1).entries == [entry]
    assert sprout.log.stats()["memories"] == 0


@pytest.mark.parametrize("content", [b"", b"\xc1", msgspec.msgpack.encode({"text": "x", "time_us": 2**64 - 1})])
def test_content_that_its_origin_signed_but_nobody_can_read_does_not_stop_the_chain(
    tomato: Node, sprout: Node, content: bytes
) -> None:
    salt = bytes(16)
    entry = sign(tomato, header_of(tomato, content_digest=digest(salt, content)), content, salt)
    assert sprout.log.merge([entry]).merged.stored == 1
    assert sprout.log.stats()["counters"]["unreadable_content"] == 1
    assert sprout.log.digest().entries == 1


def test_erased_entries_still_verify_and_keep_the_chain_and_the_id(tomato: Node, sprout: Node) -> None:
    put = put_of("to be erased")
    tomato.log.put_many([put, put_of("stays")])
    first, second = tomato.publish()
    assert sprout.log.merge([erased(first), second]).merged.stored == 2
    assert sprout.log.digest() == tomato.log.digest()
    assert sprout.log.merge([first]).merged.already == 1, "a copy that still has the text does not bring it back"
    assert recall(sprout.log.db, "erased", 10).hits == []
    assert [hit.text for hit in recall(sprout.log.db, "stays", 10).hits] == ["stays"]
    (again,) = sprout.log.put_many([put])
    assert not isinstance(again, MindstreamError)
    assert again.already


def fork(tomato: Node, make_node: MakeNode) -> Node:
    """A copy of tomato's data folder that goes on by itself, on a machine that looks the same."""
    tomato.log.db.close()
    copy = tomato.folder.with_name("copy")
    shutil.copytree(tomato.folder, copy)
    tomato.open()
    return make_node("tomato", folder=copy, identity=tomato.identity)


def test_a_fork_is_said_and_never_stored_over(tomato: Node, sprout: Node, make_node: MakeNode) -> None:
    tomato.put("common")
    sprout.log.merge(tomato.publish())
    clone = fork(tomato, make_node)
    tomato.put("the original's second", "the original's third")
    clone.put("the clone's second", "the clone's third", "the clone's fourth")
    sprout.log.merge(tomato.publish())
    before = sprout.log.vector()
    clone_entries = clone.publish()[-3:]
    outcome = sprout.log.merge(clone_entries)
    (event,) = outcome.events
    assert (event.name, event.severity, event.count) == ("fork", "error", 3)
    assert outcome.merged.refused == 3
    assert sprout.log.vector() == before
    assert sprout.log.stats()["counters"]["refused.fork"] == 3
    assert recall(sprout.log.db, "clone", 10).hits == []


def test_an_early_entry_of_another_branch_is_dropped_when_the_gap_is_filled(
    tomato: Node, sprout: Node, make_node: MakeNode
) -> None:
    tomato.put("common")
    common = tomato.publish()
    tomato.log.flush()
    clone = fork(tomato, make_node)
    tomato.put("second", "third")
    clone.put("other second", "other third")
    true_entries, other = tomato.publish(), clone.publish()
    assert sprout.log.merge([other[1]]).merged.waiting == 1
    outcome = sprout.log.merge(common + true_entries)
    assert outcome.merged.stored == 3
    assert [event.name for event in outcome.events] == ["fork"], "said when the early one turns out to contradict"
    assert sprout.log.merge([other[1]]).events[0].name == "fork"
    assert sprout.log.vector() == tomato.log.vector()

    late = make_node("late")
    late.log.merge([other[1]])
    outcome = late.log.merge([*common, true_entries[0]])
    assert [event.name for event in outcome.events] == ["fork"]
    assert late.log.stats()["early"] == 0
    assert late.log.merge([true_entries[1]]).merged.stored == 1


def test_a_node_set_back_takes_its_own_entries_again_and_begins_a_new_log(
    tomato: Node, sprout: Node, make_node: MakeNode
) -> None:
    tomato.put("one")
    restored = fork(tomato, make_node)
    tomato.put("two", "three")
    entries = tomato.publish()
    sprout.log.merge(entries)
    old = restored.log.log_id
    outcome = restored.log.merge(entries)
    assert (outcome.merged.stored, outcome.own_log_broken) == (2, True)
    assert restored.log.log_id != old
    assert "lost" in restored.log.log_id_reason
    assert restored.log.unpublished().entries == [], "the others have them already"
    restored.put("after the restore")
    new_entries = restored.publish()
    assert sprout.log.merge(new_entries).merged.stored == 1
    assert sprout.log.digest() == restored.log.digest()


def test_a_node_set_back_that_wrote_on_says_fork_and_begins_a_new_log(tomato: Node, make_node: MakeNode) -> None:
    restored = fork(tomato, make_node)
    tomato.put("one")
    restored.put("other one")
    outcome = restored.log.merge(tomato.publish())
    assert [event.name for event in outcome.events] == ["fork"]
    assert outcome.own_log_broken
    assert restored.log.log_id != tomato.log.log_id


def test_own_entries_coming_back_unchanged_are_known(tomato: Node) -> None:
    tomato.put("one")
    outcome = tomato.log.merge(tomato.publish())
    assert (outcome.merged.already, outcome.own_log_broken) == (1, False)


def test_a_clock_a_day_ahead_is_kept_shown_and_does_not_drag_ours_along(tomato: Node, sprout: Node) -> None:
    tomato.now_ms = sprout.now_ms + 86_400_000
    tomato.put("from tomorrow")
    assert sprout.log.merge(tomato.publish()).merged.stored == 1
    assert sprout.log.skews() == {"tomato": 86_400_000}
    assert sprout.log.stats()["skew_ms"] == {"tomato": 86_400_000}
    assert sprout.log.clock.refused_merges == 1
    sprout.put("from today")
    assert time_ms_of(read_header(sprout.publish()[0]).hlc) == sprout.now_ms


def test_a_clock_a_little_ahead_is_followed_so_that_answers_come_after(tomato: Node, sprout: Node) -> None:
    tomato.now_ms = sprout.now_ms + MAX_DRIFT_MS // 2
    tomato.put("question")
    (question,) = tomato.publish()
    sprout.log.merge([question])
    sprout.put("answer")
    assert read_header(sprout.publish()[0]).hlc > read_header(question).hlc


def test_a_clock_a_day_behind_is_heard_as_any_other(tomato: Node, sprout: Node) -> None:
    tomato.now_ms = sprout.now_ms - 86_400_000
    tomato.put("from yesterday")
    assert sprout.log.merge(tomato.publish()).merged.stored == 1
    assert sprout.log.skews() == {"tomato": 0}


def test_entries_kept_aside_are_bounded_and_the_furthest_go_first(
    tomato: Node, sprout: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_module, "MAX_EARLY_ENTRIES", 5)
    tomato.put(*(f"number {number}" for number in range(1, 21)))
    entries = tomato.publish()
    outcome = sprout.log.merge(entries[10:])
    assert (outcome.merged.waiting, outcome.merged.refused) == (5, 5)
    assert outcome.events[0].name == "overloaded"
    sprout.log.merge(entries[5:10])
    origin = Origin("tomato", "everyone", tomato.log.log_id)
    assert sprout.log.gaps() == [Gap(origin, 1, 5)]
    assert sprout.log.merge(entries[:5]).merged.stored == 10
    assert sprout.log.merge(entries[10:]).merged.stored == 10
    assert sprout.log.digest() == tomato.log.digest()


def test_the_logs_of_one_node_are_bounded(tomato: Node, sprout: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "MAX_ORIGINS_PER_NODE", 3)
    entries = [sign(tomato, header_of(tomato, log_id=uuid7())) for _ in range(5)]
    outcome = sprout.log.merge(entries)
    assert (outcome.merged.stored, outcome.merged.refused) == (3, 2)
    assert outcome.events[0].name == "overloaded"


def test_of_two_entries_with_one_id_every_node_shows_the_same(tomato: Node, sprout: Node, make_node: MakeNode) -> None:
    identifier = uuid7()
    sprout.now_ms += 1000
    tomato.log.put_many([put_of("tomato was first", id=identifier)])
    sprout.log.put_many([put_of("sprout was second", id=identifier)])
    a, b = tomato.publish(), sprout.publish()
    for arrivals in ([*a, *b], [*b, *a]):
        reader = make_node("reader")
        for entry in arrivals:
            reader.log.merge([entry])
        assert [hit.text for hit in recall(reader.log.db, "first second", 10).hits] == ["tomato was first"]
        assert reader.log.digest().entries == 2
        with reader.log.db.read() as connection:
            assert fetch_value(connection, "SELECT count(*) FROM memories") == 1
        with reader.log.db.transaction() as connection:
            connection.execute("INSERT INTO memories_fts (memories_fts, rank) VALUES ('integrity-check', 1)")


def test_a_merge_of_nothing_is_nothing(sprout: Node) -> None:
    outcome = sprout.log.merge([])
    assert (outcome.merged.stored, outcome.events) == (0, [])


def test_a_peer_that_becomes_trusted_is_heard_from_then_on(sprout: Node, make_node: MakeNode) -> None:
    newcomer = make_node("newcomer", trusted=False)
    newcomer.put("hello")
    entries = newcomer.publish()
    assert sprout.log.merge(entries).merged.refused == 1
    sprout.keyring.add("newcomer", newcomer.identity.fingerprint)
    assert sprout.log.merge(entries).merged.stored == 1


def test_an_entry_sealed_elsewhere_with_the_wrong_prev_is_a_fork(tomato: Node, sprout: Node) -> None:
    entry = seal(
        tomato.identity,
        MemoryContent(text="x", time_us=0),
        origin=Origin("tomato", "everyone", tomato.log.log_id),
        seq=1,
        prev=bytes(31) + b"\1",
        hlc=1,
        id=uuid7(),
        clock_synced=False,
    )
    assert names(sprout, [entry]) == ["fork"]
