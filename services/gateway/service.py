"""The gateway's service: it hears which node runs which model, and serves HTTP in a thread of its own."""

from __future__ import annotations

import logging
import ssl
import threading
import time
from typing import Any

from edge.gateway_token import TokenCheck, base_url, make_token, token_file
from edge.service import Context, Service
from protocol.errors import ConfigError, MindstreamError
from protocol.messages import ServiceState
from services.gateway.nodes import Runners
from services.gateway.runs import Runs
from services.gateway.vectors import Vectors

log = logging.getLogger(__name__)

LISTEN_AGAIN_S = 5.0
RETAINED_S = 1.5
"""What the runners say is retained and comes with the subscription: after this long there is none."""


class Gateway(Service):
    """One node's endpoint."""

    name = "gateway"
    durable_session = False  # states that were said while it was away are no news any more

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        # Subscriptions to runs come and go on a connection of their own.
        self.run_bus = self.open_bus("runs")
        self.runners = Runners(self.node)
        self.runs = Runs(self.run_bus)
        self.vectors = Vectors(self.run_bus)
        self._thread: threading.Thread | None = None
        self._refusal = ""
        """Why nothing is served; empty while all is well."""
        self._listen_at_s = 0.0
        self._subscribed_s = 0.0

    def setup(self) -> None:
        path = token_file(self.config)
        if not path.exists():
            if self.config.gateway.token_file:
                raise ConfigError(
                    f"reading the endpoint's token: there is no file {path}",
                    hint="`mindstream gateway token --new` makes it",
                    field="gateway.token_file",
                    reason="no such file",
                )
            make_token(path)
            log.info("a new token for the endpoint is in %s", path)
        self.token = TokenCheck(path)
        self.bus.hear(ServiceState, self.runners.hear, service="model_runner")

    def started(self) -> None:
        self.run_bus.start(timeout_s=None)
        self._subscribed_s = time.monotonic()
        self._listen()

    def tick(self) -> None:
        if self._thread is None:
            self._listen()

    def teardown(self) -> None:
        self.runs.close()
        self.vectors.close()
        if self._thread is not None:
            self._server.stop(self._thread)
        self.run_bus.stop()

    def condition(self) -> tuple[str, str]:
        if not self.config.gateway.port:
            return "degraded", "it listens nowhere: gateway.port is 0"
        if self._refusal:
            return "degraded", self._refusal
        return ("ready", "") if self._thread is not None else ("init", "")

    def stuck(self) -> str:
        return super().stuck() or ("" if self.run_bus.stalled_s() < 30 else "its connection for runs makes no progress")

    def details(self) -> dict[str, Any]:
        return {"url": self.url if self._thread is not None else "", "under_way": self.runs.active}

    @property
    def url(self) -> str:
        """What programs are told as base URL."""
        return base_url(self.config.gateway)

    def _listen(self) -> None:
        """Serve, if the port can be had; tried again until it can."""
        settings = self.config.gateway
        if not settings.port or time.monotonic() < self._listen_at_s:
            return
        self.runners.heard.wait(max(0.0, self._subscribed_s + RETAINED_S - time.monotonic()))
        from services.gateway.http import Endpoint, application
        from services.gateway.server import HttpServer, listen

        self.endpoint = Endpoint(
            runners=self.runners,
            runs=self.runs,
            vectors=self.vectors,
            counters=self.bus.counters,
            timeout_s=settings.timeout_s,
            max_requests=settings.max_requests,
            max_answer_tokens=settings.max_answer_tokens,
        )
        app = application(
            self.endpoint,
            token=self.token,
            hosts=[settings.host, *settings.hosts],
            origins=settings.origins,
            counters=self.bus.counters,
            events=self.bus.events,
        )
        try:
            listener = listen(settings.host, settings.port)
            try:
                self._server = HttpServer(
                    app, listener, cert_file=settings.cert_file, key_file=settings.key_file, count=self.bus.counters.add
                )
            except (OSError, ssl.SSLError) as error:
                listener.close()
                raise ConfigError(
                    f"reading the endpoint's certificate: {error}",
                    hint="gateway.cert_file and gateway.key_file are PEM files that belong together",
                    field="gateway.cert_file",
                ) from None
        except MindstreamError as error:
            self._listen_at_s = time.monotonic() + LISTEN_AGAIN_S
            self._refusal = error.message
            self.bus.events.report("endpoint-away", "warning", str(error))
            return
        self._refusal = ""
        self._thread = self.worker_thread(self._server.serve, "http")
        self._thread.start()
        log.info("serving %s", self.url)
