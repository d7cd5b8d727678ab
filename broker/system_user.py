"""Whether the user that Mosquitto will run as can read and write what it needs.

Started as root, Mosquitto becomes the user that its configuration names (``mosquitto`` where none is). Where that user
may not write into the persistence folder it saves nothing and runs on, without a word that anyone reads: so it is
tried out here, before it starts.
"""

from __future__ import annotations

import os
import pwd
import stat
import subprocess
import tempfile
from pathlib import Path

from protocol.errors import BrokerError

DEFAULT_USER = "mosquitto"
_TRY_TIMEOUT_S = 10.0
# The shell is there for every user; an interpreter in somebody's home is not.
_WRITE = 'file=$(mktemp "$1/.mindstream-check.XXXXXX") && rm -f "$file"'
_READ = ': < "$1"'


def run_user(named: str = "") -> pwd.struct_passwd:
    """The user that a Mosquitto started by root runs as, for the ``user`` of its configuration.

    Raises BrokerError when there is none of that name: Mosquitto would not start.
    """
    candidates = [named] if named and named != DEFAULT_USER else [DEFAULT_USER, "nobody"]
    for name in candidates:
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise BrokerError(
        f"looking for the user {candidates[0]!r} that Mosquitto is to run as: this machine has none of that name",
        hint=f"sudo useradd --system --no-create-home {candidates[0]}, or name another with --user",
        field="user",
        reason="no such user",
    )


def why_not_writable(folder: Path, user: pwd.struct_passwd) -> str:
    """Why ``user`` cannot make files in ``folder``; empty when it can. Tried out where this process may."""
    if not folder.is_dir():
        return "is not there" if not folder.exists() else "is no folder"
    if user.pw_uid == os.geteuid():
        try:
            with tempfile.TemporaryFile(dir=folder):
                return ""
        except OSError as error:
            return error.strerror or str(error)
    return _try_as(user, _WRITE, folder, os.W_OK | os.X_OK)


def why_not_readable(path: Path, user: pwd.struct_passwd) -> str:
    """Why ``user`` cannot read the file ``path``; empty when it can."""
    if user.pw_uid == os.geteuid():
        try:
            with path.open("rb"):
                return ""
        except OSError as error:
            return error.strerror or str(error)
    if os.geteuid() == 0 and not path.exists():
        return "is not there"
    return _try_as(user, _READ, path, os.R_OK)


def _try_as(user: pwd.struct_passwd, script: str, path: Path, wanted: int) -> str:
    if os.geteuid() != 0:
        return _by_mode(path, user, wanted)
    try:
        done = subprocess.run(
            ["/bin/sh", "-c", script, "sh", str(path)],
            user=user.pw_uid,
            group=user.pw_gid,
            extra_groups=os.getgrouplist(user.pw_name, user.pw_gid),
            cwd="/",
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
            capture_output=True,
            text=True,
            timeout=_TRY_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"it could not be tried out as {user.pw_name}: {error}"
    return "" if done.returncode == 0 else done.stderr.strip().rpartition(": ")[2] or "refused"


def _by_mode(path: Path, user: pwd.struct_passwd, wanted: int) -> str:
    """By owner, group and mode alone, for a process that cannot become ``user``."""
    groups = os.getgrouplist(user.pw_name, user.pw_gid)
    path = path.absolute()
    for place in [*reversed(path.parents), path]:
        need = wanted if place == path else os.X_OK
        try:
            found = place.stat()
        except OSError as error:
            return error.strerror or str(error)
        if user.pw_uid == found.st_uid:
            bits = stat.S_IMODE(found.st_mode) >> 6
        elif found.st_gid in groups:
            bits = stat.S_IMODE(found.st_mode) >> 3
        else:
            bits = stat.S_IMODE(found.st_mode)
        if user.pw_uid != 0 and need & ~bits & 0o7:
            return f"Permission denied (by the mode of {place})"
    return ""
