"""The supervisor: `mindstream up`. Starts a node's broker and services, keeps them alive, ends them in order.

One supervisor a data folder. Every child dies with it, also when it is killed. A service that dies is started again
with backoff; one that dies too often in a short time is stopped for good, loudly, while the others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from broker.child import spawn
from broker.embedded import EmbeddedBroker
from edge.bus import Bus
from edge.config import Config, load_config
from edge.files import storage_errors
from edge.keys import load_or_create_identity
from edge.logs import set_up_logging, version
from edge.service import EXIT_CONFIG
from edge.service_table import BY_NAME, missing_packages
from protocol.codec import Received
from protocol.errors import BrokerError, ConfigError, MindstreamError, StorageError
from protocol.messages import NodeState, ServiceState

log = logging.getLogger(__name__)

POLL_S = 0.05
STEADY_S = 30.0
"""A service that has lived this long is restarted without waiting when it dies."""


@dataclass
class _Child:
    """One service's process."""

    name: str
    process: subprocess.Popen[bytes] | None = None
    started_s: float = 0.0
    next_start_s: float = 0.0
    backoff_s: float = 0.0
    restarts: deque[float] = field(default_factory=deque)
    failed: str = ""
    """Why it is not started any more; empty while it is."""
    condition: str = "init"
    """What it last said of itself."""


class Supervisor:
    """Runs one node until ``stop``.

    Args:
        config: the node's configuration.
        config_path: the file that the services read; None for the defaults.
        on_ready: called once when every service is ready or has said what it lacks.
    """

    def __init__(self, config: Config, config_path: Path | None, on_ready: Callable[[], None] | None = None) -> None:
        self.config = config
        self._config_path = config_path
        self._on_ready = on_ready
        self._stop = threading.Event()
        self._children = {name: _Child(name) for name in config.services.names()}
        self._broker: EmbeddedBroker | None = None
        self._broker_next_s = 0.0
        self._broker_backoff_s = config.supervisor.backoff_first_s
        self._bus: Bus | None = None
        self._said = ""
        self._connections = 0

    def stop(self) -> None:
        """End ``run`` soon; safe in a signal handler."""
        self._stop.set()

    def run(self) -> None:
        """Live until ``stop``. Raises StorageError, BrokerError, ConfigError or TrustError when it cannot start."""
        self._check_services()
        data_dir = self.config.node.folder()
        with contextlib.ExitStack() as cleanup:
            cleanup.enter_context(_only_one(data_dir))
            identity = load_or_create_identity(data_dir, self.config.node.name)
            url = self.config.broker.url
            if not url:
                self._broker = EmbeddedBroker(self.config.broker.port or None)
                self._broker.start()
                cleanup.callback(self._broker.stop)
                url = self._broker.url
            self._url = url
            broker = self.config.broker
            lost = NodeState(state="lost", time_us=time.time_ns() // 1000, fingerprint=identity.fingerprint)
            self._bus = Bus(
                url=url,
                node=identity.node,
                client="supervisor",
                username=broker.username,
                password=broker.password(),
                ca_file=broker.ca_file,
                queue_messages=self.config.bus.queue_messages,
                will=(lost, {}),
            )
            self._fingerprint = identity.fingerprint
            self._bus.hear(ServiceState, self._hear_state, node=identity.node)
            self._bus.start(timeout_s=None)
            cleanup.callback(self._goodbye, self._bus)
            cleanup.callback(self._stop_services)
            log.info("node %s in %s, broker %s", identity.node, data_dir, url)
            while not self._stop.is_set():
                self._keep_broker()
                for child in self._children.values():
                    self._keep(child)
                self._say_state()
                self._stop.wait(POLL_S)

    # --- services -------------------------------------------------------------------------------------------

    def _check_services(self) -> None:
        for name in self._children:
            row = BY_NAME[name]
            missing = missing_packages(row)
            if missing:
                raise ConfigError(
                    f"starting {name}: the packages {', '.join(missing)} are not installed",
                    hint=f"install mindstream[{row.extra}], or leave {name} out of services.enabled",
                    field="services.enabled",
                )

    def _keep(self, child: _Child) -> None:
        """Start a service that does not run, unless it has failed for good."""
        now_s = time.monotonic()
        if child.process is not None:
            code = child.process.poll()
            if code is None:
                return
            child.process = None
            self._ended(child, code, now_s)
        if not child.failed and now_s >= child.next_start_s:
            command = [sys.executable, "-m", "edge.service", child.name, "--broker", self._url]
            if self._config_path is not None:
                command += ["--config", str(self._config_path)]
            try:
                child.process = spawn(command)
            except OSError as error:
                self._ended(child, -1, now_s, reason=str(error))
                return
            child.started_s = now_s
            child.condition = "init"

    def _ended(self, child: _Child, code: int, now_s: float, reason: str = "") -> None:
        settings = self.config.supervisor
        how = reason or (f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}")
        while child.restarts and now_s - child.restarts[0] > settings.restart_window_s:
            child.restarts.popleft()
        if code == EXIT_CONFIG:
            self._fail(child, f"its configuration is wrong ({how}); its log says what")
        elif len(child.restarts) >= settings.restart_limit:
            self._fail(
                child,
                f"it ended {len(child.restarts) + 1} times in {settings.restart_window_s:g} s, at last with {how}; "
                f"its log is {self.config.node.folder() / 'logs' / (child.name + '.log')}",
            )
        else:
            steady = now_s - child.started_s > STEADY_S or not child.backoff_s
            child.backoff_s = settings.backoff_first_s if steady else min(settings.backoff_max_s, child.backoff_s * 2)
            child.restarts.append(now_s)
            child.next_start_s = now_s + child.backoff_s
            self._report("service-restarted", "warning", f"{child.name} ended with {how}; it is started again")

    def _fail(self, child: _Child, reason: str) -> None:
        """Stop one service for good, loudly."""
        child.failed, child.condition = reason, "failed"
        self._report("service-stopped", "error", f"{child.name} is stopped: {reason}")
        assert self._bus is not None
        try:
            state = ServiceState(state="failed", time_us=time.time_ns() // 1000, reason=reason)
            self._bus.say(state, service=child.name, timeout_s=1.0)
        except MindstreamError as error:
            log.warning("the state of %s could not be said: %s", child.name, error)

    def _hear_state(self, message: Received) -> None:
        child = self._children.get(message.topic.names["service"])
        if child is None or child.failed:
            return
        state: ServiceState = message.data
        if child.process is not None and state.pid in (child.process.pid, 0):
            child.condition = state.state if state.pid else child.condition

    def _stop_services(self) -> None:
        """SIGTERM to each, the last started first; SIGKILL to what does not end in time."""
        alive = [c.process for c in reversed(list(self._children.values())) if c.process is not None]
        for process in alive:
            process.terminate()
        deadline_s = time.monotonic() + self.config.supervisor.stop_timeout_s
        for process in alive:
            try:
                process.wait(max(0.1, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("process %d does not end: it is killed", process.pid)
                process.kill()
                process.wait()

    # --- broker and state -----------------------------------------------------------------------------------

    def _keep_broker(self) -> None:
        """Start the embedded broker again, on the same port, when it has died."""
        broker = self._broker
        now_s = time.monotonic()
        if broker is None or broker.alive or now_s < self._broker_next_s:
            return
        self._report("broker-restarted", "warning", "the embedded broker died; it is started again, empty")
        try:
            broker.start()
            self._broker_backoff_s = self.config.supervisor.backoff_first_s
        except BrokerError as error:
            log.error("%s", error)
            self._broker_backoff_s = min(self.config.supervisor.backoff_max_s, self._broker_backoff_s * 2)
        self._broker_next_s = time.monotonic() + self._broker_backoff_s

    def _say_state(self) -> None:
        bus = self._bus
        assert bus is not None
        if not bus.connected:
            return
        conditions = [child.condition for child in self._children.values()]
        state = "init" if "init" in conditions else "ready"
        if state == self._said and bus.connections == self._connections:
            return
        try:
            bus.say(self._state(state), timeout_s=1.0)
        except MindstreamError as error:
            log.warning("the node's state could not be said: %s", error)
            return
        if state == "ready" and self._said != "ready":
            log.info("node %s is ready", self.config.node.name)
            if self._on_ready is not None:
                self._on_ready()
                self._on_ready = None
        self._said, self._connections = state, bus.connections

    def _state(self, state: str) -> NodeState:
        return NodeState(
            state=state,
            time_us=time.time_ns() // 1000,
            fingerprint=self._fingerprint,
            version=version(),
            services=list(self._children),
            pid=os.getpid(),
        )

    def _goodbye(self, bus: Bus) -> None:
        bus.stop(goodbye=[(self._state("disconnected"), {})])

    def _report(self, name: str, severity: str, text: str) -> None:
        if self._bus is not None:
            self._bus.events.report(name, severity, text)


@contextlib.contextmanager
def _only_one(data_dir: Path) -> Iterator[None]:
    """Hold the data folder for this process. Raises StorageError naming the process that has it."""
    path = data_dir / "supervisor.lock"
    with storage_errors(f"making the data folder {data_dir}"):
        data_dir.mkdir(parents=True, exist_ok=True)
    with storage_errors(f"opening {path}"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise StorageError(
                f"starting a node in {data_dir}: another supervisor has it, process {holder}",
                hint="stop that one, or set node.data_dir to another folder",
                field="node.data_dir",
                reason="in use",
            ) from None
        with storage_errors(f"writing {path}"):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            os.fsync(descriptor)
        yield
    finally:
        os.close(descriptor)


def run_node(config_path: Path | None, on_ready: Callable[[Supervisor], None] | None = None) -> int:
    """`mindstream up`: run a node in this process until SIGTERM or SIGINT; the exit code."""
    try:
        config = load_config(config_path)
        set_up_logging(config, "supervisor")
        supervisor = Supervisor(config, config_path, (lambda: on_ready(supervisor)) if on_ready else None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: supervisor.stop())
        supervisor.run()
    except MindstreamError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CONFIG if isinstance(error, ConfigError) else 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    """``python -m edge.supervisor``."""
    parser = argparse.ArgumentParser(prog="python -m edge.supervisor", description="Run one Mindstream node.")
    parser.add_argument("--config", type=Path, default=None, help="mindstream.toml")
    return run_node(parser.parse_args(arguments).config)


if __name__ == "__main__":
    sys.exit(main())
