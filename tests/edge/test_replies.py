"""The cache of answers given."""

from __future__ import annotations

from edge.counters import Counters
from edge.replies import MAX_KEPT_BYTES, RUNNING, ReplyCache


def cache(**bounds: int) -> tuple[ReplyCache, Counters]:
    counters = Counters()
    return ReplyCache(counters, **bounds), counters


def test_new_then_running_then_answered() -> None:
    replies, _ = cache()
    assert replies.begin("a", 1000) is None
    assert replies.begin("a", 1000) is RUNNING
    replies.finish("a", "answer", 10)
    assert replies.begin("a", 1000) == "answer"


def test_a_large_answer_is_not_kept() -> None:
    replies, _ = cache()
    replies.begin("a", 1000)
    replies.finish("a", "large", MAX_KEPT_BYTES + 1)
    assert replies.begin("a", 1000) is None


def test_the_oldest_go_first_and_are_counted() -> None:
    replies, counters = cache(max_entries=3)
    for name in "abcd":
        replies.begin(name, 60_000)
        replies.finish(name, name, 1)
    assert len(replies) == 3
    assert counters["dropped.reply_cache"] == 1
    assert replies.begin("d", 1000) == "d"
    assert replies.begin("a", 1000) is None


def test_its_bytes_are_bounded_however_often_an_id_comes_back() -> None:
    replies, _ = cache(max_bytes=100)
    for turn in range(50):
        replies.begin("same", -40_000)  # beyond its margin at once: the next turn finds it old
        replies.finish("same", turn, 60)
    for number in range(5):
        replies.begin(f"{number}", 60_000)
        replies.finish(f"{number}", number, 60)
    assert len(replies) == 1
    assert replies.begin("4", 1000) == 4
