"""Backing off while the device is throttled: who decides that it is, and for how long.

A device that is too hot is slowed down by its kernel, and then everybody on it waits. What nobody waits for makes room:
while it is throttled, background work gets a tenth of the time, and the device rests in between; a person's runs go on
as ever. Two looks in a row begin it, so that a moment's peak does not; half a minute without a sign of it ends it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from edge.thermal import Heat, Thermometer

log = logging.getLogger(__name__)

LOOK_S = 5.0
"""Temperatures of such devices move within tens of seconds."""
BEGIN_LOOKS = 2
"""So many in a row find it throttled before anything is done."""
COOL_S = 30.0
"""So long none must, before background work has its whole share again."""
REST_RATIO = 9
"""Rest after each of its rounds, in lengths of that round."""
MOST_REST_S = 60.0


class HeatWatch:
    """Looks at the device, on a thread of its own.

    Args:
        thermometer: looks.
        on_change: called with whether it is throttled now and what says so, once a change, on that thread.
        clock: seconds; for tests.
    """

    def __init__(
        self,
        thermometer: Thermometer,
        on_change: Callable[[bool, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._thermometer = thermometer
        self._on_change = on_change
        self._clock = clock
        self._found_in_a_row = 0
        self._found_s = 0.0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.throttled = False
        """Whether background work backs off now."""
        self.last = Heat()
        """The look before."""

    def start(self) -> None:
        """Look from now on; where there is nothing to look at, never."""
        sources = self._thermometer.sources
        log.info("heat: %s", sources or "this device has no file that says whether it is throttled")
        if sources:
            self._thread = threading.Thread(target=self._main, name="heat watch", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Look no longer."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(5.0)

    def look(self) -> None:
        """Look once, and say so when that changes anything."""
        heat, now_s = self._thermometer.look(), self._clock()
        self.last = heat
        if heat.throttled:
            self._found_s = now_s
            self._found_in_a_row += 1
        else:
            self._found_in_a_row = 0
        if not self.throttled and self._found_in_a_row >= BEGIN_LOOKS:
            self.throttled = True
            self._on_change(True, "; ".join(heat.reasons))
        elif self.throttled and now_s - self._found_s >= COOL_S:
            self.throttled = False
            self._on_change(False, "")

    def _main(self) -> None:
        while not self._stopping.wait(LOOK_S):
            self.look()


def rest_s(took_s: float) -> float:
    """How long background work rests after a round of ``took_s`` seconds, while the device is throttled."""
    return min(took_s * REST_RATIO, MOST_REST_S)
