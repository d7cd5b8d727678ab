"""The systemd units of a device, rendered from the service table.

`mindstream.target` groups them; `mindstream@.service` is every service, hardened; a drop-in for each service says what
that one needs beyond it; `mindstream-sleep.service` says that the machine is suspended. Each file's first line holds a
digest of the rest, so that an edit by hand is found: changes belong into a drop-in of one's own (`systemctl edit
mindstream@NAME`), which stays over upgrades.

The units suit systemd 247 and later; what 252 (Debian 12) does not know (RestartSteps=) is left out, so that
`systemd-analyze verify` has nothing to say.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edge.files import storage_errors, write_atomically
from edge.service_table import BY_NAME, SERVICES, ServiceRow

UNIT_DIR = Path("/etc/systemd/system")
RUNNER = Path("/opt/mindstream/current/bin/mindstream-service")
"""A program of the installed version: its first line names that version's interpreter by its true path, so a service
that runs on while `current` is switched to another version goes on importing its own."""
TARGET, TEMPLATE, DROP_IN = "mindstream.target", "mindstream@.service", "10-mindstream.conf"
SLEEP = "mindstream-sleep.service"
WANTS = "mindstream.target.wants"
CREDENTIALS = Path("/etc/mindstream/credentials")
START_TIMEOUT_S = 600
"""Longer than databases take to open and a model to load. A service that waits longer for its broker asks for more,
but systemd forgets that at a daemon-reload and counts from the start again (252: service_coldplug_timeout)."""
WATCHDOG_S = 60

_TARGET = """\
[Unit]
Description=Mindstream: the services of this node
Documentation=https://www.freedesktop.org/software/systemd/man/systemd.target.html
# Without these a target waits until all it wants has started: a broker that is away would hold up the whole boot.
DefaultDependencies=no
Conflicts=shutdown.target
Before=shutdown.target

[Install]
WantedBy=multi-user.target
"""

_ACCOUNT = """\
User=mindstream
Group=mindstream
Environment=MINDSTREAM_CONFIG=/etc/mindstream/mindstream.toml XDG_CACHE_HOME=%C
WorkingDirectory=/
UMask=0077
StateDirectory=mindstream
StateDirectoryMode=0750
CacheDirectory=mindstream
CacheDirectoryMode=0750
# A file that is not there is an empty secret: SetCredential= is the default of LoadCredential=.
LoadCredential=broker-password:{credentials}/broker-password
SetCredential=broker-password:\\n
"""

_HARDENING = """\
# What it may not do.
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
PrivateTmp=yes
PrivateDevices=yes
DevicePolicy=closed
PrivateUsers=yes
PrivateMounts=yes
PrivateIPC=yes
ProtectSystem=strict
ProtectHome=yes
ProtectProc=invisible
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RemoveIPC=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
KeyringMode=private
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
# adjtimex(3), by either system call, only asks whether the clock is synchronised, which memories record: setting it
# needs a capability that is not here. ProtectClock= would forbid the question too, and ProcSubset=pid the boot id that
# asks are aged by.
SystemCallFilter=adjtimex clock_adjtime clock_adjtime64
SystemCallErrorNumber=EPERM
"""

_SLEEP = """\
[Unit]
Description=Mindstream says that this machine sleeps
Before=sleep.target

[Service]
# It notices by itself that it is awake again: no ExecStop=, for which 252 lets nobody read the credentials.
Type=oneshot
# The minus: a node that cannot say it must not keep the machine awake.
ExecStart=-{command} sleep
TimeoutStartSec=10
{account}
{hardening}
[Install]
WantedBy=sleep.target
"""

_TEMPLATE = """\
[Unit]
Description=Mindstream {what}
PartOf=mindstream.target
# The services start together and in any order; each waits for its broker, here or elsewhere, by itself.
Wants=mosquitto.service
After=mosquitto.service network.target
StartLimitIntervalSec=10min
StartLimitBurst=20

[Service]
# Ready once the broker has accepted the connection and every subscription, and the service has started.
Type=notify
NotifyAccess=main
ExecStart={runner} %i
{account}
# Beyond this it asks for more time, while it waits for its broker or loads a model.
TimeoutStartSec={start_timeout_s}
TimeoutStopSec=30
# Fed while the main loop turns, the bus goes on and no thread has ended. SIGABRT leaves all stacks in the journal.
WatchdogSec={watchdog_s}
WatchdogSignal=SIGABRT
LimitCORE=0
Restart=on-failure
RestartSec=3
# EX_CONFIG: starting it again will not help until someone changes the configuration.
RestartPreventExitStatus=78

MemoryAccounting=yes
TasksMax=256
LimitNOFILE=8192

{hardening}
[Install]
WantedBy=mindstream.target
"""


@dataclass(frozen=True)
class Devices:
    """A group of devices, and what of the hardening must give way to it."""

    groups: tuple[str, ...]
    """Groups that may open them."""
    allow: tuple[str, ...] = ()
    """DeviceAllow= lines; none leaves all devices to the files' own permissions."""
    system_calls: tuple[str, ...] = ()
    """System calls that their drivers' libraries make, beyond the template's."""


DEVICES = {
    # NVIDIA's drivers name their devices differently on each platform and version (nvidia*, nvhost-*, nvgpu, nvmap):
    # the permissions of the files decide. Their library sets CPU affinity and memory policy.
    "gpu": Devices(("render", "video"), system_calls=("@resources",)),
    "camera": Devices(("video",), ("char-video4linux rw", "char-media r")),
    "microphone": Devices(("audio",), ("char-alsa rw",)),
    # INA3221 and its like are files of /sys, which everybody may read.
    "power": Devices(()),
}


def instance(name: str) -> str:
    """The unit of one service."""
    return f"mindstream@{name}.service"


def render(rows: Sequence[ServiceRow] = SERVICES, *, runner: Path = RUNNER) -> dict[str, str]:
    """Path below the unit folder to content, of every file."""
    account = _ACCOUNT.format(credentials=CREDENTIALS)
    template = _TEMPLATE.format(
        what="%i",
        runner=runner,
        account=account,
        hardening=_HARDENING,
        start_timeout_s=START_TIMEOUT_S,
        watchdog_s=WATCHDOG_S,
    )
    sleep = _SLEEP.format(command=runner.with_name("mindstream"), account=account, hardening=_HARDENING)
    files = {TARGET: _TARGET, TEMPLATE: template, SLEEP: sleep}
    files |= {f"{instance(row.name)}.d/{DROP_IN}": _drop_in(row) for row in rows}
    return {name: _sealed(text) for name, text in files.items()}


def _drop_in(row: ServiceRow) -> str:
    devices = [DEVICES[name] for name in row.devices]
    lines = [
        "[Unit]",
        f"Description=Mindstream {row.name}: {row.about}",
        "",
        "[Service]",
        f"MemoryMax={row.memory_max}",
        f"OOMScoreAdjust={row.oom_score}",
        f"CPUWeight={row.cpu_weight}",
    ]
    groups = sorted({group for each in devices for group in each.groups})
    if groups:
        lines += ["PrivateDevices=no", f"SupplementaryGroups={' '.join(groups)}"]
        if all(each.allow for each in devices if each.groups):
            lines += [f"DeviceAllow={line}" for each in devices for line in each.allow]
        else:
            lines.append("DevicePolicy=auto")
    if calls := sorted({call for each in devices for call in each.system_calls}):
        lines.append(f"SystemCallFilter={' '.join(calls)}")
    if row.makes_code:
        lines.append("MemoryDenyWriteExecute=no")
    for name in row.credentials:
        lines += [f"LoadCredential={name}:{CREDENTIALS}/{name}", f"SetCredential={name}:\\n"]
    return "\n".join(lines) + "\n"


# --- files ----------------------------------------------------------------------------------------------------

_SEAL = "# Made by `mindstream units render`: change it by `systemctl edit`, not here. SHA-256 of what follows: "


def _sealed(body: str) -> str:
    return f"{_SEAL}{hashlib.sha256(body.encode()).hexdigest()}\n{body}"


def _intact(text: str) -> bool:
    """Whether a file is as some version of this module wrote it."""
    first, _, body = text.partition("\n")
    return first == f"{_SEAL}{hashlib.sha256(body.encode()).hexdigest()}"


class Finding(msgspec.Struct):
    """One unit file, compared with what this version renders."""

    file: str
    verdict: str
    """``ok``, ``missing``, ``edited`` (by hand), ``other version`` (rendered by another Mindstream), ``stale``
    (rendered for a service that is no more), ``not enabled`` or ``enabled`` (against services.enabled)."""
    next_step: str = ""
    """What to type; empty when nothing is wrong."""


def check(folder: Path = UNIT_DIR, *, wanted: Sequence[str] | None = None, runner: Path = RUNNER) -> list[Finding]:
    """Compare the unit files in ``folder`` with the table, and with ``wanted``, the services that shall run.

    Raises StorageError when a file cannot be read.
    """
    findings = []
    rendered = render(runner=runner)
    for name, text in rendered.items():
        path = folder / name
        found = _read(path)
        if found is None:
            findings.append(Finding(str(path), "missing", f"sudo mindstream units render --out {folder}"))
        elif found == text:
            findings.append(Finding(str(path), "ok"))
        elif _intact(found):
            findings.append(Finding(str(path), "other version", f"sudo mindstream units render --out {folder}"))
        else:
            unit = Path(name).parent.stem if name.endswith(DROP_IN) else name
            findings.append(
                Finding(
                    str(path),
                    "edited",
                    f"put the change into a drop-in: sudo systemctl edit {unit}; then sudo mindstream units render"
                    f" --out {folder} (it keeps the edited file as {path.name}.orig); sudo systemctl daemon-reload",
                )
            )
    findings += [
        Finding(str(path), "stale", f"sudo rm {path}")
        for path in _ours(folder)
        if str(path.relative_to(folder)) not in rendered
    ]
    if wanted is not None:
        findings += _enabled(folder, wanted)
    return findings


def _enabled(folder: Path, wanted: Sequence[str]) -> list[Finding]:
    findings = []
    for name in BY_NAME:
        path = folder / WANTS / instance(name)
        # The link of an enabled unit may lead nowhere, under another root.
        enabled = path.is_symlink() or path.exists()
        if enabled and name not in wanted:
            findings.append(
                Finding(str(path), "enabled", f"services.enabled has it not: sudo systemctl disable --now {path.name}")
            )
        elif name in wanted and not enabled:
            findings.append(Finding(str(path), "not enabled", f"sudo systemctl enable --now {path.name}"))
    return findings


def write(folder: Path, *, runner: Path = RUNNER) -> list[str]:
    """Write every unit file into ``folder``; what was done, a line for each file that changed.

    A file that was edited by hand is kept beside as ``.orig``. Files of services that are no more are removed.
    Raises StorageError.
    """
    said = []
    rendered = render(runner=runner)
    for name, text in rendered.items():
        path = folder / name
        found = _read(path)
        if found == text:
            continue
        with storage_errors(f"writing {path}"):
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            if found is not None and not _intact(found):
                kept = path.with_name(f"{path.name}.orig")
                path.replace(kept)
                said.append(
                    f"{path} had been edited by hand: the edited file is kept as {kept};"
                    " put its changes into a drop-in (systemctl edit)"
                )
        write_atomically(path, text.encode(), mode=0o644)
        said.append(f"{'wrote' if found is None else 'renewed'} {path}")
    for path in _ours(folder):
        if str(path.relative_to(folder)) not in rendered:
            with storage_errors(f"removing {path}"):
                path.unlink()
                if not any(path.parent.iterdir()):
                    path.parent.rmdir()
            said.append(f"removed {path}")
    return said


def _ours(folder: Path) -> list[Path]:
    """Drop-ins of any version of this module, untouched by hand."""
    found = sorted(folder.glob(f"mindstream@*.service.d/{DROP_IN}"))
    return [path for path in found if _intact(_read(path) or "")]


def _read(path: Path) -> str | None:
    with storage_errors(f"reading {path}"):
        try:
            return path.read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return None


# --- what runs ----------------------------------------------------------------------------------------------------


def states(names: Sequence[str]) -> dict[str, str]:
    """Service to what systemd says of it: ``active``, or its state with the service's own status line.

    Empty where systemctl cannot be asked.
    """
    try:
        done = subprocess.run(
            ["systemctl", "show", "--property=Id,ActiveState,StatusText", *(instance(name) for name in names)],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    found = {}
    for block in done.stdout.split("\n\n"):
        values = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        name = next((each for each in names if instance(each) == values.get("Id")), None)
        if name is not None:
            state, status = values.get("ActiveState", ""), values.get("StatusText", "")
            found[name] = state if state == "active" or not status else f"{state} ({status})"
    return found


# --- exposure -------------------------------------------------------------------------------------------------

_EXPOSURE = re.compile(r"Overall exposure level for \S+: ([\d.]+)")


def read_exposure(printed: str) -> float | None:
    """The overall exposure that `systemd-analyze security` printed, 0 (none) to 10; None when it printed none."""
    found = _EXPOSURE.search(printed)
    return float(found.group(1)) if found else None
