"""A real systemd as process 1 of namespaces of its own, on a copy of this machine that is thrown away.

Its root is an overlay in memory over this machine's own, read and never written; processes, mounts, network, host name
and control groups are its own. It needs root, and ends with the test however that one ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from broker.child import spawn
from tests.support.waiting import DEADLINE_S

SYSTEMD = Path("/lib/systemd/systemd")
BOOT_DEADLINE_S = 120.0
# What has no place in a box: hardware, consoles, the machine's own services.
MASKED = (
    "getty.target systemd-sysctl.service systemd-modules-load.service systemd-remount-fs.service"
    " sys-kernel-debug.mount sys-kernel-tracing.mount dev-hugepages.mount sys-fs-fuse-connections.mount"
    " cron.service ssh.service postgresql.service networking.service"
)
_INSIDE = """\
set -e
mount -t tmpfs tmpfs {box}
cd {box}
mkdir upper work root
mount -t overlay overlay -o lowerdir=/,upperdir={box}/upper,workdir={box}/work root
cd root
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs dev
for node in null zero full random urandom tty; do touch dev/$node; mount --bind /dev/$node dev/$node; done
mknod dev/a-disk b 7 99
mkdir dev/pts dev/shm dev/hugepages
mount -t devpts devpts dev/pts
mount -t tmpfs tmpfs dev/shm
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs tmpfs tmp
mkdir srv/share
mount --bind {share} srv/share
rm -rf etc/systemd/system/mindstream* etc/mindstream opt/mindstream var/lib/mindstream
for unit in {masked}; do ln -sf /dev/null etc/systemd/system/$unit; done
mkdir oldroot
pivot_root . oldroot
cd /
umount -l /oldroot
mount --make-rshared /
exec env -i container=private PATH=/usr/sbin:/usr/bin:/sbin:/bin {systemd} --system --unit=multi-user.target \
    --log-target=journal --show-status=no
"""


def why_not() -> str:
    """Why there can be none here; empty when there can."""
    if os.geteuid() != 0:
        return "a systemd of one's own needs root"
    missing = [name for name in ("unshare", "nsenter", "pivot_root", "systemctl") if shutil.which(name) is None]
    if missing or not SYSTEMD.exists():
        return f"not installed: {', '.join(missing) or SYSTEMD}"
    if _control_groups() is None:
        return "no control groups of version 2 that may be written"
    tried = subprocess.run(
        ["unshare", "--fork", "--pid", "--mount", "--cgroup", "--ipc", "--uts", "--net", "true"],
        capture_output=True,
        check=False,
    )
    return "" if tried.returncode == 0 else f"no namespaces: {tried.stderr.decode().strip()}"


def _control_groups() -> Path | None:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        if kind == "cgroup2" and "rw" in options.split(","):
            return Path(place)
    return None


class PrivateSystemd:
    """One that is running; ``share`` is ``/srv/share`` inside."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def run(self, *command: str, check: bool = True, timeout_s: float = 170.0) -> str:
        """Run a command inside, as root; what it printed."""
        done = subprocess.run(
            ["nsenter", "--target", str(self._pid), "--all", "--root", "--wd", *command],
            env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    def property(self, unit: str, name: str) -> str:
        """A unit's property, as `systemctl show` prints it."""
        return self.run("systemctl", "show", f"--property={name}", "--value", unit).strip()

    def journal(self, unit: str) -> str:
        """All that a unit has written."""
        return self.run("journalctl", "--no-pager", "--output=cat", "--unit", unit)


@contextmanager
def private_systemd(folder: Path) -> Iterator[PrivateSystemd]:
    """Boot one; ``folder``/share is shared with it."""
    above = _control_groups()
    assert above is not None
    group = above / f"mindstream-test-{os.getpid()}"
    group.mkdir()
    box, share = folder / "box", folder / "share"
    box.mkdir()
    share.mkdir(exist_ok=True)
    inside = _INSIDE.format(box=box, share=share, masked=MASKED, systemd=SYSTEMD)
    outside = (
        f"echo $$ > {group}/cgroup.procs; exec unshare --fork --pid --mount --cgroup --ipc --uts --net"
        ' --propagation private --kill-child sh -c "$0"'
    )
    with (folder / "systemd.log").open("ab") as log:
        process = spawn(["sh", "-c", outside, inside], stdout=log, stderr=log)
    try:
        yield PrivateSystemd(_booted(process.pid, folder / "systemd.log"))
    finally:
        # The end of process 1 is the end of all in its namespace.
        for child in psutil.Process(process.pid).children() if process.poll() is None else []:
            child.send_signal(signal.SIGKILL)
        process.wait(DEADLINE_S)
        _remove_group(group)


def _booted(outer_pid: int, log_path: Path) -> int:
    deadline_s = time.monotonic() + BOOT_DEADLINE_S
    said = ""
    while time.monotonic() < deadline_s:
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(outer_pid).children():
                if child.name() == "systemd":
                    said = PrivateSystemd(child.pid).run("systemctl", "is-system-running", check=False).strip()
                    if said in ("running", "degraded"):
                        return child.pid
        time.sleep(0.1)
    raise AssertionError(f"systemd has not booted: {said or log_path.read_text()}")


def _remove_group(group: Path) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while group.exists():
        for path in sorted(group.rglob("*"), key=lambda each: len(each.parts), reverse=True):
            if path.is_dir():
                with contextlib.suppress(OSError):
                    path.rmdir()
        with contextlib.suppress(OSError):
            group.rmdir()
        assert time.monotonic() < deadline_s, f"{group} is still in use"
        time.sleep(0.05)
