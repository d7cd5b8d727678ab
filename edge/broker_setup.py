"""The folder of a Mosquitto configuration on the disk: mosquitto.conf, passwords, ACL, and who may read them.

broker/ makes the texts; here they are written, whole or not at all, and given to the user that Mosquitto runs as.
"""

from __future__ import annotations

import os
import pwd
import shutil
import sys
from pathlib import Path

from broker.access import User, render_acl
from broker.configuration import ACL_NAME, CONFIG_NAME, PASSWORDS_NAME, Setup, render
from broker.mosquitto import find_mosquitto
from broker.passwords import hash_password, read_users, render_passwords
from broker.system_user import run_user
from edge.files import storage_errors, write_atomically
from protocol.errors import BrokerError, NotFound

DROP_IN_NAME = "systemd-drop-in.conf"


class BrokerFolder:
    """A folder with a broker's configuration, users and rights. Raises StorageError where it cannot read or write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.config_path = self.folder / CONFIG_NAME
        self._passwords = self.folder / PASSWORDS_NAME
        self._acl = self.folder / ACL_NAME

    def users(self) -> dict[str, User]:
        """The names that may connect. Raises NotFound without a configuration, BrokerError for a malformed one."""
        self._account()
        return self._users()

    def write(self, setup: Setup) -> None:
        """Write mosquitto.conf, and the rights of the users that are there already."""
        account = run_user(setup.user)
        with storage_errors(f"making {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not setup.data_folder.exists():
                setup.data_folder.mkdir(parents=True, mode=0o700)
                _give(setup.data_folder, account)
        self._save(self._users(), account)
        self._put(self.config_path, render(setup), account)
        write_atomically(self.folder / DROP_IN_NAME, drop_in(self.config_path).encode(), mode=0o644)

    def add(
        self, name: str, password: str, *, role: str = "node", branches: tuple[str, ...] = (), replace: bool = False
    ) -> None:
        """Let ``name`` connect. Raises BrokerError for a name that is there, unless ``replace``."""
        users = self.users()
        if name in users and not replace:
            raise BrokerError(
                f"adding user {name} in {self.folder}: there is one of that name",
                hint="--replace gives it a new password and role",
                field="name",
                reason="already there",
            )
        users[name] = User(name, hash_password(password), role, branches)
        self._save(users, self._account())

    def remove(self, name: str) -> None:
        """Let ``name`` connect no longer. Raises NotFound."""
        users = self.users()
        if users.pop(name, None) is None:
            raise NotFound(
                f"removing user {name} from {self.folder}: there is none of that name",
                hint="mindstream broker user list",
            )
        self._save(users, self._account())

    def _save(self, users: dict[str, User], account: pwd.struct_passwd) -> None:
        # Rights first: a name must not be let in before its bounds are there.
        listed = [users[name] for name in sorted(users)]
        self._put(self._acl, render_acl(listed), account)
        self._put(self._passwords, render_passwords(listed), account)

    def _users(self) -> dict[str, User]:
        with storage_errors(f"reading the users in {self.folder}"):
            texts = [path.read_text() if path.exists() else "" for path in (self._passwords, self._acl)]
        return read_users(*texts)

    def _account(self) -> pwd.struct_passwd:
        """Who owns the files now: the user that Mosquitto runs as."""
        try:
            known = next((path for path in (self._passwords, self.config_path) if path.exists()), None)
            if known is not None:
                known.open("rb").close()
                return pwd.getpwuid(known.stat().st_uid)
        except PermissionError as error:
            raise BrokerError(
                f"looking at the broker's configuration in {self.folder}: {error.strerror}",
                hint="it belongs to Mosquitto's user: type it with sudo",
                reason=error.strerror or "",
            ) from error
        raise NotFound(
            f"looking for a broker's configuration in {self.folder}: there is none",
            hint="mindstream broker render device --out FOLDER, or name its --folder",
        )

    def _put(self, path: Path, text: str, account: pwd.struct_passwd) -> None:
        write_atomically(path, text.encode(), mode=0o600, owner=_owner(account))


def drop_in(config_path: Path) -> str:
    """A drop-in for the distribution's mosquitto.service: this configuration, checked before each start."""
    program = Path(sys.argv[0]).absolute().with_name("mindstream")
    found = program if program.exists() else shutil.which("mindstream")
    check = (
        f"# + : as root, to try out what Mosquitto's own user may.\nExecStartPre=+{found} broker check {config_path}\n"
        if found
        else "# mindstream was not found: with its path here Mosquitto starts only on what is right.\n"
        f"# ExecStartPre=+/path/to/mindstream broker check {config_path}\n"
    )
    return (
        "# Put it into /etc/systemd/system/mosquitto.service.d/mindstream.conf, then:\n"
        "#     sudo systemctl daemon-reload && sudo systemctl restart mosquitto\n"
        f"[Service]\n{check}ExecStart=\nExecStart={find_mosquitto() or '/usr/sbin/mosquitto'} -c {config_path}\n"
    )


def _owner(account: pwd.struct_passwd) -> tuple[int, int] | None:
    """Only root gives files away."""
    return (account.pw_uid, account.pw_gid) if os.geteuid() == 0 else None


def _give(path: Path, account: pwd.struct_passwd) -> None:
    if (owner := _owner(account)) is not None:
        os.chown(path, *owner)
