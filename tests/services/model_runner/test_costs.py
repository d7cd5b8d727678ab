"""What is predicted of handing over: whatever was measured, and in whatever order."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from services.model_runner.costs import (
    EXACT_WORTH,
    EXACT_WORTH_S,
    MOST_PROBE_BYTES,
    TOKENS,
    Estimate,
    Here,
    Link,
    Option,
    PrefillRate,
    RungOffer,
    Wanted,
    choose,
    larger_probe_bytes,
    overlapped,
    predict,
    probe_bytes,
    should_read_instead,
)

DAY_US = 86_400_000_000
EXACT = Wanted()
seconds = st.floats(1e-9, 1e4)
times_us = st.integers(0, 400 * DAY_US)


def measured(values: list[float], now_us: int = 0) -> Estimate:
    found = Estimate()
    for value in values:
        found.add(value, now_us)
    return found


@given(st.lists(seconds, min_size=1, max_size=60))
def test_an_estimate_lies_within_what_was_measured(values: list[float]) -> None:
    likely = measured(values).likely
    assert min(values) * (1 - 1e-9) <= likely <= max(values) * (1 + 1e-9)


@given(st.lists(seconds, min_size=1, max_size=20), times_us, times_us)
def test_caution_never_falls_below_what_is_likely_and_grows_with_age(
    values: list[float], earlier_us: int, later_us: int
) -> None:
    found = measured(values)
    earlier_us, later_us = sorted((earlier_us, later_us))
    assert found.likely <= found.cautious(earlier_us) <= found.cautious(later_us) <= 4.001 * found.likely


@given(seconds, st.integers(1, 30), st.integers(1, 30), times_us)
def test_the_more_equal_measurements_the_less_caution(value: float, few: int, more: int, now_us: int) -> None:
    few, more = sorted((few, more))
    assert measured([value] * more).cautious(now_us) <= measured([value] * few).cautious(now_us) * (1 + 1e-9)


@given(st.lists(seconds, min_size=1, max_size=20), seconds)
def test_a_measurement_draws_the_estimate_towards_it(values: list[float], new: float) -> None:
    found = measured(values)
    before = abs(found.log_mean - math.log(new))
    found.add(new, 0)
    assert abs(found.log_mean - math.log(new)) <= before + 1e-9


def test_what_was_never_measured_has_no_time() -> None:
    assert Estimate().likely == Estimate().cautious(0) == math.inf
    assert PrefillRate().seconds(0, 10) == math.inf
    assert PrefillRate().seconds(10, 10) == 0


chunk = st.tuples(st.integers(0, 8_000), st.integers(1, 256), st.floats(1e-5, 10))


@given(st.lists(chunk, min_size=1, max_size=40), st.lists(st.integers(0, 20_000), min_size=3, max_size=3))
def test_reading_has_a_time_that_grows_with_the_length_and_adds_up(
    chunks: list[tuple[int, int, float]], places: list[int]
) -> None:
    rate = PrefillRate()
    for start, tokens, took_s in chunks:
        rate.add(start, start + tokens, took_s, 0)
    first, second, third = sorted(places)
    whole = rate.seconds(first, third)
    assert 0 <= rate.seconds(first, second) <= whole < math.inf
    assert math.isclose(rate.seconds(first, second) + rate.seconds(second, third), whole, rel_tol=1e-6, abs_tol=1e-9)


def test_a_rate_that_falls_with_the_position_is_found_again() -> None:
    rate = PrefillRate()
    for start in range(0, 4_096, 64):
        rate.add(start, start + 64, 64 * (0.002 + 1e-6 * (start + 32)), 0)
    assert math.isclose(rate.seconds(0, 4_096), 0.002 * 4_096 + 1e-6 * 4_096**2 / 2, rel_tol=1e-6)
    assert rate.tokens_per_s(100) > rate.tokens_per_s(4_000)


def test_a_machine_that_became_slower_is_noticed() -> None:
    rate = PrefillRate()
    for took_s in [0.1] * 200 + [0.4] * 1_500:
        rate.add(0, 64, took_s, 0)
    assert rate.seconds(0, 64) > 0.3


def test_what_is_small_says_nothing_of_a_links_rate() -> None:
    link = Link()
    link.transfer(500, 3.0, 0)
    assert not link.byte.known
    link.transfer(1_000_000, 1.0, 0)
    assert math.isclose(link.byte.likely, 1e-6, rel_tol=1e-6)


def test_a_probe_that_came_as_quickly_as_an_empty_answer_tells_of_a_fast_link() -> None:
    link = Link()
    for _ in range(5):
        link.latency.add(0.004, 0)
    link.transfer(20_000, 0.003, 0)
    assert link.byte.known
    assert 0.0005 / 20_000 < link.byte.likely < 0.003 / 20_000


# --- choosing -------------------------------------------------------------------------------------------------


def here(link_s: float = 1e-8, prefill_s: float = 0.005, decode_s: float = 5e-9, **given_: object) -> Here:
    rate = PrefillRate()
    rate.add(0, 64, 64 * prefill_s, 0)
    link = Link()
    for _ in range(5):
        link.latency.add(0.002, 0)
        link.byte.add(link_s, 0)
    decode = {name: measured([decode_s] * 5) for name in ("raw", "lossless", "int8", "rotated4")}
    return Here(**{"now_us": 0, "prefill": rate, "link": link, "decode": decode, **given_})  # type: ignore[arg-type]


def offers(tokens: int, save_s: float = 0.1) -> list[RungOffer]:
    kv = 46_080 * tokens
    return [
        RungOffer("raw", True, kv, save_s),
        RungOffer("lossless", True, int(kv / 1.3), 2 * save_s),
        RungOffer("int8", False, int(kv / 3.9), save_s, 0.0001, 0.995),
        RungOffer("rotated4", False, int(kv / 7.6), 2 * save_s, 0.0035, 0.971),
    ]


def decided(tokens: int, at: Here, wanted: Wanted = EXACT, refused: str = "") -> tuple[Option, list[Option]]:
    rungs = offers(tokens)
    options = predict(tokens, 46_080 * tokens, rungs, at, kv_refused=refused)
    return choose(options, rungs, wanted), options


situations = st.tuples(st.integers(2, 8_192), st.floats(1e-10, 1e-4), st.floats(1e-5, 0.5), st.floats(1e-10, 1e-6))


@given(situations, st.booleans())
def test_the_quickest_that_is_allowed_is_taken_and_it_is_no_slower_than_reading(
    situation: tuple[int, float, float, float], lossy: bool
) -> None:
    tokens, link_s, prefill_s, decode_s = situation
    best, options = decided(tokens, here(link_s, prefill_s, decode_s), Wanted(lossy=lossy))
    assert options[0].codec == TOKENS
    assert best.beside or best.cautious_s <= EXACT_WORTH * options[0].cautious_s + EXACT_WORTH_S + 1e-9
    assert best.likely_s <= EXACT_WORTH * options[0].likely_s + EXACT_WORTH_S + 1e-9
    assert best.codec in ({TOKENS, "raw", "lossless", "int8", "rotated4"} if lossy else {TOKENS, "raw", "lossless"})
    assert [option.codec for option in options if not option.why_not] == [best.codec]
    allowed = [option for option in options if lossy or option.codec in (TOKENS, "raw", "lossless")]
    soonest_s = min(option.cautious_s for option in allowed)
    assert best.beside or best.cautious_s <= EXACT_WORTH * soonest_s + EXACT_WORTH_S + 1e-9


@given(situations)
def test_a_faster_link_makes_no_handoff_slower(situation: tuple[int, float, float, float]) -> None:
    tokens, link_s, prefill_s, decode_s = situation
    slow, _ = decided(tokens, here(link_s, prefill_s, decode_s), Wanted(lossy=True))
    fast, _ = decided(tokens, here(link_s / 2, prefill_s, decode_s), Wanted(lossy=True))
    # Where the cache is worth waiting for a little, because it is exact, it is waited for.
    assert fast.cautious_s <= EXACT_WORTH * slow.cautious_s + EXACT_WORTH_S + 1e-9


def test_a_slow_link_takes_tokens_a_fast_one_the_cache_and_one_between_a_smaller_rung() -> None:
    lossy = Wanted(lossy=True)
    assert decided(4_096, here(8e-6), lossy)[0].codec == TOKENS  # 1 Mbit/s
    assert decided(4_096, here(8e-8), lossy)[0].codec == "rotated4"  # 100 Mbit/s
    assert decided(4_096, here(1e-9))[0].codec == "raw"
    assert decided(64, here(8e-8))[0].codec == TOKENS


def test_kv_that_is_likely_quicker_is_taken_beside_reading_where_it_waits_for_the_link() -> None:
    unsure = measured([0.7e-7, 1.5e-7])
    link = Link(measured([0.002]), unsure)
    best, options = decided(1_024, here(link=link))
    assert best.codec == "lossless"
    assert best.likely_s < options[0].likely_s < best.cautious_s
    assert best.beside
    assert "beside" in options[0].why_not
    # Where decoding is what takes long, reading would slow it down.
    busy, options = decided(1_024, here(link=link, decode={"lossless": measured([0.7e-7])}))
    assert busy.codec == TOKENS
    assert not busy.beside
    # What is quicker by far needs nothing beside it.
    assert not decided(4_096, here(1e-9))[0].beside


def test_a_kv_that_cannot_be_used_is_never_taken() -> None:
    best, options = decided(4_096, here(1e-10), Wanted(lossy=True), refused="other weights")
    assert best.codec == TOKENS
    assert {option.why_not for option in options[1:]} == {"other weights"}


def test_a_node_that_knows_nothing_reads_again() -> None:
    nothing = Here(0, PrefillRate(), Link(), {})
    best, options = decided(4_096, nothing, Wanted(lossy=True))
    assert best.codec == TOKENS
    assert "never measured" in options[1].why_not
    no_link = here(prefill_s=0.005)
    no_link.link.byte = Estimate()
    assert decided(4_096, no_link)[0].codec == TOKENS


def test_a_basis_that_would_have_to_be_fetched_counts() -> None:
    offer = RungOffer("transform", False, 10_000_000, 0.5, 0.01, 0.95, b"b" * 32, 66_000_000)
    decode = {"transform": measured([1e-9] * 5)}
    fetched, has = (
        predict(4_096, 188_000_000, [offer], here(1e-7, decode=decode, bases=bases))[1]
        for bases in (frozenset(), frozenset({b"b" * 32}))
    )
    assert fetched.phases_s["transfer"] > has.phases_s["transfer"] + 6
    assert fetched.likely_s > has.likely_s + 6


def test_what_is_asked_of_fidelity_is_kept() -> None:
    best, options = decided(4_096, here(8e-8), Wanted(lossy=True, most_kl=0.001, least_top1=0.99))
    assert best.codec == "int8"
    assert "0.0035 nats" in next(option.why_not for option in options if option.codec == "rotated4")


@given(st.floats(0, 100), st.floats(0, 100))
def test_overlapping_is_never_slower_than_one_after_the_other_nor_quicker_than_either(a: float, b: float) -> None:
    assert max(a, b) <= overlapped(a, b) <= a + b + 1e-9


@given(st.integers(0, 10**9), st.floats(0, 1e-4), st.floats(0, 100), st.floats(0.001, 100))
def test_reading_begins_beside_a_transfer_only_when_it_would_be_quicker(
    left_bytes: int, byte_s: float, waited_s: float, prefill_s: float
) -> None:
    begins = should_read_instead(
        left_bytes=left_bytes, byte_s=byte_s, waited_s=waited_s, decode_left_s=0.0, prefill_s=prefill_s
    )
    if begins:
        assert left_bytes * byte_s > prefill_s
    elif waited_s > prefill_s + 1:
        assert left_bytes * byte_s <= prefill_s


def test_a_transfer_of_which_nothing_came_is_given_up_after_a_while() -> None:
    def begins(waited_s: float) -> bool:
        return should_read_instead(left_bytes=10, byte_s=math.inf, waited_s=waited_s, decode_left_s=0.0, prefill_s=1.0)

    assert not begins(0.01)
    assert begins(0.2)


@given(st.floats(0, 1e5))
def test_a_probe_costs_a_small_share_of_reading_again_on_the_slowest_link(prefill_s: float) -> None:
    assert 2_048 <= probe_bytes(prefill_s) <= 65_536
    assert probe_bytes(prefill_s) / 125_000 <= 0.04 * prefill_s + 0.017


def test_a_probe_is_followed_by_a_larger_one_only_where_it_came_at_once() -> None:
    # 5 kB in hardly more than an empty answer takes: a fast link, how fast is not known.
    assert larger_probe_bytes(5_000, 0.004, 0.0035, 0.036) == 45_000
    assert larger_probe_bytes(50_000, 0.004, 0.0035, 10.0) == MOST_PROBE_BYTES
    assert larger_probe_bytes(MOST_PROBE_BYTES, 0.004, 0.0035, 10.0) == 0
    # Its bytes took their time: the rate is known.
    assert larger_probe_bytes(5_000, 0.04, 0.0035, 10.0) == 0
    # No time is left for one that would say more.
    assert larger_probe_bytes(5_000, 0.004, 0.0035, 0.005) == 0
    assert larger_probe_bytes(5_000, 0.004, 0.0, 10.0) == 0, "nothing is known of an empty answer"
