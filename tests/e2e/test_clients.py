"""The example clients speak to a real node on a real broker, without our code: the contract is enough for them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from broker.base import Broker
from broker.child import spawn
from broker.embedded import EmbeddedBroker
from broker.mosquitto import INSTALL_HINT, MosquittoBroker, find_mosquitto
from protocol.codec import Received
from protocol.ids import UUID7_PATTERN
from protocol.messages import MemoryHave, MemoryPut, MemoryVectorAsk
from tests.golden.values import vector_digest
from tests.support.javascript import CLIENTS, client_folder
from tests.support.nodes import CHECKOUT, MEMORY_SERVICES, Node, Watcher, wait_for
from tests.support.waiting import DEADLINE_S, TTL_MS

LANGUAGES = ("python", "javascript", "shell")


@pytest.fixture(scope="module", params=["embedded", "mosquitto"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Watcher]]:
    """A node with a memory, and one who knows it."""
    folder = tmp_path_factory.mktemp(f"clients-{request.param}")
    if request.param == "mosquitto" and find_mosquitto() is None:
        pytest.skip(f"Mosquitto is not installed: {INSTALL_HINT}")
    broker: Broker = EmbeddedBroker() if request.param == "embedded" else MosquittoBroker(data_folder=folder / "broker")
    with broker:
        node = Node(folder, "tomato", broker.url, MEMORY_SERVICES)
        watcher = Watcher(broker.url)
        node.start()
        try:
            watcher.wait_ready("tomato", MEMORY_SERVICES)
            yield node, watcher
        finally:
            watcher.bus.stop()
            assert node.stop() == 0


def command(language: str, name: str, tmp_path: Path) -> list[str]:
    """What runs the client ``name`` of one language. Skips what cannot run here."""
    if language == "python":
        return [sys.executable, str(CLIENTS / f"{name}.py")]
    if language == "javascript":
        node, folder = client_folder(tmp_path)
        return [node, str(folder / f"{name}.mjs")]
    if not any(Path(folder, "mosquitto_sub").exists() for folder in os.get_exec_path()):
        pytest.skip(f"mosquitto_sub is not installed: {INSTALL_HINT}")
    return ["sh", str(CLIENTS / f"{name}.sh")]


def address(watcher: Watcher) -> list[str]:
    parts = urlsplit(watcher.bus.url)
    return [str(parts.hostname), str(parts.port)]


def environment(tmp_path: Path) -> dict[str, str]:
    """The command ``mindstream`` of this checkout first in the path; for Python clients nothing of ours."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    program = programs / "mindstream"
    code = f"import sys; sys.path.insert(0, {str(CHECKOUT)!r}); from edge.cli import main; main()"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$@"\n')
    program.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"PATH": f"{programs}:{os.environ['PATH']}"}


@contextmanager
def lines_of(arguments: list[str], tmp_path: Path) -> Iterator[list[str]]:
    """A program that goes on until the end of the block; what it has printed so far."""
    lines: list[str] = []
    program = spawn(arguments, cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE)
    assert program.stdout is not None

    def read() -> None:
        assert program.stdout is not None
        for line in program.stdout:
            lines.append(line.decode())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield lines
    finally:
        os.killpg(program.pid, signal.SIGTERM)  # a session of its own: a shell has children
        program.wait(DEADLINE_S)
        reader.join(DEADLINE_S)
        program.stdout.close()


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_client_hears_new_memories_and_reads_them(
    language: str, running: tuple[Node, Watcher], tmp_path: Path
) -> None:
    _, watcher = running
    said = 0

    def heard_after_another(lines: list[str]) -> bool:
        # Said again and again: nobody knows when the client has subscribed.
        nonlocal said
        said += 1
        text = f"{language} hears number {said}: été 鍵"
        watcher.bus.ask("tomato", MemoryPut(text=text), ttl_ms=TTL_MS)
        return bool(heard(lines))

    def heard(lines: list[str]) -> list[str]:
        # The shell hears the asks too.
        return [line for line in lines if f"{language} hears number" in line and "/memory/log" in line]

    with lines_of([*command(language, "listen", tmp_path), *address(watcher)], tmp_path) as lines:
        wait_for(lambda: heard_after_another(lines), f"the {language} client hears nothing")
    first = heard(lines)[0]
    if language == "shell":
        shown = [json.loads(line) for line in lines]
        (entry, *_) = json.loads(first)["message"]["data"]["entries"]
        assert entry["content"]["text"].endswith(": été 鍵")
        assert entry["content"]["source"] == "tester/watcher"
        # The retained states came with the subscription, as JSON.
        states = {each["topic"]: each["message"] for each in shown if each["topic"].endswith("/state")}
        assert states["mindstream/v1/tomato/service/memory_store/state"]["state"] == "ready"
    else:
        assert first.startswith("mindstream/v1/tomato/memory/log ")
        assert first.rstrip().endswith(": été 鍵")


@pytest.mark.parametrize("language", ["python", "javascript"])
def test_a_client_puts_and_recalls_a_memory(language: str, running: tuple[Node, Watcher], tmp_path: Path) -> None:
    node, watcher = running
    text = f"A quince is a fruit, says the {language} client: été 鍵"
    done = subprocess.run(
        [*command(language, "ask", tmp_path), *address(watcher), "tomato", text],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    stored, *recalled = done.stdout.splitlines()
    identifier = stored.removeprefix("stored as ")
    assert UUID7_PATTERN.fullmatch(identifier)
    assert f"recalled {identifier} {text}" in recalled
    assert (identifier, text) in node.memories()


@pytest.mark.parametrize("language", ["python", "javascript"])
def test_a_refusal_reaches_the_client_in_words(language: str, running: tuple[Node, Watcher], tmp_path: Path) -> None:
    _, watcher = running
    done = subprocess.run(
        [*command(language, "ask", tmp_path), *address(watcher), "tomato", ""],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 1
    assert "reading memory.put" in done.stderr
    assert "text" in done.stderr


def test_the_digest_of_what_a_node_holds_is_the_documented_one(running: tuple[Node, Watcher]) -> None:
    _, watcher = running
    heard: list[MemoryHave] = []

    def hear(message: Received) -> None:
        heard.append(message.data)

    stop_hearing = watcher.bus.hear(MemoryHave, hear, node="tomato")
    watcher.bus.ask("tomato", MemoryPut(text="the digest covers this"), ttl_ms=TTL_MS)
    vector = watcher.bus.ask("tomato", MemoryVectorAsk(), ttl_ms=TTL_MS)
    assert [origin.scope for origin in vector.origins] == ["everyone"]
    wait_for(
        lambda: heard and heard[-1].digest == vector_digest(vector.origins), "its digest is not that of its vector"
    )
    assert heard[-1].entries == vector.origins[0].seq
    stop_hearing()
