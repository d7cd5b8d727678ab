"""How long something has been here, whatever the wall clock says: CLOCK_BOOTTIME and the boot's id.

CLOCK_BOOTTIME runs on while the machine sleeps and cannot be set. It begins anew with each boot, so a stored
reading means something only together with the id of its boot; after a reboot the time in between is unknown.
"""

from __future__ import annotations

import time
import uuid
from functools import lru_cache
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boottime_ms() -> int:
    """Milliseconds since this machine booted, sleep included."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


@lru_cache(maxsize=1)
def boot_id() -> str:
    """The kernel's id of this boot. Where there is no /proc, one for this process alone: then everything
    stored before counts as of another boot, which is the safe side."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return str(uuid.uuid4())
