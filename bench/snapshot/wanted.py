"""The figures of `mindstream bench snapshot` that stand for it, and what they should be."""

from __future__ import annotations

from typing import NamedTuple

from bench.report import Figures


class Wanted(NamedTuple):
    """Bounds of a figure; a figure without any is told, and nothing is asked of it."""

    least: float | None = None
    most: float | None = None
    goal: float | None = None
    same_as: str = ""
    """It should be equal to that other figure."""

    def __str__(self) -> str:
        said = [
            *([f"at least {self.least:,g}"] if self.least is not None else []),
            *([f"at most {self.most:,g}"] if self.most is not None else []),
            *([f"all of {self.same_as}"] if self.same_as else []),
            *([f"goal {self.goal:,g}"] if self.goal is not None else []),
        ]
        return ", ".join(said)

    def met(self, value: object, figures: Figures) -> bool | None:
        """Whether ``value`` is within its bounds; None when it was not measured, or has none."""
        if not isinstance(value, (int, float)) or (self.least is None and self.most is None and not self.same_as):
            return None
        return not (
            (self.least is not None and value < self.least)
            or (self.most is not None and value > self.most)
            or (self.same_as and value != figures.get(self.same_as))
        )


WANTED: dict[str, Wanted] = {
    "exact_token_match": Wanted(least=1),
    "exact_logit_match": Wanted(least=1),
    "lossless_ratio": Wanted(least=1.4, goal=1.5),
    "near_lossless_ratio": Wanted(least=12, goal=20),
    "kl_at_near_lossless": Wanted(),
    "top1_at_near_lossless": Wanted(least=0.94),
    "ratio_at_5pct": Wanted(least=18),
    "basis_mb": Wanted(),
    "encode_restore_s_per_gb": Wanted(most=2),
    "ttft_speedup_4k_disk": Wanted(least=30),
    "ttft_speedup_4k_bus": Wanted(least=20),
    "handoff_p95_over_recompute": Wanted(most=1),
    "mutations": Wanted(least=10_000),
    "mutations_refused": Wanted(same_as="mutations"),
    "variant_speedup": Wanted(),
    "variant_kl": Wanted(),
    "mailbox_handles_per_s": Wanted(),
    "mailbox_gb_per_s": Wanted(),
}


def rows(figures: Figures) -> list[list[object]]:
    """A line of a table for each wanted figure that ``figures`` has: name, value, what it should be, whether it is."""
    found: list[list[object]] = []
    for name, wanted in WANTED.items():
        if name in figures:
            met = wanted.met(figures[name], figures)
            found.append([name, figures[name], str(wanted), {None: "", True: "yes", False: "NO"}[met]])
    return found
