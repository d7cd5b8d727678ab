"""The endpoint where things go wrong: a model runner that loses, repeats, refuses and goes; clients that are slow.

What a real model runner cannot be made to do is done by a client of the bus that speaks as one.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest

from broker.embedded import EmbeddedBroker
from edge.bus import Bus, Deferred
from edge.gateway_token import make_token, read_token, token_file
from protocol.codec import Received
from protocol.errors import ContextOverflow, MindstreamError, ModelError, ModelUnavailable, Overloaded
from protocol.messages import ModelCancel, ModelCancelled, ModelGenerate, RunDone, RunToken, ServiceState, Usage
from services.gateway import answering, server
from services.gateway.service import Gateway
from tests.services.gateway.conftest import TIMEOUT_S, run_service
from tests.support.nodes import Watcher, wait_for
from tests.support.ports import free_port

Play = Callable[["Script", Received, Deferred], None]


class Script:
    """Speaks as node melon's model runner; what it does with an ask is ``play``."""

    def __init__(self, url: str) -> None:
        self.bus = Bus(url=url, node="melon", client="model_runner")
        self.play: Play = answer("hello")
        self.asks: list[ModelGenerate] = []
        self.cancelled: list[str] = []
        self.bus.hear(ModelGenerate, self._generate)
        self.bus.hear(ModelCancel, self._cancel)
        self.bus.start(TIMEOUT_S)
        self.say("ready")

    def say(self, state: str) -> None:
        """How it is."""
        # The broker's word for one that is lost has no details, nor has a goodbye.
        told = {"model": "script"} if state in ("ready", "init") else {}
        self.bus.say(ServiceState(state, time.time_ns() // 1000, details=told), service="model_runner")

    def _generate(self, message: Received) -> Deferred:
        self.asks.append(message.data)
        deferred = Deferred()
        # A handler must return; what is said meanwhile has a thread.
        threading.Thread(target=self.play, args=(self, message, deferred), daemon=True).start()
        return deferred

    def _cancel(self, message: Received) -> ModelCancelled:
        self.cancelled.append(message.data.run)
        return ModelCancelled(True)

    def token(self, ask: ModelGenerate, index: int, text: str) -> None:
        self.bus.say(RunToken(index, index, text, -0.5, 0.5), run=ask.run)


def done(ask: ModelGenerate, text: str, tokens: int) -> RunDone:
    return RunDone(ask.run, ask.conversation, text, list(range(tokens)), "stop", Usage(3, 0, tokens, 1.0, 10.0))


def answer(*texts: str) -> Play:
    """Says each text as a token, in order."""

    def play(script: Script, message: Received, deferred: Deferred) -> None:
        for index, text in enumerate(texts):
            script.token(message.data, index, text)
        deferred.set_result(done(message.data, "".join(texts), len(texts)))

    return play


def fail(error: MindstreamError) -> Play:
    """Says that it failed."""

    def play(_script: Script, _message: Received, deferred: Deferred) -> None:
        deferred.set_exception(error)

    return play


class Stage:
    """A broker, melon's scripted runner, and gateways of node tomato."""

    def __init__(self, folder: Path, cleanup: ExitStack) -> None:
        self.folder = folder
        self._cleanup = cleanup
        self.broker = cleanup.enter_context(EmbeddedBroker())
        self.watcher = Watcher(self.broker.url)
        cleanup.callback(self.watcher.bus.stop)
        self.script = Script(self.broker.url)
        cleanup.callback(self.script.bus.stop)

    def gateway(self, toml: str = "", *, port: int = 0, ready: bool = True) -> Gateway:
        port = port or free_port()
        found: Gateway = run_service(
            self._cleanup, Gateway, self.folder, "tomato", self.broker.url, f"[gateway]\nport = {port}\n{toml}"
        )
        if ready:
            wait_for(lambda: found.condition()[0] == "ready", "the gateway is not ready", TIMEOUT_S)
            wait_for(found.runners.all, "the gateway has not heard of the runner", TIMEOUT_S)
        return found

    def post(self, gateway: Gateway, body: dict[str, Any] | None = None, **arguments: Any) -> httpx2.Response:
        asked = {"model": "script", "messages": [{"role": "user", "content": "Hi"}], **(body or {})}
        headers = {"Authorization": f"Bearer {read_token(token_file(gateway.config))}"}
        with httpx2.Client(timeout=TIMEOUT_S, verify=arguments.pop("verify", True)) as client:
            return client.post(f"{gateway.url}/chat/completions", json=asked, headers=headers, **arguments)

    def stream(self, gateway: Gateway, on_text: Callable[[str], object]) -> str:
        """A streamed answer, whole; ``on_text`` is called with what has come so far."""
        asked = {"model": "script", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
        headers = {"Authorization": f"Bearer {read_token(token_file(gateway.config))}"}
        url = f"{gateway.url}/chat/completions"
        found = ""
        with httpx2.stream("POST", url, json=asked, headers=headers, timeout=TIMEOUT_S) as reply:
            assert reply.status_code == 200
            for part in reply.iter_text():
                found += part
                on_text(found)
        return found


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with ExitStack() as cleanup:
        yield Stage(tmp_path, cleanup)


def texts_of(stream: str) -> str:
    """What the events of a stream say together."""
    said = ""
    for line in stream.splitlines():
        if line.startswith("data: {"):
            for choice in msgspec.json.decode(line[6:]).get("choices", []):
                said += choice["delta"].get("content") or ""
    return said


# --- the runner -------------------------------------------------------------------------------------------------


def test_tokens_that_come_late_twice_or_never_leave_the_text_whole(stage: Stage) -> None:
    gateway = stage.gateway()

    def play(script: Script, message: Received, deferred: Deferred) -> None:
        for index, text in ((0, "one "), (2, "three "), (0, "one "), (1, "two "), (4, "five "), (2, "three ")):
            script.token(message.data, index, text)
        deferred.set_result(done(message.data, "one two three four five ", 5))  # 3 is lost

    stage.script.play = play
    reply = stage.post(gateway, {"stream": True})
    assert reply.status_code == 200
    assert texts_of(reply.text) == "one two three four five "
    assert reply.text.endswith("data: [DONE]\n\n")
    assert gateway.bus.counters["lost.token"] == 1


@pytest.mark.parametrize(
    ("error", "status", "code", "retry"),
    [
        (Overloaded("too many"), 429, "overloaded", True),
        (ModelUnavailable("no model"), 503, "model_unavailable", True),
        (ContextOverflow("too long"), 400, "context_length_exceeded", False),
        (ModelError("it broke"), 500, "model_error", False),
    ],
)
def test_an_error_of_the_runner_is_a_status(
    stage: Stage, error: MindstreamError, status: int, code: str, retry: bool
) -> None:
    gateway = stage.gateway()
    stage.script.play = fail(error)
    for stream in (False, True):
        reply = stage.post(gateway, {"stream": stream})
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
        assert ("retry-after" in reply.headers) == retry
        assert error.message in reply.json()["error"]["message"]


def test_an_error_in_mid_stream_is_an_event_and_no_end(stage: Stage) -> None:
    gateway = stage.gateway()
    read = threading.Event()

    def play(script: Script, message: Received, deferred: Deferred) -> None:
        for index, text in enumerate(("one ", "two ")):
            script.token(message.data, index, text)
        read.wait(TIMEOUT_S)
        deferred.set_exception(ModelError("it broke"))

    stage.script.play = play
    found = stage.stream(gateway, lambda so_far: read.set() if "two " in so_far else None)
    assert texts_of(found) == "one two "
    assert '"code":"model_error"' in found
    assert "[DONE]" not in found


def test_a_runner_that_is_not_ready_or_has_gone_is_told_apart(stage: Stage) -> None:
    gateway = stage.gateway()
    stage.script.say("init")
    wait_for(lambda: not gateway.runners.all()[0].ready, "the state was not heard")
    reply = stage.post(gateway)
    assert (reply.status_code, "retry-after" in reply.headers) == (503, True)
    stage.script.say("disconnected")
    wait_for(lambda: not gateway.runners.all(), "the state was not heard")
    reply = stage.post(gateway)
    assert reply.status_code == 404
    assert "no node has a model that is ready" in reply.json()["error"]["message"]


def test_a_node_that_goes_for_good_ends_its_answers(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "TICK_S", 0.1)
    monkeypatch.setattr(answering, "NODE_AWAY_S", 0.5)
    gateway = stage.gateway()
    stage.script.play = lambda script, _message, _deferred: script.say("lost")
    reply = stage.post(gateway)
    assert (reply.status_code, reply.json()["error"]["code"]) == (502, "node_away")


def test_a_stream_is_kept_alive_while_the_model_reads(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "TICK_S", 0.1)
    monkeypatch.setattr(answering, "HEADERS_S", 0.3)
    gateway = stage.gateway()
    kept_alive = threading.Event()

    def play(script: Script, message: Received, deferred: Deferred) -> None:
        kept_alive.wait(TIMEOUT_S)
        answer("hello")(script, message, deferred)

    stage.script.play = play
    found = stage.stream(gateway, lambda so_far: kept_alive.set() if so_far.count(": the model") > 1 else None)
    assert found.startswith(": ")
    assert texts_of(found) == "hello"


# --- clients ----------------------------------------------------------------------------------------------------


def test_a_client_that_does_not_read_holds_up_nobody_and_is_dropped(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "STALLED_S", 3.0)
    gateway = stage.gateway()
    big = "x" * 8_000

    def play(script: Script, message: Received, deferred: Deferred) -> None:
        for index in range(100_000):
            if message.data.run in script.cancelled:
                deferred.set_result(RunDone(message.data.run, message.data.conversation, "", [], "cancelled"))
                return
            script.token(message.data, index, big)

    stage.script.play = play
    body = msgspec.json.encode({"model": "script", "messages": [{"role": "user", "content": "Hi"}], "stream": True})
    token = read_token(token_file(gateway.config))
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(("127.0.0.1", gateway.config.gateway.port))
        lazy.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        wait_for(lambda: stage.script.asks, "the run was not asked for", TIMEOUT_S)
        stage.script.play = answer("hello")
        assert stage.post(gateway).json()["choices"][0]["message"]["content"] == "hello"
        wait_for(lambda: stage.script.cancelled, "the run was not cancelled", TIMEOUT_S)
    assert gateway.bus.counters["dropped.slow_reader"] == 1
    wait_for(lambda: gateway.runs.active == 0, "the run is still under way", TIMEOUT_S)


def test_a_head_that_does_not_come_and_one_without_end_are_dropped(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HEAD_S", 1.5)
    gateway = stage.gateway()
    address = ("127.0.0.1", gateway.config.gateway.port)
    for begun in (b"", b"POST /v1/chat/comp"):
        with socket.create_connection(address, TIMEOUT_S) as slow:
            assert _rest(slow, begun) == b""
    assert gateway.bus.counters["dropped.slow_head"] == 2
    with socket.create_connection(address, TIMEOUT_S) as endless:
        begun = b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * 100_000
        assert _rest(endless, begun)[:12] in (b"HTTP/1.1 400", b"")  # the refusal may be lost in the reset


def test_a_connection_that_is_idle_between_two_requests_is_kept(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_S", 1.5)
    gateway = stage.gateway()

    def kept() -> bool:
        """False also when this test itself took so long with a head that it was dropped for it."""
        with socket.create_connection(("127.0.0.1", gateway.config.gateway.port), TIMEOUT_S) as connection:
            try:
                for idle_s in (0.0, 2 * server.HEAD_S):
                    time.sleep(idle_s)
                    connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    if not connection.recv(65_536).startswith(b"HTTP/1.1 200 "):
                        return False
            except ConnectionError:
                return False
        return True

    wait_for(kept, "it was dropped", TIMEOUT_S)


def _rest(connection: socket.socket, sent: bytes) -> bytes:
    """All that comes after ``sent``, until the other side closes, which it may do before all is sent."""
    found = b""
    try:
        connection.sendall(sent)
        while part := connection.recv(65_536):
            found += part
    except ConnectionError:
        pass
    return found


def test_a_body_that_is_too_large_is_refused_before_it_is_read(stage: Stage) -> None:
    gateway = stage.gateway()
    reply = stage.post(gateway, {"user": "x" * 9_000_000})
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")
    # Larger than what the bus carries.
    reply = stage.post(gateway, {"messages": [{"role": "user", "content": "x" * 200_000}] * 6})
    assert reply.status_code == 413


def test_more_requests_than_allowed_are_told_to_come_again(stage: Stage) -> None:
    gateway = stage.gateway("max_requests = 1\n")
    released = threading.Event()

    def play(script: Script, message: Received, deferred: Deferred) -> None:
        released.wait(TIMEOUT_S)
        answer("hello")(script, message, deferred)

    stage.script.play = play
    first = threading.Thread(target=stage.post, args=(gateway,))
    first.start()
    try:
        wait_for(lambda: gateway.runs.active == 1, "the first is not under way", TIMEOUT_S)
        reply = stage.post(gateway)
        assert (reply.status_code, "retry-after" in reply.headers) == (429, True)
    finally:
        released.set()
        first.join(TIMEOUT_S)
    wait_for(lambda: gateway.runs.active == 0, "it has not ended", TIMEOUT_S)
    assert stage.post(gateway).status_code == 200


# --- its life ---------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_said_and_tried_again(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.gateway.service.LISTEN_AGAIN_S", 0.2)
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        gateway = stage.gateway(port=port, ready=False)
        wait_for(lambda: gateway.condition()[0] == "degraded", "it does not say so", TIMEOUT_S)
        assert str(port) in gateway.condition()[1]
    wait_for(lambda: gateway.condition()[0] == "ready", "it did not try again", TIMEOUT_S)
    assert stage.post(gateway).status_code == 200


def test_stopping_cancels_what_is_under_way(stage: Stage) -> None:
    gateway = stage.gateway()

    def play(script: Script, message: Received, deferred: Deferred) -> None:
        script.token(message.data, 0, "one ")
        wait_for(lambda: message.data.run in script.cancelled, "it was not cancelled", TIMEOUT_S)
        deferred.set_result(RunDone(message.data.run, message.data.conversation, "", [], "cancelled"))

    stage.script.play = play
    replies: list[httpx2.Response] = []
    asking = threading.Thread(target=lambda: replies.append(stage.post(gateway, {"stream": True})))
    asking.start()
    wait_for(lambda: gateway.runs.active == 1 and stage.script.asks, "it is not under way", TIMEOUT_S)
    gateway.stop()
    asking.join(TIMEOUT_S)
    assert stage.script.cancelled == [stage.script.asks[0].run]
    assert '"code":"cancelled"' in replies[0].text


def test_a_new_token_is_in_force_at_once_and_stands_in_no_log(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    gateway = stage.gateway()
    path = token_file(gateway.config)
    assert path.stat().st_mode & 0o777 == 0o600
    old = read_token(path)
    assert stage.post(gateway).status_code == 200
    new = make_token(path)
    stale = httpx2.get(f"{gateway.url}/models", headers={"Authorization": f"Bearer {old}"})
    assert stale.status_code == 401
    assert stage.post(gateway).status_code == 200
    wait_for(lambda: stage.watcher.events_of("tomato", "wrong-token"), "the wrong token was not said", TIMEOUT_S)
    for token in (old, new):
        assert token not in caplog.text
        assert token not in repr(stage.watcher.events)
        assert token not in repr(stage.watcher.services)


def test_pages_of_named_origins_may_use_it(stage: Stage) -> None:
    gateway = stage.gateway('origins = ["https://chat.home"]\n')
    for origin, allowed in (("https://chat.home", True), ("https://evil.example", False)):
        asked = {
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type",
        }
        reply = httpx2.options(f"{gateway.url}/chat/completions", headers=asked)
        assert (reply.headers.get("access-control-allow-origin") == origin) == allowed
        answered = stage.post(gateway)
        assert answered.status_code == 200


def test_it_speaks_tls_with_a_certificate_and_says_what_is_wrong_with_one(stage: Stage) -> None:
    cert, key = _certificate(stage.folder)
    gateway = stage.gateway(f'cert_file = "{cert}"\nkey_file = "{key}"\n')
    assert gateway.url.startswith("https://")
    trusting = ssl.create_default_context(cafile=str(cert))
    assert stage.post(gateway, verify=trusting).status_code == 200
    with pytest.raises(httpx2.ConnectError):
        stage.post(gateway)
    key.write_text("no key")
    broken = stage.gateway(f'cert_file = "{cert}"\nkey_file = "{key}"\n', ready=False)
    wait_for(lambda: "certificate" in broken.condition()[1], "it does not say so", TIMEOUT_S)


def _certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1, signed by itself."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tomato")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = folder / "cert.pem", folder / "key.pem"
    cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return cert_file, key_file
