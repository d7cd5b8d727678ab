"""Load or recompute: how long each way of taking a conversation over would take, from what this node has measured.

Everything here is arithmetic: no clock, no file, no bus. Three things are measured on real work and kept
(``cost_book``): how fast this node reads a prompt, how fast each peer's link is, and how fast each codec rung is here.
Each is an estimate with its number of measurements and its age, and both make it more or less *cautious*: a way is
taken for what it will take at worst, within reason, and reading again for what it takes as a rule. So a node that knows
nothing reads again, and one that knows takes the quickest (compare Jin et al., "Compute Or Load KV Cache? Why Not
Both?", arXiv 2410.03065).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

MOST_COUNT = 24.0
"""An estimate forgets: a new value weighs at least one against so many before it."""
UNSURE_VAR = 0.16
"""Of the logarithm of an estimate from one measurement: it may be half as much again."""
DRIFT_VAR_PER_DAY = 0.12
"""By so much it grows with each day since the last measurement: other things run, links change."""
MOST_SPREAD = math.log(4)
LEAST_SECONDS = 1e-12

TOKENS = "tokens"
"""The option that sends no KV: token ids alone, read again here."""


class Estimate(msgspec.Struct):
    """Seconds for one unit of some work, measured now and then; its logarithm is what is averaged."""

    log_mean: float = 0.0
    log_var: float = 0.0
    """Of the values around their mean."""
    count: float = 0.0
    """Measurements that it rests on, the older ones forgotten."""
    updated_us: int = 0

    def add(self, seconds: float, now_us: int, weight: float = 1.0) -> None:
        """Take in a measurement. ``weight`` above 0 and at most 1: less for one that is poor."""
        value = math.log(max(seconds, LEAST_SECONDS))
        self.count = min(self.count, MOST_COUNT) + weight
        share = weight / self.count
        apart = value - self.log_mean
        self.log_mean += share * apart
        self.log_var = (1 - share) * (self.log_var + share * apart * apart)
        self.updated_us = max(self.updated_us, now_us)

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return self.count > 0

    @property
    def likely(self) -> float:
        """Seconds for one unit; infinite when nothing was measured."""
        return math.exp(self.log_mean) if self.known else math.inf

    def spread(self, now_us: int) -> float:
        """How far off ``likely`` may be, as a logarithm: the more, the fewer and the older the measurements."""
        age_days = max(0, now_us - self.updated_us) / 86_400e6
        var = self.log_var + UNSURE_VAR / max(self.count, 0.25) + DRIFT_VAR_PER_DAY * age_days
        return min(MOST_SPREAD, math.sqrt(var))

    def cautious(self, now_us: int) -> float:
        """Seconds for one unit if things go badly."""
        return self.likely * math.exp(self.spread(now_us)) if self.known else math.inf


class PrefillRate(msgspec.Struct):
    """Seconds to read a token at a position: ``base + slope * position``, fitted to the chunks that were read.

    Attention over what is before it makes a later token dearer; that part is linear, and so two numbers are enough.
    Least squares over (position, seconds a token), each chunk weighing as many tokens as it has, the older ones
    forgotten.
    """

    weight: float = 0.0
    sum_x: float = 0.0
    sum_xx: float = 0.0
    sum_y: float = 0.0
    sum_xy: float = 0.0
    count: float = 0.0
    updated_us: int = 0

    HORIZON_TOKENS = 32_768.0

    def add(self, start: int, end: int, seconds: float, now_us: int) -> None:
        """Take in a chunk of positions ``start`` to ``end`` that took ``seconds``."""
        tokens = end - start
        if tokens <= 0 or not 0 < seconds < math.inf:
            return
        keep = max(0.0, 1 - tokens / self.HORIZON_TOKENS)
        x, y = (start + end) / 2, seconds / tokens
        self.weight = keep * self.weight + tokens
        self.sum_x = keep * self.sum_x + tokens * x
        self.sum_xx = keep * self.sum_xx + tokens * x * x
        self.sum_y = keep * self.sum_y + tokens * y
        self.sum_xy = keep * self.sum_xy + tokens * x * y
        self.count = min(self.count, 1e6) + 1
        self.updated_us = max(self.updated_us, now_us)

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return self.weight > 0

    def line(self) -> tuple[float, float]:
        """Base and slope, neither below 0; infinite when nothing was measured."""
        if not self.known:
            return math.inf, 0.0
        mean_x, mean_y = self.sum_x / self.weight, self.sum_y / self.weight
        var_x = self.sum_xx / self.weight - mean_x * mean_x
        cov = self.sum_xy / self.weight - mean_x * mean_y
        # Chunks of one place alone say nothing of a slope.
        slope = max(0.0, cov / var_x) if var_x > 1.0 else 0.0
        base = mean_y - slope * mean_x
        if base <= 0:  # noise has tilted it: through the origin, and through the mean
            return mean_y * 1e-3, mean_y * 0.999 / max(mean_x, 0.5)
        return base, slope

    def seconds(self, start: int, end: int) -> float:
        """To read positions ``start`` to ``end``."""
        if end <= start:
            return 0.0
        base, slope = self.line()
        return base * (end - start) + slope * (end * end - start * start) / 2

    def tokens_per_s(self, tokens: int) -> float:
        """Mean rate of a prompt of ``tokens``, 0 when nothing was measured."""
        seconds = self.seconds(0, tokens)
        return tokens / seconds if 0 < seconds < math.inf else 0.0


class Link(msgspec.Struct):
    """What is known of the way between this node and a peer."""

    latency: Estimate = msgspec.field(default_factory=Estimate)
    """Seconds of an ask and its answer, both small."""
    byte: Estimate = msgspec.field(default_factory=Estimate)
    """Seconds a byte of what the peer sends."""

    def transfer(self, size_bytes: int, seconds: float, now_us: int) -> None:
        """Something came. What is small says little of the rate: most of its time is latency."""
        if size_bytes >= LEAST_RATED_BYTES and seconds > 0:
            # What came as quickly as an empty answer came over a fast link: how fast is not known, but that is.
            own = max(seconds - (self.latency.likely if self.latency.known else 0.0), LEAST_MOVING * seconds)
            self.byte.add(own / size_bytes, now_us, min(1.0, size_bytes / FULL_RATED_BYTES))


LEAST_MOVING = 0.2
"""At least this share of a transfer's time counts as its bytes' own."""
LEAST_RATED_BYTES = 2_000
FULL_RATED_BYTES = 1_000_000


class RungOffer(msgspec.Struct, frozen=True):
    """One rung in which a holder would save a conversation."""

    codec: str
    """``raw``, ``lossless``, ``int8``, ``rotated4``, ``transform`` or ``transform/LEVEL``."""
    exact: bool
    size_bytes: int
    """That would be sent: measured where the snapshot exists, else by the rung's usual ratio."""
    save_s: float
    """Holder's cautious estimate to encode, seal and write it; 0 when it exists already, infinite when unknown."""
    mean_kl: float = 0.0
    """Usual, nats a token."""
    top1: float = 1.0
    """Usual."""
    basis: bytes = b""
    """Digest of the basis that decoding needs; empty for none."""
    basis_bytes: int = 0


class Wanted(msgspec.Struct, frozen=True):
    """The fidelity that a handoff must have."""

    lossy: bool = False
    """Whether a rung that is not exact may be taken at all."""
    most_kl: float = 0.02
    least_top1: float = 0.94


class Option(msgspec.Struct):
    """One way, and what it is predicted to take."""

    codec: str
    """A rung, or ``tokens``."""
    size_bytes: int
    phases_s: dict[str, float]
    """Likely seconds of ``ask``, ``save``, ``transfer``, ``decode``, ``prefill``; transfer and decode run beside each
    other."""
    likely_s: float
    """Until the next token can be generated; infinite when something of it is not known."""
    cautious_s: float
    """If things go badly: what it is compared by, against the likely time of reading again."""
    why_not: str = ""
    """Why it cannot be taken at all, or was not; empty for the one that is taken."""
    beside: bool = False
    """Whether reading again goes on beside it from the beginning, as that may well be the first to be done."""


class Here(msgspec.Struct, frozen=True):
    """What the receiving node knows, at one moment."""

    now_us: int
    prefill: PrefillRate
    link: Link
    decode: dict[str, Estimate]
    """Seconds a byte of KV to verify, decrypt, decode and import, by codec."""
    local: bool = False
    """Whether the snapshot is on this node's own disk."""
    bases: frozenset[bytes] = frozenset()
    """Digests of the bases that are here."""
    read_tokens: int = 0
    """Tokens of the beginning that are in memory here already, and would not be read again."""


DECODE_ALONE = 1 / 16
"""Share of decoding that is left when the last byte has come: the last blocks."""
MANIFEST_BYTES, MANIFEST_BYTES_PER_TOKEN = 1_500, 4
MANIFEST_BYTES_PER_CHUNK = 33
CHUNK_BYTES = 524_288


def manifest_bytes(tokens: int, size_bytes: int) -> int:
    """Of a snapshot of ``tokens`` whose chunks take ``size_bytes``, about."""
    return MANIFEST_BYTES + MANIFEST_BYTES_PER_TOKEN * tokens + MANIFEST_BYTES_PER_CHUNK * -(-size_bytes // CHUNK_BYTES)


def predict(
    tokens: int,
    kv_bytes: int,
    rungs: Iterable[RungOffer],
    here: Here,
    *,
    kv_refused: str = "",
    computed_share: float = 0.0,
) -> list[Option]:
    """Every way, with its time; the first is reading again.

    Args:
        tokens: of the conversation, the pending one included.
        kv_bytes: of its KV in memory.
        kv_refused: why no KV of the holder's can be used here (other weights, say); empty when it can.
        computed_share: of the prompt's reading, that is done again where KV is another variant's.
    """
    found = [_reading(tokens, here)]
    found += [_loading(tokens, kv_bytes, rung, here, kv_refused) for rung in rungs]
    if computed_share:
        for option in found[1:]:
            # All of the prompt goes through them, what is in memory here of another conversation too.
            option.phases_s["prefill"] = again_s = computed_share * here.prefill.seconds(0, tokens - 1)
            option.likely_s += again_s
            option.cautious_s += again_s
    return found


def _seconds(estimate: Estimate, units: float, here: Here) -> tuple[float, float]:
    """Likely and cautious, of so many units."""
    if units <= 0:
        return 0.0, 0.0
    return estimate.likely * units, estimate.cautious(here.now_us) * units


def _link(asks: int, size_bytes: int, here: Here) -> tuple[float, float]:
    if here.local:
        return 0.0, 0.0
    latency, worse = _seconds(here.link.latency, asks, here)
    moving, slower = _seconds(here.link.byte, size_bytes, here)
    return latency + moving, worse + slower


def _reading(tokens: int, here: Here) -> Option:
    # The manifest's way is not known on a link that was never used; reading again must always have a time.
    manifest, _ = _link(1, manifest_bytes(tokens, 0), here)
    manifest = manifest if manifest < math.inf else 0.0
    prefill = here.prefill.seconds(min(here.read_tokens, tokens - 1), tokens - 1)
    phases = {"ask": manifest, "prefill": prefill}
    total = manifest + prefill
    return Option(TOKENS, manifest_bytes(tokens, 0), phases, total, total)


def _loading(tokens: int, kv_bytes: int, rung: RungOffer, here: Here, kv_refused: str) -> Option:
    manifest, slow_manifest = _link(2, manifest_bytes(tokens, rung.size_bytes), here)
    transfer, slow_transfer = _link(1, rung.size_bytes, here)
    basis_bytes = 0 if not rung.basis or rung.basis in here.bases else rung.basis_bytes
    basis, slow_basis = _link(2, basis_bytes, here) if basis_bytes else (0.0, 0.0)
    decode, slow_decode = _seconds(here.decode.get(rung.codec, Estimate()), kv_bytes, here)
    phases = {"ask": manifest, "save": rung.save_s, "transfer": basis + transfer, "decode": decode}
    likely = manifest + rung.save_s + basis + overlapped(transfer, decode)
    cautious = slow_manifest + rung.save_s + slow_basis + overlapped(slow_transfer, slow_decode)
    return Option(rung.codec, rung.size_bytes, phases, likely, cautious, kv_refused)


def overlapped(transfer_s: float, decode_s: float) -> float:
    """Seconds of both, each block being decoded while later ones arrive."""
    if math.inf in (transfer_s, decode_s):
        return math.inf
    return max(transfer_s + DECODE_ALONE * decode_s, decode_s)


EXACT_WORTH, EXACT_WORTH_S = 1.05, 0.03
"""Exact KV may take so much longer than reading again, which is not exact, and is taken all the same."""
PROMISING = 0.85
"""KV that is likely to take at most this share of reading's time is taken although it may take longer."""
BESIDE_FROM = 0.5
"""KV that may take more than this share of reading's time, if things go badly, has reading begin beside it."""


def choose(
    options: Sequence[Option],
    rungs: Iterable[RungOffer],
    wanted: Wanted,
    *,
    way: Literal["auto", "chunks", "tokens"] = "auto",
) -> Option:
    """The quickest way of ``options`` that has the fidelity asked for; why not is noted in the others.

    Loading must be quicker, if things go badly, than reading again is as a rule; where it is exact it may take a little
    longer. What waits for the link more than it computes leaves the processor to reading again: then both may go on
    beside each other, so that little is lost when the prediction was wrong, and what is likely is enough. ``way`` says
    it outright: KV wherever it can be used, or reading again.
    """
    offers = {rung.codec: rung for rung in rungs}
    reading = options[0]
    loading: list[Option] = []
    for option in options[1:]:
        option.why_not = option.why_not or _unfaithful(offers[option.codec], wanted)
        if not option.why_not and option.cautious_s == math.inf and way != "chunks":
            option.why_not = "not known how long it takes: it was never measured"
        if not option.why_not:
            loading.append(option)
    best = reading
    quickest = min(loading, key=lambda option: option.cautious_s, default=None)
    if quickest is not None and way == "chunks":
        best = quickest
    elif quickest is not None and way == "auto":
        exact = min(
            (option for option in loading if offers[option.codec].exact),
            key=lambda option: option.cautious_s,
            default=None,
        )
        promising = min(filter(_waits, loading), key=lambda option: option.likely_s, default=None)
        if quickest.cautious_s < reading.cautious_s:
            best = quickest
        elif promising is not None and promising.likely_s <= PROMISING * reading.likely_s:
            best = promising
        elif exact is not None and exact.cautious_s <= EXACT_WORTH * reading.cautious_s + EXACT_WORTH_S:
            best = exact
        best.beside = best is not reading and _waits(best) and best.cautious_s > BESIDE_FROM * reading.cautious_s
    for option in options:
        if option is not best and not option.why_not:
            option.why_not = _slower(option, best, way)
    return best


def _waits(option: Option) -> bool:
    """Whether it waits for the link more than it computes."""
    return option.phases_s.get("transfer", 0.0) > 2 * option.phases_s.get("decode", 0.0)


def _slower(option: Option, best: Option, way: str) -> str:
    if way != "auto" and TOKENS in (option.codec, best.codec):
        return f"{best.codec if way == 'tokens' else 'its KV'} was asked for"
    if option.codec == TOKENS and best.beside:
        return f"it goes on beside {best.codec}, and the first to be done wins"
    if option.cautious_s <= best.cautious_s and best.beside:
        return f"{best.codec} is likely to be quicker"
    if option.cautious_s <= best.cautious_s:
        return "it would not be exact"
    return f"{best.codec} is quicker" + (" if things go badly" if option.likely_s < best.likely_s else "")


def _unfaithful(offer: RungOffer, wanted: Wanted) -> str:
    if offer.exact:
        return ""
    if not wanted.lossy:
        return "not exact, and nothing lossy was allowed"
    if offer.mean_kl > wanted.most_kl or offer.top1 < wanted.least_top1:
        return (
            f"usually {offer.mean_kl:.4f} nats and {offer.top1:.3f} of top-1, and at most {wanted.most_kl:g} and at "
            f"least {wanted.least_top1:g} were asked for"
        )
    return ""


def should_read_instead(
    *,
    left_bytes: int,
    byte_s: float,
    waited_s: float,
    decode_left_s: float,
    prefill_s: float,
    patience: float = 0.05,
    least_s: float = 0.02,
) -> bool:
    """Whether to begin reading again while a transfer goes on: it is slower than was predicted.

    Args:
        left_bytes: not here yet.
        byte_s: seconds a byte so far, infinite when nothing has come.
        waited_s: since the decision.
        decode_left_s: of what is not here yet.
        prefill_s: of reading again, all of it.
        patience: of ``prefill_s``, and ``least_s`` beside it: so long it is waited before anything is concluded.
    """
    if waited_s < patience * prefill_s + least_s:
        return False
    return overlapped(left_bytes * byte_s if left_bytes else 0.0, decode_left_s) > prefill_s


def probe_bytes(prefill_s: float) -> int:
    """How large the first probe may be: for a few per cent of reading again, by the slowest link foreseen."""
    return int(min(65_536, max(2_048, SLOWEST_BYTES_PER_S * PROBE_SHARE * prefill_s)))


def larger_probe_bytes(size_bytes: int, took_s: float, latency_s: float, left_s: float) -> int:
    """How large the next probe is, after one of ``size_bytes`` came in ``took_s``; 0 when that says enough.

    What came about as quickly as an empty answer says only that the link is faster than that. The next one takes
    ``left_s`` at most, were all of this one's time its bytes' own.
    """
    if took_s > 2 * latency_s:
        return 0
    larger = int(min(MOST_PROBE_BYTES, left_s * size_bytes / max(took_s, 1e-6)))
    return larger if larger >= 2 * size_bytes else 0


PROBE_SHARE = 0.04
"""Of the time of reading again, that finding out about a link may take."""
MOST_PROBE_BYTES = 524_288
SLOWEST_BYTES_PER_S = 125_000.0
"""1 Mbit/s."""
