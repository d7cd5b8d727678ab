"""What a node's state is, from what its services say: no bus here, no clock but the one that is passed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from protocol.messages import ServiceState

SETTLED = frozenset({"ready", "degraded", "failed"})
GONE = frozenset({"lost", "disconnected"})
REASON_CHARACTERS = 300
"""Of one service's reason: all of them together fit the topic's limit."""
_CLOCK_S = 1.0
"""How exact a process's start is known, and then some."""


def speaks_still(state: ServiceState) -> bool:
    """Whether the process that said this runs on this machine, and ran when it said it.

    For words that the broker had kept: after a power cut it may keep ``ready`` of a service that is not up yet. A
    process id that another has now is told by when that one started. False too where it cannot be seen.
    """
    if not state.pid:
        return False
    import psutil  # a tenth of this service's start, and not needed at a node's first

    try:
        return bool(psutil.Process(state.pid).create_time() <= state.time_us / 1e6 + _CLOCK_S)
    except psutil.Error:
        return False


@dataclass
class _Known:
    """The last word of one service."""

    state: ServiceState
    counts: bool
    """It is of now, not only something that the broker had kept."""


class OwnServices:
    """The services of this node: which there should be, and what each said last.

    Args:
        names: the services that should run here.
        speaks_still: whether the speaker of a word that the broker had kept is still there; injected by tests.
    """

    def __init__(self, names: Sequence[str], speaks_still: Callable[[ServiceState], bool] = speaks_still) -> None:
        self.names = tuple(names)
        self._speaks_still = speaks_still
        self._known: dict[str, _Known] = {}
        self.starts: dict[str, int] = {}
        """Processes of each service that were seen."""

    @property
    def states(self) -> dict[str, ServiceState]:
        """The last word of every service that has spoken, the unexpected ones included."""
        return {name: known.state for name, known in self._known.items()}

    def hear(self, name: str, state: ServiceState, *, retained: bool) -> None:
        """Take note of a word; of one that the broker had kept only what is not older than what is known."""
        known = self._known.get(name)
        if known is not None:
            own_end = state.state in GONE and state.pid == known.state.pid
            if retained and not own_end and state.time_us <= known.state.time_us:
                return
            if state.state == "lost" and state.pid and not own_end and known.counts:
                return  # of an earlier process, after its successor has spoken
        if state.pid and state.state not in ("failed", *GONE) and (known is None or state.pid != known.state.pid):
            self.starts[name] = self.starts.get(name, 0) + 1
        self._known[name] = _Known(state, not retained or self._speaks_still(state))

    @property
    def settled(self) -> bool:
        """Whether each service has said how it is, or is given up."""
        return all(
            (known := self._known.get(name)) and known.counts and known.state.state in SETTLED for name in self.names
        )

    @property
    def running(self) -> list[str]:
        """The services that should run here, without those that are given up."""
        return [name for name in self.names if name not in self._known or self._known[name].state.state != "failed"]

    def reason(self, late: Sequence[str] = ()) -> str:
        """What is amiss, service by service; empty when all are ready. ``late`` ones have fallen silent."""
        parts = []
        for name in self.names:
            known = self._known.get(name)
            if known is None or not known.counts:
                parts.append(f"{name} has not spoken yet")
            elif known.state.state != "ready":
                why = f": {known.state.reason[:REASON_CHARACTERS]}" if known.state.reason else ""
                parts.append(f"{name} is {known.state.state}{why}")
            elif name in late:
                parts.append(f"{name} has fallen silent")
        return "; ".join(parts)
