"""Which MQTT version the next CONNECT speaks: 5, or 3.1.1 where the broker has no 5.

Pure decisions, no I/O. A broker shows that it has no MQTT 5 by saying so (CONNACK 0x01 or 0x84; MQTT 5 section
3.1.2.2), or by closing the connection over a version 5 CONNECT, again and again, while it accepts one of 3.1.1. A
broker that is down, or that refuses a name or password, shows nothing. Of one that closes silently and then accepts,
it might be that it was only starting: version 5 is tried once more before that counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable

MQTT_5, MQTT_3_1_1 = "5", "3.1.1"
AUTO = "auto"

CLOSED_BEFORE_TRYING_OLDER = 2
"""So many version 5 CONNECTs in a row must end without an answer before 3.1.1 is tried."""
TRY_5_AGAIN_S = 60.0
"""After a lost connection of 3.1.1 version 5 is tried first (the broker may have been upgraded), but not more often."""


class VersionChoice:
    """The versions of one connection's CONNECTs.

    Args:
        setting: ``auto``, or the one version to speak: ``5`` or ``3.1.1``.
        now_s: a monotonic clock.
    """

    def __init__(self, setting: str, now_s: Callable[[], float] = time.monotonic) -> None:
        self.setting = setting
        self.version = MQTT_3_1_1 if setting == MQTT_3_1_1 else MQTT_5
        """Of the next CONNECT, or of the present connection."""
        self._now_s = now_s
        self._closed = 0
        """CONNECTs of version 5 in a row that were not answered."""
        self._in_doubt = False
        """3.1.1 is tried only because version 5 was not answered."""
        self._tried_5_s = now_s()

    def refused(self) -> bool:
        """The broker has answered that it does not speak this version; whether the other is to be tried at once."""
        if self.setting != AUTO:
            return False
        older = self.version == MQTT_5
        self._turn_to(MQTT_3_1_1 if older else MQTT_5)
        return older

    def closed(self) -> None:
        """The broker has closed the connection without an answer to the CONNECT."""
        if self.setting != AUTO:
            return
        if self.version == MQTT_3_1_1:
            self._turn_to(MQTT_5)
            return
        self._closed += 1
        if self._closed >= CLOSED_BEFORE_TRYING_OLDER:
            confirmed = self._in_doubt or self._closed > CLOSED_BEFORE_TRYING_OLDER
            self._turn_to(MQTT_3_1_1)
            self._in_doubt = not confirmed

    def accepted(self) -> bool:
        """The CONNECT was accepted; whether to keep the connection, or to make it again with another version."""
        if self.version == MQTT_5:
            self._closed = 0
            self._in_doubt = False
            return True
        if self._in_doubt:
            self.version = MQTT_5
            self._closed = CLOSED_BEFORE_TRYING_OLDER - 1  # one more silent end confirms it
            return False
        return True

    def lost(self) -> None:
        """An accepted connection has ended."""
        if self.setting == AUTO and self.version == MQTT_3_1_1 and self._now_s() - self._tried_5_s >= TRY_5_AGAIN_S:
            self._turn_to(MQTT_5)
            self._closed = CLOSED_BEFORE_TRYING_OLDER  # this broker is known: one silent end is enough

    def _turn_to(self, version: str) -> None:
        self._tried_5_s = self._now_s()
        self.version = version
        self._closed = 0
        self._in_doubt = False
