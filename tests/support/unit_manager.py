"""As much of systemd as install.sh talks to, for tests that cannot have it as process 1: a manager of real services.

It starts what the rendered units say (ExecStart=, Environment=), in real processes, each with a notify socket of its
own; READY=1 makes a unit active. `systemctl` is a small program that asks the manager over a socket. What depends on
the kernel (namespaces, system call filters, credentials) is not here: tests/systemd/test_real_systemd.py has it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

from broker.child import spawn
from tests.support.notify_socket import NotifySocket
from tests.support.waiting import DEADLINE_S

RESTART_S = 0.2
NOT_RESTARTED = 78
_SYSTEMCTL = """\
#!{python} -IS
import json, socket, sys
with socket.socket(socket.AF_UNIX) as asker:
    asker.connect({socket!r})
    asker.sendall(json.dumps(sys.argv[1:]).encode() + b"\\n")
    code, text = json.loads(asker.makefile().readline())
sys.stdout.write(text)
sys.exit(code)
"""


class _Unit:
    """One unit and its process."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state = "inactive"
        self.invocation = ""
        self.restarts = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.heard: NotifySocket | None = None
        self.start_at_s: float | None = None


class UnitManager:
    """Keeps the units below ``root`` and answers the program ``systemctl``."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root = root
        self.folder = folder
        self.systemctl = folder / "systemctl"
        self.asked: list[list[str]] = []
        """Every command line of systemctl, in order."""
        self.started: list[tuple[str, str]] = []
        """(unit, the program's true path) of every start."""
        self.units: dict[str, _Unit] = {}
        self._lock = threading.RLock()
        self._closing = threading.Event()
        address = str(folder / "manager")
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(address)
        self._server.listen()
        self._server.settimeout(0.05)
        self.systemctl.write_text(_SYSTEMCTL.format(python=sys.executable, socket=address))
        self.systemctl.chmod(0o755)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End every process."""
        self._closing.set()
        self._thread.join()
        for unit in self.units.values():
            self._stop(unit)
        self._server.close()

    def state(self, name: str) -> str:
        """``inactive``, ``activating``, ``active`` or ``failed``."""
        with self._lock:
            unit = self.units.get(name)
            return unit.state if unit else "inactive"

    def pid(self, name: str) -> int:
        """Its process, 0 when it has none."""
        process = self.units[name].process
        return process.pid if process else 0

    def log(self, name: str) -> str:
        """What it has printed, in all its lives."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    # --- the manager's thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                asker, _ = self._server.accept()
            except TimeoutError:
                pass
            else:
                with asker, asker.makefile("rw") as stream:
                    arguments = json.loads(stream.readline())
                    with self._lock:
                        self.asked.append(arguments)
                        answer = self._answer([each for each in arguments if each not in ("--quiet", "--no-block")])
                    stream.write(json.dumps(answer) + "\n")
            with self._lock:
                for unit in self.units.values():
                    self._look_after(unit)

    def _look_after(self, unit: _Unit) -> None:
        if unit.state == "activating" and unit.heard is not None and unit.heard.count("READY=1"):
            unit.state = "active"
        if unit.process is not None and (code := unit.process.poll()) is not None:
            unit.process = None
            self._forget(unit)
            if code == NOT_RESTARTED:
                unit.state = "failed"
            elif code == 0:
                unit.state = "inactive"
            else:
                unit.state, unit.start_at_s = "activating", time.monotonic() + RESTART_S
        if unit.start_at_s is not None and time.monotonic() >= unit.start_at_s:
            unit.restarts += 1
            self._start(unit)

    def _answer(self, arguments: list[str]) -> tuple[int, str]:
        verb, *rest = arguments
        if verb == "is-system-running":
            return 0, "running\n"
        now = "--now" in rest
        names = [each for each in rest if not each.startswith("-")]
        if verb == "show":
            unit = self.units.get(names[0]) or _Unit(names[0])
            status = unit.heard.status if unit.heard else ""
            values = {
                "ActiveState": unit.state,
                "InvocationID": unit.invocation,
                "NRestarts": str(unit.restarts),
                "StatusText": status,
            }
            return 0, values[rest[0].removeprefix("--property=")] + "\n"
        for name in names:
            if verb in ("enable", "disable"):
                self._link(name, wanted=verb == "enable")
            if not name.startswith("mindstream@"):
                if name == "mindstream.target" and verb in ("start", "disable"):
                    self._target(start=verb == "start")
                continue
            unit = self.units.setdefault(name, _Unit(name))
            if verb in ("stop", "restart") or (verb == "disable" and now):
                self._stop(unit)
            if verb in ("start", "restart") and unit.process is None:
                unit.restarts = 0
                self._start(unit)
        return 0, ""

    def _target(self, *, start: bool) -> None:
        for unit in self.units.values():
            if start and unit.process is None:
                self._start(unit)
            elif not start:
                self._stop(unit)

    def _link(self, name: str, *, wanted: bool) -> None:
        folders = {"mindstream.target": "multi-user.target.wants", "mindstream-sleep.service": "sleep.target.wants"}
        folder = folders.get(name, "mindstream.target.wants")
        path = self.root / "etc/systemd/system" / folder / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        if wanted:
            path.symlink_to("/etc/systemd/system/mindstream@.service")

    def _start(self, unit: _Unit) -> None:
        template = (self.root / "etc/systemd/system/mindstream@.service").read_text()
        program, argument = (self._value(template, "ExecStart")).split()
        assert argument == "%i"
        instance = unit.name.removeprefix("mindstream@").removesuffix(".service")
        # Below the test's root, as everything is.
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("MINDSTREAM_", "PYTHON"))
        }
        for pair in self._value(template, "Environment").split():
            name, _, value = pair.partition("=")
            environment[name] = str(self.root) + value if value.startswith("/") else value
        environment["XDG_CACHE_HOME"] = str(self.root / "var/cache")
        unit.invocation = uuid.uuid4().hex
        unit.heard = NotifySocket(str(self.folder / unit.invocation[:8]))
        environment["NOTIFY_SOCKET"] = unit.heard.address
        command = [str(self.root) + program, instance]
        self.started.append((unit.name, str(Path(command[0]).resolve())))
        with (self.folder / f"{unit.name}.log").open("ab") as log:
            unit.process = spawn(command, cwd="/", env=environment, stdout=log, stderr=log)
        unit.state, unit.start_at_s = "activating", None

    def _stop(self, unit: _Unit) -> None:
        unit.start_at_s = None
        if unit.process is not None:
            unit.process.send_signal(signal.SIGTERM)
            try:
                unit.process.wait(DEADLINE_S)
            except subprocess.TimeoutExpired:
                unit.process.kill()
                unit.process.wait()
            unit.process = None
        self._forget(unit)
        unit.state = "inactive"

    def _forget(self, unit: _Unit) -> None:
        if unit.heard is not None:
            unit.heard.close()
            unit.heard = None

    @staticmethod
    def _value(text: str, key: str) -> str:
        found = re.search(rf"^{key}=(.*)$", text, re.MULTILINE)
        assert found is not None, key
        return found.group(1)
