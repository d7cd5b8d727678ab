"""Recall by text: the right memories first, whatever is in the query, and never more than fits."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge.db import Database
from protocol.messages import MemoryRecalled
from services.memory_store.recall import MAX_TERMS, match_expression, recall
from tests.services.memory_store.conftest import Node, Put, put_of

TEXTS = (
    "The tomato plants on the balcony need water every evening.",
    "Grandmother's recipe: tomato soup with basil and a little cream.",
    "The bicycle is in the cellar, its tyre is flat.",
    "On Monday the dentist at nine.",
    "Käthe müsste über den Fluß: Straße gesperrt.",
    "\u4eca\u5929 \u4e0b\u96e8",
    "the quick brown fox says: NEAR AND OR NOT",
)


@pytest.fixture
def filled(tomato: Node) -> Node:
    tomato.put(*TEXTS)
    return tomato


def texts(node: Node, query: str, limit: int = 10) -> list[str]:
    return [hit.text for hit in recall(node.log.db, query, limit).hits]


def test_the_memory_with_more_of_the_words_comes_first(filled: Node) -> None:
    assert texts(filled, "tomato soup")[0] == TEXTS[1]
    assert set(texts(filled, "tomato soup")) == {TEXTS[0], TEXTS[1]}


def test_a_question_finds_its_answer_by_its_telling_words(filled: Node) -> None:
    assert texts(filled, "What is the recipe for the soup?") == [TEXTS[1]]


def test_words_are_found_in_other_forms(filled: Node) -> None:
    assert texts(filled, "watering a plant") == [TEXTS[0]]


def test_accents_do_not_matter_composed_or_not(filled: Node) -> None:
    assert texts(filled, "kathe") == texts(filled, "Ka\u0308the") == [TEXTS[4]]


def test_other_scripts_are_found(filled: Node) -> None:
    assert texts(filled, "\u4e0b\u96e8") == [TEXTS[5]]


def test_stop_words_are_looked_for_when_there_are_no_others(filled: Node) -> None:
    assert texts(filled, "on the")
    assert texts(filled, "the") != texts(filled, "the dentist")


@pytest.mark.parametrize("query", ["", "   ", "?!", '"', "*", "-", "\0", "\u200b", "🍅"])
def test_a_query_without_words_finds_nothing(filled: Node, query: str) -> None:
    assert recall(filled.log.db, query, 10).hits == []


@pytest.mark.parametrize(
    "query",
    [
        'tomato"',
        '"tomato" OR "',
        "text:tomato",
        "tomato*",
        "^tomato",
        "NEAR(tomato soup, 2)",
        "tomato NOT soup",
        "tomato AND",
        "(tomato",
        "tomato'; DROP TABLE memories; --",
        "{text} : tomato",
        "-tomato",
        "tomato + soup",
        "tomato\0soup",
    ],
)
def test_query_syntax_in_a_query_is_only_words(filled: Node, query: str) -> None:
    assert {TEXTS[0], TEXTS[1]} <= set(texts(filled, query))


def test_operators_are_words_that_can_be_found(filled: Node) -> None:
    assert TEXTS[6] in texts(filled, "NEAR")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(query=st.text(max_size=200))
def test_no_query_is_an_error(filled: Node, query: str) -> None:
    assert len(recall(filled.log.db, query, 5).hits) <= 5


def test_long_queries_are_cut_to_a_number_of_different_words() -> None:
    expression = match_expression(" ".join(f"word{number}" for number in range(1000)) + " word1" * 1000)
    assert expression.count(" OR ") == MAX_TERMS - 1


def test_the_limit_holds_and_the_best_stay(filled: Node) -> None:
    assert texts(filled, "tomato soup", limit=1) == [TEXTS[1]]


def test_hits_carry_where_they_come_from(tomato: Node, sprout: Node) -> None:
    (stored,) = tomato.put("a memory of tomato's")
    sprout.log.merge(tomato.publish())
    (hit,) = recall(sprout.log.db, "memory", 10).hits
    assert (hit.id, hit.node, hit.seq, hit.role) == (stored.id, "tomato", 1, "note")
    assert hit.time_us == tomato.now_ms * 1000
    assert hit.score > 0


def test_scores_fall(filled: Node) -> None:
    scores = [hit.score for hit in recall(filled.log.db, "tomato soup water the", 10).hits]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) > 1


def test_an_answer_is_bounded_in_bytes_and_says_what_it_left_out(tomato: Node) -> None:
    tomato.put(*(f"apple {number} " + "x" * 1000 for number in range(50)))

    def ask(**limits: int) -> MemoryRecalled:
        return recall(tomato.log.db, "apple", 50, **limits)

    assert (len(ask().hits), ask().truncated) == (50, 0)
    answer = ask(max_bytes=20_000)
    assert 10 < len(answer.hits) < 20
    assert len(answer.hits) + answer.truncated == 50
    assert ask(max_bytes=10).hits == []


def test_private_memories_are_found_by_their_own_node_alone(tomato: Node) -> None:
    tomato.put("the secret garden", scope="private")
    tomato.put("the public garden")
    assert [hit.text for hit in recall(tomato.log.db, "garden", 10).hits] == ["the public garden"]
    assert len(recall(tomato.log.db, "garden", 10, include_private=True).hits) == 2


def test_private_memories_do_not_use_up_the_limit(tomato: Node) -> None:
    tomato.put(*["garden"] * 20, scope="private")
    tomato.put("a garden that everyone may know, and that ranks lower for being longer")
    assert len(recall(tomato.log.db, "garden", 5).hits) == 1


def test_what_was_put_is_found_after_a_restart(filled: Node) -> None:
    filled.reopen()
    assert texts(filled, "dentist") == [TEXTS[3]]


def test_the_index_agrees_with_the_memories(filled: Node) -> None:
    filled.log.put_many([Put("01890000-0000-7000-8000-000000000000", "x/y", put_of("one more").data)])
    database: Database = filled.log.db
    with database.transaction() as connection:
        connection.execute("INSERT INTO memories_fts (memories_fts, rank) VALUES ('integrity-check', 1)")
