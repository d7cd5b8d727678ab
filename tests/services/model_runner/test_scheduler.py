"""The policy alone: who gets the engine, chunk by chunk and step by step."""

from __future__ import annotations

from collections import Counter

from protocol.ids import uuid7
from services.model_runner.scheduler import BACKGROUND_EVERY, PASSED_BY_MAX, Scheduler, Work


def reading(scheduler: Scheduler, asker: str, tokens: int, *, background: bool = False) -> Work:
    work = Work(asker, uuid7(), background, "reading", tokens)
    scheduler.add(work)
    return work


def decoding(scheduler: Scheduler, asker: str, *, background: bool = False) -> Work:
    work = Work(asker, uuid7(), background, "decoding")
    scheduler.add(work)
    return work


def waiting(scheduler: Scheduler, asker: str, conversation: str = "", *, background: bool = False) -> Work:
    work = Work(asker, conversation or uuid7(), background)
    scheduler.add(work)
    return work


def do_round(scheduler: Scheduler, *, chunk: int = 256, chunk_s: float = 0.2, step_s: float = 0.03) -> list[Work]:
    """One round as the engine would do it; those it served."""
    read, step = scheduler.next_round()
    if read is not None:
        scheduler.charge([read], chunk_s)
        read.left_tokens -= chunk
        if read.left_tokens <= 0:
            scheduler.move(read, "decoding")
    if step:
        scheduler.charge(step, step_s)
    return [*([read] if read else []), *step]


def begin(scheduler: Scheduler) -> Work | None:
    work = scheduler.next_to_begin(lambda _: True)
    if work is not None:
        scheduler.move(work, "decoding")
    return work


def test_a_running_answer_has_its_step_after_each_chunk_of_a_prompt() -> None:
    scheduler = Scheduler(max_batch=8)
    running = [decoding(scheduler, "a") for _ in range(8)]
    prompt = reading(scheduler, "b", 1024)
    rounds = [scheduler.next_round() for _ in range(5)][1:]
    assert [(read, len(step)) for read, step in rounds] == [(prompt, 8)] * 4
    assert rounds[0].step == running


def test_chunks_run_back_to_back_when_nothing_is_decoded() -> None:
    scheduler = Scheduler()
    prompt = reading(scheduler, "a", 1024)
    for _ in range(4):
        assert do_round(scheduler) == [prompt]
    assert prompt.stage == "decoding"


def test_more_answers_than_a_batch_take_turns_and_a_chunk_comes_once_for_all_of_them() -> None:
    scheduler = Scheduler(max_batch=4)
    answers = [decoding(scheduler, "a") for _ in range(12)]
    reading(scheduler, "a", 10_000)
    chunks = 0
    steps: Counter[Work] = Counter()
    for _ in range(30):
        read, step = scheduler.next_round()
        chunks += read is not None
        steps.update(step)
        scheduler.charge(step, 0.1)
    assert {steps[work] for work in answers} == {10}
    assert chunks in (9, 10)


def test_one_asker_with_a_hundred_answers_leaves_another_its_share() -> None:
    scheduler = Scheduler(max_batch=4)
    for _ in range(100):
        decoding(scheduler, "many")
    one = decoding(scheduler, "one")
    served = sum(one in do_round(scheduler) for _ in range(50))
    assert served == 50, "its share is a quarter, and it wants no more than that"


def test_one_asker_with_a_hundred_prompts_leaves_another_its_share() -> None:
    scheduler = Scheduler(max_batch=8)
    for _ in range(100):
        reading(scheduler, "many", 2560)
    for _ in range(20):
        do_round(scheduler)
    one = reading(scheduler, "one", 1024)
    rounds = 0
    while one.stage == "reading":
        do_round(scheduler)
        rounds += 1
    assert rounds <= 9


def test_a_short_prompt_passes_a_long_one_which_gets_on_all_the_same() -> None:
    scheduler = Scheduler()
    long = reading(scheduler, "a", 256 * 20)
    do_round(scheduler)
    done = []
    for _ in range(40):
        short = reading(scheduler, "a", 200)
        rounds = 0
        while short.stage == "reading":
            do_round(scheduler)
            rounds += 1
        done.append(rounds)
        scheduler.remove(short)
        if long.stage != "reading":
            break
    assert max(done) <= 3
    assert long.stage != "reading", "it never got to its end"


def test_equal_prompts_are_read_one_after_another() -> None:
    scheduler = Scheduler(max_batch=8)
    prompts = [reading(scheduler, "a", 1024) for _ in range(4)]
    ends = []
    for _ in range(24):
        do_round(scheduler)
        ends += [work for work in prompts if work.stage == "decoding" and work not in ends]
    assert ends == prompts


def test_background_work_gives_way_and_is_never_starved() -> None:
    scheduler = Scheduler(max_batch=2)
    for _ in range(2):
        decoding(scheduler, "a")
    reading(scheduler, "a", 10**9)
    background = [decoding(scheduler, "b", background=True), reading(scheduler, "b", 10**9, background=True)]
    served: Counter[Work] = Counter()
    rounds = 10 * BACKGROUND_EVERY
    for _ in range(rounds):
        served.update(do_round(scheduler))
    for work in background:
        assert 5 <= served[work] <= 10, "one round in so many is its own"
    alone = Scheduler(max_batch=2)
    job = decoding(alone, "b", background=True)
    assert all(do_round(alone) == [job] for _ in range(20)), "it waits for nobody when nobody is there"


def test_a_background_run_begins_when_no_person_waits_and_now_and_then_all_the_same() -> None:
    scheduler = Scheduler()
    job = waiting(scheduler, "b", background=True)
    begun: list[Work | None] = []
    for _ in range(2 * BACKGROUND_EVERY):
        waiting(scheduler, "a")
        begun.append(begin(scheduler))
    assert begun.index(job) == BACKGROUND_EVERY - 1


def test_the_next_to_begin_is_the_asker_s_that_has_had_least() -> None:
    scheduler = Scheduler()
    for _ in range(10):
        waiting(scheduler, "many")
    for _ in range(2):
        begin(scheduler)
    do_round(scheduler)
    one = waiting(scheduler, "one")
    do_round(scheduler)
    assert begin(scheduler) is one


def test_one_conversation_has_one_run_at_a_time_in_order_of_arrival() -> None:
    scheduler = Scheduler()
    first, second = waiting(scheduler, "a", "c"), waiting(scheduler, "b", "c")
    other = waiting(scheduler, "b", "d")
    assert [begin(scheduler), begin(scheduler), begin(scheduler)] == [first, other, None]
    scheduler.remove(first)
    assert begin(scheduler) is second


def test_a_run_that_needs_much_memory_is_passed_a_few_times_and_not_for_ever() -> None:
    scheduler = Scheduler()
    large = waiting(scheduler, "a")
    begun = 0
    for _ in range(3 * PASSED_BY_MAX):
        waiting(scheduler, "a")
        work = scheduler.next_to_begin(lambda work: work is not large)
        if work is None:
            break
        scheduler.remove(work)
        begun += 1
    assert begun == PASSED_BY_MAX
    assert scheduler.next_to_begin(lambda _: True) is large


def test_an_asker_who_was_away_has_saved_up_nothing() -> None:
    scheduler = Scheduler(max_batch=1)
    old = decoding(scheduler, "old")
    for _ in range(100):
        do_round(scheduler)
    new = decoding(scheduler, "new")
    served = Counter(work for _ in range(20) for work in do_round(scheduler))
    assert served == {old: 10, new: 10}
