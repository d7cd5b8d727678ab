"""What every service is made of: one process, one bus connection, handlers declared with ``@hears``.

A service reads top to bottom: what it hears, what it does, what it says. ``python -m edge.service NAME`` runs one:
it opens what it needs, subscribes, says ``ready``, and says every second how it is until SIGTERM. Long work
belongs into a worker thread of the service's own; a handler that starts it returns a Deferred.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import msgspec

from edge.bus import Bus
from edge.config import Config, load_config
from edge.db import open_database
from edge.files import storage_errors
from edge.journal import JOURNAL, CommandJournal
from edge.keys import Peers, load_or_create_identity
from edge.logs import say_end, set_up_logging
from edge.mqtt_version import MQTT_3_1_1
from edge.notify import Notifier
from edge.service_table import BY_NAME
from edge.stopping import StopFlag
from protocol.errors import ConfigError, MindstreamError, StorageError
from protocol.identity import Identity
from protocol.messages import ServiceState
from protocol.topics import SERVICE_STATE

log = logging.getLogger(__name__)

EXIT_CONFIG = 78
"""EX_CONFIG of sysexits.h: starting it again will not help until someone changes the configuration."""
STATE_INTERVAL_S = 1.0
FLOW_COUNTERS = ("handled", "published")
"""These grow with every message, that of the state itself included: alone they are no news."""
WAIT_STEP_S = 5.0
"""While it waits for its broker or its model it asks systemd for more time this often."""
INIT_LONGEST_S = 3600.0
"""A service that is still not ready so long after its start (a model being converted) may be started again."""

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Hears:
    """What ``@hears`` wrote on a method."""

    struct: type[msgspec.Struct]
    batch: int
    names: dict[str, str]


def hears(struct: type[msgspec.Struct], *, batch: int = 1, **names: str) -> Callable[[F], F]:
    """Mark a method as the handler of ``struct``; see Bus.hear for what it takes and returns."""

    def mark(method: F) -> F:
        method.__hears__ = Hears(struct, batch, names)  # type: ignore[attr-defined]
        return method

    return mark


@dataclass(frozen=True)
class Context:
    """What a service is given."""

    config: Config
    identity: Identity
    peers: Peers
    data_dir: Path
    """The service's own folder."""
    broker_url: str


class Service:
    """Base class. Subclasses set ``name``, mark handlers with ``@hears``, and override what they need.

    The order of a life: ``__init__``, ``setup`` (open files; raise and it ends), subscribe, ``started`` (start
    workers, say things), ``tick`` every second, ``teardown``.
    """

    name: ClassVar[str]
    durable_session: ClassVar[bool] = True
    """The broker keeps what comes for this service while it is away."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.config = context.config
        self.node = context.identity.node
        lost = ServiceState("lost", time.time_ns() // 1000, "its connection broke", os.getpid())
        self.bus = self._open_bus(self.name, durable=self.durable_session, will=(lost, {"service": self.name}))
        self._manager = Notifier.from_environment()
        self._manager_told_ready = False
        self._workers: list[threading.Thread] = []
        self._stop = StopFlag()
        self._failure: BaseException | None = None
        self._said: ServiceState | None = None
        self._said_at_s = 0.0

    # --- what a subclass overrides --------------------------------------------------------------------------

    def setup(self) -> None:
        """Open databases and folders, before anything is heard. Raises an error of the tree to end the service."""

    def started(self) -> None:
        """Connected and subscribed for the first time."""

    def reconnected(self) -> None:
        """The connection is a new one: say again what should be retained, the broker may have lost it."""

    def tick(self) -> None:
        """Once a second, on the main thread."""

    def teardown(self) -> None:
        """Stop workers and close files; nothing is heard any more."""

    def condition(self) -> tuple[str, str]:
        """``ready`` or ``degraded`` or ``init``, and what it lacks."""
        return "ready", ""

    def details(self) -> dict[str, Any]:
        """What `mindstream status` shows of it; plain JSON types."""
        return {}

    def stuck(self) -> str:
        """Why it makes no progress although its main loop turns; empty when all is well.

        systemd's watchdog is fed only while this is empty. A service with threads of its own adds to it.
        """
        ended = [thread.name for thread in self._workers if thread.ident is not None and not thread.is_alive()]
        if ended:
            return f"the thread {ended[0]!r} has ended"
        stalled_s = self.bus.stalled_s()
        if stalled_s > self._manager.watchdog_s / 2:
            return "a thread of its bus has ended" if math.isinf(stalled_s) else f"no progress for {stalled_s:.0f} s"
        return ""

    # --- life -----------------------------------------------------------------------------------------------

    def open_bus(self, suffix: str, *, will: tuple[msgspec.Struct, dict[str, str]] | None = None) -> Bus:
        """Another connection of this service, ``{service}-{suffix}``, for traffic that must not hold up the rest."""
        return self._open_bus(f"{self.name}-{suffix}", durable=False, will=will)

    def _open_bus(self, client: str, *, durable: bool, will: tuple[msgspec.Struct, dict[str, str]] | None) -> Bus:
        broker = self.config.broker
        return Bus(
            url=self.context.broker_url,
            node=self.context.identity.node,
            client=client,
            username=broker.username,
            password=broker.password(),
            ca_file=broker.ca_file,
            protocol=broker.protocol,
            queue_messages=self.config.bus.queue_messages,
            durable_session=durable,
            will=will,
        )

    def hearings(self) -> list[tuple[Hears, Callable[..., Any]]]:
        """Every handler of this service."""
        methods = (getattr(self, name) for name in dir(type(self)) if not name.startswith("__"))
        return [(method.__hears__, method) for method in methods if hasattr(method, "__hears__")]

    def run(self) -> None:
        """Live until ``stop``. Raises what ``setup`` raises."""
        with storage_errors(f"making the folder {self.context.data_dir}"):
            self.context.data_dir.mkdir(parents=True, exist_ok=True)
        self.setup()
        journal_db = open_database(self.context.data_dir / "journal.db", schema=JOURNAL)
        journal = CommandJournal(journal_db)
        for declared, method in self.hearings():
            self.bus.hear(declared.struct, method, batch=declared.batch, **declared.names)
        self.bus.keep_asks_in(journal)
        try:
            self.bus.start(timeout_s=None)
            self._wait_for_broker()
            if not self._stop.is_set():
                self.started()
                self.say_state()
            started_s = time.monotonic()
            purge_at_s = time.monotonic() + 60
            connections = self.bus.connections
            while not self._stop.is_set():
                self._tell_manager(started_s)
                if self._stop.wait(STATE_INTERVAL_S):
                    break
                if self.bus.connections != connections:
                    connections = self.bus.connections
                    self._said = None
                    self.reconnected()
                self.tick()
                self.say_state()
                if time.monotonic() > purge_at_s:
                    purge_at_s = time.monotonic() + (3600 if self._purge(journal) else 60)
        finally:
            self._manager.stopping()
            gone = ServiceState(state="disconnected", time_us=time.time_ns() // 1000, pid=os.getpid())
            self.bus.stop(goodbye=[(gone, {"service": self.name})])
            self.teardown()
            journal_db.close()
            self._manager.close()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """End ``run`` soon; safe in a signal handler."""
        self._stop.set()

    def stopping(self) -> bool:
        """Whether the service is ending: for workers that may take long."""
        return self._stop.is_set()

    def worker_thread(self, work: Callable[[], None], name: str) -> threading.Thread:
        """A thread without which the service is not whole: if it fails, the service ends, to be started again."""

        def run() -> None:
            try:
                work()
            except BaseException as error:
                log.exception("%s: the thread %r failed; the service ends", self.name, name)
                self._failure = error
                self._stop.set()

        thread = threading.Thread(target=run, name=name, daemon=True)
        self._workers.append(thread)
        return thread

    def _purge(self, journal: CommandJournal) -> bool:
        try:
            journal.purge()
        except StorageError as error:
            # Even forgetting takes some room on the disk; the service can go on without.
            log.warning("%s could not forget old commands: %s", self.name, error)
            return False
        return True

    def _wait_for_broker(self) -> None:
        """Wait, saying so now and then: the broker may come up after this node."""
        patience_s, since_s = 5.0, time.monotonic()
        extend_at_s = since_s
        while not self.bus.connected and not self._stop.wait(0.02):
            if time.monotonic() >= extend_at_s:
                extend_at_s = time.monotonic() + WAIT_STEP_S
                self._manager.extend_timeout(4 * WAIT_STEP_S)
                self._manager.status(self._without_broker())
                if self.bus.refusal:
                    self.say_state()  # it hears nothing, or not all, and can say so where only subscribing is refused
            if time.monotonic() - since_s > patience_s:
                log.warning(
                    "%s has waited %.0f s for its broker at %s%s",
                    self.name,
                    time.monotonic() - since_s,
                    self.bus.url,
                    f": {self.bus.refusal}" if self.bus.refusal else "",
                )
                patience_s *= 2

    def _without_broker(self) -> str:
        return f"waiting for the broker at {self.bus.url}" + (f": {self.bus.refusal}" if self.bus.refusal else "")

    def _tell_manager(self, started_s: float) -> None:
        """Tell systemd once that it is ready, how it is, and that it lives while it does."""
        if not self._manager.listened_to:
            return
        condition, reason = self.condition()
        line = f"{condition}: {reason}" if reason else condition
        self._manager.status(line if self.bus.connected else f"{line}; {self._without_broker()}")
        if not self._manager_told_ready:
            if condition == "init":
                if time.monotonic() - started_s < INIT_LONGEST_S:
                    self._manager.extend_timeout(4 * WAIT_STEP_S)
                return
            self._manager_told_ready = True
            self._manager.ready()
        if self._manager.watchdog_s:
            if stuck := self.stuck():
                # The watchdog ends the process by SIGABRT, and with it go the stacks of all threads into the log.
                log.error("%s is stuck: %s; the watchdog is not fed", self.name, stuck)
                self._manager.status(f"stuck: {stuck}")
            else:
                self._manager.alive()

    def say_state(self) -> None:
        """Publish the service's state if it changed, or has not been said for a while."""
        condition, reason = self.condition()
        try:
            details = self.details()
        except StorageError as error:
            condition, reason, details = "degraded", str(error), {}
        if self.bus.refusal:
            condition, reason = "degraded", self.bus.refusal
        if self.bus.protocol == MQTT_3_1_1:
            details = {**details, "mqtt": MQTT_3_1_1}
        state = ServiceState(
            state=condition,
            time_us=0,
            reason=reason,
            pid=os.getpid(),
            queue=self.bus.queued,
            counters=self.bus.counters.snapshot(),
            details=details,
        )
        now_s = time.monotonic()
        news = msgspec.structs.replace(
            state, counters={name: count for name, count in state.counters.items() if name not in FLOW_COUNTERS}
        )
        if (news == self._said and now_s - self._said_at_s < SERVICE_STATE.every_s) or not self.bus.reachable:
            return
        self._said, self._said_at_s = news, now_s
        try:
            self.bus.say(
                msgspec.structs.replace(state, time_us=time.time_ns() // 1000), service=self.name, timeout_s=1.0
            )
        except MindstreamError as error:
            self._said = None
            log.warning("%s could not say how it is: %s", self.name, error)


def main(arguments: list[str] | None = None) -> int:
    """Run one service as a process; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m edge.service", description="Run one Mindstream service.")
    parser.add_argument("name", choices=list(BY_NAME))
    parser.add_argument("--config", type=Path, default=None, help="mindstream.toml")
    parser.add_argument("--broker", default="", help="the broker's URL, in place of broker.url")
    options = parser.parse_args(arguments)
    # A crash in a native library, and the watchdog's SIGABRT, leave the stack of every thread in the log.
    faulthandler.enable()
    try:
        config = load_config(options.config)
        set_up_logging(config, options.name)
        broker_url = options.broker or config.broker.url
        if not broker_url:
            raise ConfigError(
                f"starting {options.name} alone: broker.url is empty, and there is no supervisor to start a broker",
                hint="use `mindstream up`, or set broker.url",
                field="broker.url",
            )
        row = BY_NAME[options.name]
        service_class: type[Service] = getattr(importlib.import_module(row.module), row.class_name)
        data_dir = config.node.folder()
        identity = load_or_create_identity(data_dir, config.node.name)
        service = service_class(
            Context(
                config=config,
                identity=identity,
                peers=Peers(data_dir, identity),
                data_dir=data_dir / options.name,
                broker_url=broker_url,
            )
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: service.stop())
        service.run()
    except ConfigError as error:
        say_end(options.name, error)
        return EXIT_CONFIG
    except MindstreamError as error:
        say_end(options.name, error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
