"""Run in place of a service inside its unit: what that unit lets it do, as JSON."""

from __future__ import annotations

import ctypes
import json
import os
import time
from collections.abc import Callable
from pathlib import Path


def tried(what: Callable[[], object]) -> str:
    try:
        what()
    except OSError as error:
        return error.strerror or str(error)
    return "done"


def write(path: str) -> Callable[[], object]:
    def attempt() -> None:
        Path(path).write_bytes(b"")
        Path(path).unlink()

    return attempt


print(
    json.dumps(
        {
            "clock_state": ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512)),
            "set_clock": tried(lambda: time.clock_settime(time.CLOCK_REALTIME, time.time())),
            "boot_id": tried(lambda: Path("/proc/sys/kernel/random/boot_id").read_bytes()),
            "cpuinfo": tried(lambda: Path("/proc/cpuinfo").read_bytes()),
            "password": (Path(os.environ["CREDENTIALS_DIRECTORY"]) / "broker-password").read_text(),
            "password_file": tried(lambda: Path("/etc/mindstream/credentials/broker-password").read_bytes()),
            "shadow": tried(lambda: Path("/etc/shadow").read_bytes()),
            "home": tried(lambda: list(Path("/root").iterdir())),
            "write_state": tried(write("/var/lib/mindstream/probe")),
            "write_cache": tried(write("/var/cache/mindstream/probe")),
            "write_program": tried(write("/opt/mindstream/probe")),
            "write_etc": tried(write("/etc/probe")),
            "processes": sum(path.name.isdigit() for path in Path("/proc").iterdir()),
            "disks": [path.name for path in Path("/dev").iterdir() if path.is_block_device()],
            "uid": os.getuid(),
        }
    )
)
