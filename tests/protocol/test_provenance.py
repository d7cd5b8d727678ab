"""Provenance: a chain of statements that cannot be cut in the middle, changed, or moved."""

from __future__ import annotations

from typing import Any

import pytest

from protocol.errors import MalformedMessage, SnapshotRefused
from protocol.identity import Identity, Keyring
from protocol.provenance import MAX_STATEMENTS, Kind, SignedStatement, add_statement, read_chain
from tests.support.snapshots import SPROUT, TOMATO

MARS = Identity("mars", bytes(range(2, 34)))
KEYRING = Keyring({each.node: each.fingerprint for each in (TOMATO, SPROUT)})
FIRST, SECOND = bytes([1]) * 32, bytes([2]) * 32


def chain_of(*steps: tuple[Identity, bytes, Kind, dict[str, Any]]) -> list[SignedStatement]:
    chain: list[SignedStatement] = []
    for identity, snapshot, kind, details in steps:
        chain = add_statement(identity, chain, snapshot, kind, details)
    return chain


Step = tuple[Identity, bytes, Kind, dict[str, Any]]
CREATED: Step = (TOMATO, FIRST, "created", {})
MOVED: Step = (SPROUT, FIRST, "moved", {"from": "tomato"})
PRUNED: Step = (SPROUT, SECOND, "pruned", {"from": FIRST, "kept": 100})
WHOLE = chain_of(CREATED, MOVED, PRUNED, (TOMATO, SECOND, "moved", {"from": "sprout"}))


def refusal_of(chain: list[SignedStatement], snapshot: bytes = SECOND, creator: str = "sprout") -> str:
    with pytest.raises(SnapshotRefused) as caught:
        read_chain(chain, snapshot, creator, KEYRING)
    return caught.value.field


def test_a_chain_tells_the_whole_way_over_what_was_made_of_it() -> None:
    proven = read_chain(WHOLE, SECOND, "sprout", KEYRING)
    assert [(each.statement.node, each.statement.kind) for each in proven] == [
        ("tomato", "created"),
        ("sprout", "moved"),
        ("sprout", "pruned"),
        ("tomato", "moved"),
    ]
    assert all(each.trusted for each in proven)
    assert proven[2].statement.details == {"from": FIRST, "kept": 100}


def test_statements_of_strangers_keep_their_place_and_are_marked() -> None:
    chain = chain_of(CREATED, (MARS, FIRST, "witnessed", {}), MOVED)
    assert [each.trusted for each in read_chain(chain, FIRST, "tomato", KEYRING)] == [True, False, True]
    # Behind it nobody is trusted who would vouch for it.
    assert refusal_of(chain_of(CREATED, MOVED, (MARS, FIRST, "witnessed", {})), FIRST, "tomato") == "provenance[2]"


def test_a_chain_that_was_cut_in_the_middle_or_put_in_another_order_is_refused() -> None:
    for index in range(len(WHOLE) - 1):
        assert refusal_of(WHOLE[:index] + WHOLE[index + 1 :]).startswith("provenance")
        swapped = list(WHOLE)
        swapped[index], swapped[index + 1] = swapped[index + 1], swapped[index]
        assert refusal_of(swapped) == f"provenance[{index}]"
    assert refusal_of([]) == "provenance"
    assert refusal_of(WHOLE[:2]) == "provenance"  # it ends before this snapshot was made
    assert refusal_of([*WHOLE, *WHOLE]) == "provenance[4]"


def test_a_chain_of_another_snapshot_or_another_maker_is_refused() -> None:
    assert refusal_of(WHOLE, snapshot=bytes(32)) == "provenance"
    assert refusal_of(WHOLE, creator="tomato") == "provenance"
    assert refusal_of(chain_of(CREATED, (SPROUT, SECOND, "moved", {}))) == "provenance[1]"
    assert refusal_of(chain_of(CREATED, (SPROUT, SECOND, "pruned", {"from": SECOND}))) == "provenance[1]"
    assert refusal_of(chain_of(CREATED, (SPROUT, SECOND, "created", {}))) == "provenance[1]"
    assert refusal_of(chain_of(MOVED)) == "provenance[0]"


def test_a_changed_statement_is_refused() -> None:
    for index, signed in enumerate(WHOLE):
        for at in range(0, len(signed.statement), 5):
            body = bytearray(signed.statement)
            body[at] ^= 1
            refusal_of([*WHOLE[:index], SignedStatement(bytes(body), signed.signature), *WHOLE[index + 1 :]])
        others = SignedStatement(signed.statement, MARS.sign(b"", signed.statement))
        assert refusal_of([*WHOLE[:index], others, *WHOLE[index + 1 :]]) == f"provenance[{index}]"


def test_a_chain_has_an_end() -> None:
    chain = chain_of(CREATED)
    while len(chain) < MAX_STATEMENTS:
        chain = add_statement(TOMATO, chain, FIRST, "witnessed")
    assert len(read_chain(chain, FIRST, "tomato", KEYRING)) == MAX_STATEMENTS
    with pytest.raises(MalformedMessage, match="limits"):
        add_statement(TOMATO, chain, FIRST, "witnessed")
    with pytest.raises(MalformedMessage):
        add_statement(TOMATO, [], FIRST, "created", {"note": "x" * 2000})
    assert refusal_of([*chain, chain[-1]], FIRST, "tomato") == "provenance"
