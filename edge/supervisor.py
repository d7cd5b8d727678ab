"""The supervisor: one process that keeps a node's broker and services running.

It starts the embedded broker when none is configured, then every service at once; starts again what dies, with
backoff; and when one service dies more often than the configuration allows, stops that one, loudly, while the others
go on, and says ``failed`` for it on the bus. Children die with it, however it dies; SIGTERM ends them in the reverse
order of the table, the broker last.

``mindstream up`` and ``python -m edge.supervisor --config FILE`` run one.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from pathlib import Path

from broker.embedded import EmbeddedBroker
from edge.bus import Bus
from edge.config import Config, find_config, load_config
from edge.files import storage_errors, write_atomically
from edge.keys import load_or_create_identity
from edge.logs import formatter, message_of, say_end, set_up_logging, wrapped
from edge.node_lock import NodeLock
from edge.process import ChildProcess, RotatingLog, free_bytes, start_child
from edge.service import EXIT_CONFIG
from edge.service_table import BY_NAME, ServiceRow, missing_packages
from edge.stopping import StopFlag
from edge.text import printable
from protocol.codec import Received
from protocol.errors import BrokerError, ConfigError, MindstreamError, StorageError
from protocol.messages import Event, ServiceState

log = logging.getLogger(__name__)

TICK_S = 0.05
MIN_FREE_BYTES = 16 * 1024 * 1024
"""With less free space a node does not start: it could not keep what it promises to keep."""
SETTLED = frozenset({"ready", "degraded"})


class _Kept:
    """One service under the supervisor's care."""

    def __init__(self, row: ServiceRow, log_file: RotatingLog) -> None:
        self.row = row
        self.log_file = log_file
        self.child: ChildProcess | None = None
        self.start_at_s: float | None = 0.0
        """When to start it, monotonic; None while it runs or once it is given up."""
        self.deaths_s: deque[float] = deque()
        self.state = "init"
        """As the service says it itself, or ``failed`` once it is given up."""
        self.failure = ""
        """Why it was given up."""
        self.started_s = 0.0
        self.repeat_failure = False


class Supervisor:
    """Keeps one node running.

    Args:
        config: the node's configuration.
        config_path: the file that it came from, for the services; None lets them look for it as this process did.
        echo: pass on what children print, with their names before it, to stderr as well as to their log files.
    """

    def __init__(self, config: Config, *, config_path: Path | None = None, echo: bool = True) -> None:
        self.config = config
        self.node = config.node.name
        self.data_dir = config.node.folder()
        self.broker_url = config.broker.url
        self.ready = threading.Event()
        """Set once every service is ready, or says itself why it is less than that, or is given up."""
        self._config_path = config_path
        self._echo = echo
        self._stop = StopFlag()
        self._hurry = StopFlag()
        self._lock: NodeLock | None = None
        self._broker: EmbeddedBroker | None = None
        self._broker_deaths = 0
        self._broker_start_at_s = 0.0
        self._bus: Bus | None = None
        self._connections = 0
        self._kept: list[_Kept] = []
        self._started_s = time.monotonic()
        self._unsaid: deque[Event] = deque(maxlen=100)

    # --- life ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run until stop(). Raises ConfigError, StorageError or BrokerError when the node cannot start."""
        self._started_s = time.monotonic()
        try:
            self._prepare_folder()
            self._lock = NodeLock(self.data_dir)
            load_or_create_identity(self.data_dir, self.node)
            self._start_broker()
            self._lock.announce(self.node, self.broker_url)
            self._open_bus()
            self._choose_services()
            patience_s = 3.0
            while not self._stop.wait(TICK_S if self._kept else 0):
                self._look_after_broker()
                for kept in self._kept:
                    self._look_after(kept)
                self._look_at_bus()
                self._say_events()
                patience_s = self._complain_of_broker(patience_s)
        finally:
            self._end()

    def stop(self) -> None:
        """End run() soon; a second call does not wait for services to end well. Safe in a signal handler."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    def services(self) -> dict[str, str]:
        """Name to state of every service that it was told to keep."""
        return {kept.row.name: kept.state for kept in self._kept}

    def pids(self) -> dict[str, int]:
        """Name to process id of every child that runs, the embedded broker included."""
        found = {kept.row.name: kept.child.pid for kept in self._kept if kept.child is not None}
        if self._broker is not None and self._broker.pid is not None:
            found["broker"] = self._broker.pid
        return found

    def _end(self) -> None:
        if self._kept:
            log.info("stopping %s", self.node)
        for kept in reversed(self._kept):
            if kept.child is not None:
                self._end_service(kept, kept.child)
        if self._bus is not None:
            self._say_events()
            self._bus.stop(timeout_s=2.0)
        if self._broker is not None:
            self._broker.stop()
        for kept in self._kept:
            kept.log_file.close()
        if self._lock is not None:
            self._lock.release()

    def _end_service(self, kept: _Kept, child: ChildProcess) -> None:
        child.terminate()
        deadline_s = time.monotonic() + self.config.supervisor.stop_timeout_s
        while child.wait(0.05) is None:
            if self._hurry.is_set() or time.monotonic() > deadline_s:
                log.warning("%s did not stop when asked to: killed", kept.row.name)
                break
        child.wait_or_kill(0)
        kept.child = None

    # --- the start ----------------------------------------------------------------------------------------

    def _prepare_folder(self) -> None:
        with storage_errors(f"making the data folder {self.data_dir}"):
            (self.data_dir / "logs").mkdir(mode=0o700, parents=True, exist_ok=True)
        # Asked for, not only looked at: root may write where the mode says no, and nobody on a read-only file system.
        write_atomically(self.data_dir / ".writable", b"")
        free = free_bytes(self.data_dir)
        if free < MIN_FREE_BYTES:
            raise StorageError(
                f"starting in {self.data_dir}: {free / 1e6:.1f} MB are free there, a node needs"
                f" {MIN_FREE_BYTES / 1e6:.0f}",
                hint="free some space on that disk, or set node.data_dir to another",
                field="node.data_dir",
                reason="disk full",
            )

    def _start_broker(self) -> None:
        settings = self.config.broker
        if settings.url:
            return
        log_path = self.data_dir / "logs" / "broker.log"
        if log_path.exists() and log_path.stat().st_size > self.config.log.file_bytes:
            log_path.replace(log_path.with_name("broker.log.1"))
        self._broker = EmbeddedBroker(settings.port or None, log_path=log_path)
        try:
            self._broker.start()
        except BrokerError as error:
            if error.reason != "port not available":
                raise
            raise BrokerError(
                error.message,
                hint=f'to use the broker that listens there set broker.url = "mqtt://127.0.0.1:{settings.port}";'
                " for an embedded one on another port set broker.port (0 takes a free one)",
                field="broker.port",
                reason=error.reason,
            ) from error
        self.broker_url = self._broker.url
        log.info("embedded broker at %s", self.broker_url)

    def _open_bus(self) -> None:
        settings = self.config.broker
        self._bus = Bus(
            url=self.broker_url,
            node=self.node,
            client="supervisor",
            username=settings.username,
            password=settings.password(),
            ca_file=settings.ca_file,
            protocol=settings.protocol,
        )
        self._bus.hear(ServiceState, self._hear_service, node=self.node)
        self._bus.start(timeout_s=None)

    def _choose_services(self) -> None:
        names = self.config.service_names()
        settings = self.config.log
        if self.config.services.enabled == []:
            raise ConfigError(
                "starting no service at all: services.enabled is empty",
                hint=f"the services are {', '.join(BY_NAME)}; leave the key out to run all that can run",
                field="services.enabled",
            )
        for name, row in BY_NAME.items():
            if missing := missing_packages(row):
                log.warning(
                    "%s cannot run here: %s not installed; pip install 'mindstream[%s]' brings it",
                    name,
                    " and ".join(missing),
                    row.extra,
                )
            if name not in names:
                continue
            path = self.data_dir / "logs" / f"{name}.log"
            kept = _Kept(row, RotatingLog(path, max_bytes=settings.file_bytes, files=settings.files))
            self._kept.append(kept)
            if missing:
                self._give_up(kept, f"{' and '.join(missing)} not installed: pip install 'mindstream[{row.extra}]'")

    # --- services -----------------------------------------------------------------------------------------

    def _look_after(self, kept: _Kept) -> None:
        child = kept.child
        if child is not None:
            code = child.poll()
            if code is not None:
                kept.child = None
                child.drain()
                self._after_death(kept, child, code)
        elif kept.start_at_s is not None and time.monotonic() >= kept.start_at_s:
            self._start(kept)
        if kept.repeat_failure:
            kept.repeat_failure = False
            self._say_failure(kept)

    def _start(self, kept: _Kept) -> None:
        name = kept.row.name
        command = [sys.executable, "-m", "edge.service", name, "--broker", self.broker_url]
        if self._config_path is not None:
            command += ["--config", str(self._config_path)]

        def on_line(line: bytes) -> None:
            kept.log_file.write_line(line)
            if self._echo:
                text = line.decode("utf-8", "replace")
                as_json = self.config.log.format == "json"
                _print(wrapped(text, self.config.node.name, name) if as_json else f"{name:>12} | {text}")

        kept.state = "init"
        kept.start_at_s = None
        kept.started_s = time.monotonic()
        try:
            kept.child = start_child(command, name=name, on_line=on_line)
        except MindstreamError as error:
            self._count_death(kept, f"could not be started: {error}")

    def _after_death(self, kept: _Kept, child: ChildProcess, code: int) -> None:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        last_words = message_of(child.last_line)
        reason = how + (f": {last_words}" if last_words and code > 0 else "")
        if code == EXIT_CONFIG:
            self._give_up(kept, last_words or "its configuration is wrong")
        else:
            self._count_death(kept, reason)

    def _count_death(self, kept: _Kept, reason: str) -> None:
        settings = self.config.supervisor
        now_s = time.monotonic()
        kept.deaths_s.append(now_s)
        while kept.deaths_s and kept.deaths_s[0] < now_s - settings.restart_window_s:
            kept.deaths_s.popleft()
        deaths = len(kept.deaths_s)
        if deaths > settings.restart_limit:
            self._give_up(
                kept,
                f"it died {deaths} times in {settings.restart_window_s:g} s (supervisor.restart_limit is"
                f" {settings.restart_limit}); the last time it {reason}",
            )
            return
        pause_s = min(settings.backoff_max_s, settings.backoff_first_s * 2 ** (deaths - 1))
        kept.state = "init"
        kept.start_at_s = now_s + pause_s
        self._report("service-died", "warning", f"{kept.row.name} {reason}; it is started again in {pause_s:g} s")

    def _give_up(self, kept: _Kept, reason: str) -> None:
        kept.state = "failed"
        kept.failure = reason
        kept.start_at_s = None
        self._report("service-stopped", "error", f"{kept.row.name} is given up: {reason}. The others go on.")
        self._say_failure(kept)

    def _say_failure(self, kept: _Kept) -> None:
        self._say(ServiceState("failed", _now_us(), kept.failure, os.getpid()), service=kept.row.name)

    def _hear_service(self, message: Received) -> None:
        """On the bus's thread: how a service says it is."""
        name = message.topic.names["service"]
        state: ServiceState = message.data
        for kept in self._kept:
            if kept.row.name != name:
                continue
            if kept.failure:
                # The broker's word that its connection broke may come after ours that it is given up.
                kept.repeat_failure = state.state != "failed"
            elif kept.child is not None and state.pid == kept.child.pid:
                if state.state != kept.state:
                    took = f" after {time.monotonic() - kept.started_s:.1f} s" if kept.state == "init" else ""
                    reason = f": {state.reason}" if state.reason else ""
                    log.info("%s is %s%s%s", name, state.state, took, reason)
                kept.state = state.state

    # --- the broker ---------------------------------------------------------------------------------------

    def _look_at_bus(self) -> None:
        bus = self._bus
        assert bus is not None
        if bus.connected and bus.connections != self._connections:
            # A new connection: the broker may have forgotten what it retained.
            self._connections = bus.connections
            for kept in self._kept:
                kept.repeat_failure = bool(kept.failure)
        if not self.ready.is_set() and all(kept.state in SETTLED or kept.failure for kept in self._kept):
            log.info(
                "%s is ready after %.1f s; broker %s, data in %s",
                self.node,
                time.monotonic() - self._started_s,
                self.broker_url,
                self.data_dir,
            )
            self.ready.set()

    def _look_after_broker(self) -> None:
        broker = self._broker
        if broker is None or broker.alive or time.monotonic() < self._broker_start_at_s:
            return
        self._broker_deaths += 1
        settings = self.config.supervisor
        pause_s = min(settings.backoff_max_s, settings.backoff_first_s * 2 ** min(self._broker_deaths - 1, 16))
        self._broker_start_at_s = time.monotonic() + pause_s
        try:
            broker.start()
        except BrokerError as error:
            log.error("the embedded broker is down: %s; tried again in %g s", error, pause_s)
            return
        self._report(
            "broker-restarted",
            "warning",
            f"the embedded broker died and was started again ({self._broker_deaths} times so far)",
        )

    def _complain_of_broker(self, patience_s: float) -> float:
        """Say that the broker does not answer, ever more rarely; the new patience."""
        bus = self._bus
        assert bus is not None
        if bus.connected or time.monotonic() - self._started_s < patience_s or self._connections:
            return patience_s
        why = f" ({bus.refusal})" if bus.refusal else ""
        log.warning(
            "no broker answers at %s%s: waited %.0f s, and waiting on; broker.url is where it is looked for",
            self.broker_url,
            why,
            time.monotonic() - self._started_s,
        )
        return patience_s * 2

    def _report(self, name: str, severity: str, text: str) -> None:
        """Log it and say it as an event; what cannot be said now is said with the next connection.

        Not through bus.events: that says one event of a name a second, and two services may die at once.
        """
        bus = self._bus
        assert bus is not None
        log.log(_LEVELS[severity], text)
        bus.counters.add(f"event.{name}")
        self._unsaid.append(Event(name=name, severity=severity, text=text))

    def _say_events(self) -> None:
        while self._unsaid and self._say(self._unsaid[0], service="supervisor"):
            self._unsaid.popleft()

    def _say(self, message: ServiceState | Event, **names: str) -> bool:
        bus = self._bus
        assert bus is not None
        if not bus.connected:
            return False
        try:
            bus.say(message, timeout_s=1.0, **names)
        except MindstreamError as error:
            log.warning("a state could not be said: %s", error)
            return False
        return True


def _now_us() -> int:
    return time.time_ns() // 1000


_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_print_lock = threading.Lock()


def _print(line: str) -> None:
    """To stderr, whole lines only; a terminal that has gone away stops nothing."""
    with _print_lock:
        try:
            sys.stderr.write(printable(line) + "\n")
            sys.stderr.flush()
        except (OSError, ValueError):
            pass  # it stands in the log file


class _LogFileHandler(logging.Handler):
    """The supervisor's own log, bounded like the services'."""

    def __init__(self, file: RotatingLog) -> None:
        super().__init__()
        self._log_file = file

    def emit(self, record: logging.LogRecord) -> None:
        self._log_file.write_line(self.format(record).encode("utf-8", "replace"))


def supervise(config: Config, config_path: Path | None = None) -> None:
    """Run a supervisor in this process's main thread until SIGTERM or SIGINT. Raises what Supervisor.run raises."""
    supervisor = Supervisor(config, config_path=config_path)
    # SIGHUP: the terminal was closed.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: supervisor.stop())
    log_file = RotatingLog(
        supervisor.data_dir / "logs" / "supervisor.log", max_bytes=config.log.file_bytes, files=config.log.files
    )
    handler = _LogFileHandler(log_file)
    handler.setFormatter(formatter(config, "supervisor"))
    logging.getLogger().addHandler(handler)
    try:
        supervisor.run()
    finally:
        logging.getLogger().removeHandler(handler)
        log_file.close()


def main(arguments: list[str] | None = None) -> int:
    """``python -m edge.supervisor``; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m edge.supervisor", description="Run a Mindstream node.")
    parser.add_argument("--config", type=Path, default=None, help="mindstream.toml")
    options = parser.parse_args(arguments)
    try:
        config_path = options.config or find_config()
        config = load_config(config_path)
        set_up_logging(config, "supervisor", prefix=True)
        supervise(config, config_path)
    except ConfigError as error:
        say_end("error", error)
        return EXIT_CONFIG
    except MindstreamError as error:
        say_end("error", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
