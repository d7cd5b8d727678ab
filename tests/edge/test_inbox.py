"""The bounded queue and the ledger of acknowledgements, without a broker."""

from __future__ import annotations

import threading

from edge.inbox import AckLedger, Inbox
from tests.edge.bus_support import wait_for
from tests.support.waiting import DEADLINE_S


def test_tickets_are_acknowledged_from_the_oldest_on() -> None:
    sent: list[int] = []
    ledger = AckLedger(sent.append)
    ledger.new_connection()
    tickets = [ledger.take(packet_id) for packet_id in (11, 12, 13, 14)]
    for number in (2, 1):
        ledger.settle(tickets[number])
    assert sent == []
    ledger.settle(tickets[0])
    assert sent == [11, 12, 13]
    ledger.settle(tickets[3])
    assert sent == [11, 12, 13, 14]
    assert ledger.owed == 0


def test_acknowledgements_of_an_older_connection_are_discarded() -> None:
    """Its packet ids mean other messages now."""
    sent: list[int] = []
    ledger = AckLedger(sent.append)
    ledger.new_connection()
    old = [ledger.take(packet_id) for packet_id in (1, 2)]
    ledger.new_connection()
    new = ledger.take(1)
    for ticket in old:
        ledger.settle(ticket)
    assert sent == []
    assert ledger.discarded == 2
    ledger.settle(new)
    assert sent == [1]


def test_a_broken_connection_is_owed_nothing_before_the_next_one_stands() -> None:
    sent: list[int] = []
    ledger = AckLedger(sent.append)
    ledger.new_connection()
    ticket = ledger.take(5)
    ledger.new_connection()  # broken
    ledger.settle(ticket)
    ledger.new_connection()  # the next
    assert sent == []


def test_qos_0_owes_nothing() -> None:
    sent: list[int] = []
    ledger = AckLedger(sent.append)
    ledger.settle(ledger.take(0))
    assert sent == []


def test_a_full_inbox_refuses_who_does_not_wait() -> None:
    inbox: Inbox[int] = Inbox(2)
    assert [inbox.offer(number, wait=False) for number in range(3)] == [True, True, False]
    assert inbox.take(10, 0.1) == [0, 1]
    assert not inbox.offer(3, wait=False), "what is in the handler's hands still counts"
    inbox.done(1)
    assert inbox.offer(3, wait=False)


def test_bytes_are_bounded_and_one_large_item_is_taken() -> None:
    inbox: Inbox[str] = Inbox(100, limit_bytes=10)
    assert inbox.offer("larger than all", 50, wait=False)
    assert not inbox.offer("next", 1, wait=False)
    assert inbox.take(10, 0.1) == ["larger than all"]
    assert inbox.offer("six", 6, wait=False)
    assert not inbox.offer("five", 5, wait=False)
    assert inbox.offer("four", 4, wait=False)


def test_nobody_sleeps_through_a_change() -> None:
    """A slow taker and a fast offerer hand 20,000 items over a queue of four."""
    inbox: Inbox[int] = Inbox(4)
    taken: list[int] = []

    def take() -> None:
        while len(taken) < 20_000:
            items = inbox.take(3, 5.0)
            taken.extend(items)
            inbox.done(len(items))

    taker = threading.Thread(target=take)
    taker.start()
    for number in range(20_000):
        assert inbox.offer(number, wait=True)
    taker.join(DEADLINE_S)
    assert taken == list(range(20_000))


def test_closing_wakes_both_sides() -> None:
    empty: Inbox[int] = Inbox(1)
    full: Inbox[int] = Inbox(1)
    full.offer(1, wait=False)
    results: list[object] = []
    threads = [
        threading.Thread(target=lambda: results.append(empty.take(1, 30))),
        threading.Thread(target=lambda: results.append(full.offer(2, wait=True))),
    ]
    for thread in threads:
        thread.start()
    empty.close()
    full.close()
    for thread in threads:
        thread.join(DEADLINE_S)
    wait_for(lambda: len(results) == 2, "both have returned")
    assert sorted(map(str, results)) == ["False", "[]"]
    assert empty.closed
    assert not full.closed, "what waits can still be taken"
    assert full.take(1, 0) == [1]
