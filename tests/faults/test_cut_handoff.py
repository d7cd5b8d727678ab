"""A handoff that is cut in mid-transfer: its sender killed, or the broker. It goes on where it was."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed: make install (extra `model`)")

from bench.worker import worker
from broker.base import Broker
from broker.embedded import EmbeddedBroker
from edge.bus import Bus
from protocol.errors import MindstreamError
from protocol.messages import ModelGenerate, ModelResume, ModelResumed, ModelSnapshot, RunDone, SnapshotSaved
from tests.services.model_runner.conftest import make_small_models
from tests.support.nodes import CHECKOUT, Node, Watcher, kill_broker, wait_for
from tests.support.waiting import DEADLINE_S

pytestmark = pytest.mark.model

RUNNER = ("model_runner",)
TTL_MS = 60_000
PROMPT_TOKENS = 2_000
BITS_PER_S = 6e6
"""The snapshot takes some seconds over it: time to kill somebody."""
TRIES = 6


@contextmanager
def pair(folder: Path, models: dict[str, Path], broker: Broker) -> Iterator[tuple[Node, Node, Watcher, Bus]]:
    """tomato behind a slow link, which is simulated, and sprout; both with a tiny model."""
    toml = (
        f'[model]\nname = "{models["llama"]}"\nengine = "transformers"\nthreads = 1\n[bus]\nmailbox_mib = 0\n'
        "[supervisor]\nbackoff_max_s = 1.0\n"
    )
    port = broker.url.rpartition(":")[2]
    with worker("bench.shaped_link", "link", port, str(BITS_PER_S)) as link:
        tomato = Node(folder, "tomato", f"mqtt://127.0.0.1:{link.read()}", RUNNER, toml)
        sprout = Node(folder, "sprout", broker.url, RUNNER, toml)
        tomato.trust(sprout)
        sprout.trust(tomato)
        watcher = Watcher(broker.url)
        bus = Bus(url=broker.url, node="tester", client="talker")
        bus.start()
        try:
            for node in (tomato, sprout):
                node.start()
            for node in (tomato, sprout):
                watcher.wait_ready(node.name, RUNNER)
            yield tomato, sprout, watcher, bus
        finally:
            bus.stop()
            watcher.bus.stop()
            for node in (tomato, sprout):
                if node.process is not None:
                    node.stop()


def landed(node: Node) -> int:
    """Chunks there, synced or not, by their names: BLAKE3 in hexadecimal digits."""
    store = node.data_dir / "model_runner" / "snapshots"
    found = {path.name for folder in ("chunks", "arriving") for path in (store / folder).rglob("*")}
    return sum(len(name) == 64 and not name.startswith(".") for name in found)


@pytest.mark.parametrize("killed", ["sender", pytest.param("broker", marks=pytest.mark.slow)])
def test_a_transfer_that_is_cut_goes_on_where_it_was(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, killed: str
) -> None:
    models = make_small_models(tmp_path_factory)
    with EmbeddedBroker() as broker, pair(tmp_path, models, broker) as (_, sprout, watcher, bus):
        prompt = [(7 * at) % 250 for at in range(PROMPT_TOKENS)]
        asked = ModelGenerate("garden", prompt_tokens=prompt, max_new_tokens=2, ignore_eos=True)
        done: RunDone = bus.ask("tomato", asked, ttl_ms=TTL_MS)
        saved: SnapshotSaved = bus.ask("tomato", ModelSnapshot("garden"), ttl_ms=TTL_MS)
        resume = ModelResume(saved.snapshot, "tomato", way="chunks")
        answer = bus.ask_later("sprout", resume, ttl_ms=TTL_MS)
        wait_for(lambda: landed(sprout) > 0 or answer.done(), "no chunk came")
        if killed == "sender":
            watcher.kill_service("tomato", "model_runner")
        else:
            kill_broker(broker)
            broker.start()
        before = landed(sprout)
        resumed = _until_resumed(bus, resume, answer)
        assert (resumed.how, resumed.tokens) == ("exact", saved.tokens)
        assert landed(sprout) >= before > 0
        go_on = ModelGenerate("garden", max_new_tokens=8, ignore_eos=True)
        there: RunDone = bus.ask("sprout", go_on, ttl_ms=TTL_MS)
        here: RunDone = bus.ask("tomato", go_on, ttl_ms=TTL_MS)
        assert there.tokens == here.tokens
        assert len(done.tokens) == 2


def _until_resumed(bus: Bus, resume: ModelResume, answer: object) -> ModelResumed:
    """The answer, asked for again where the holder was away for too long: what has come is not sent again."""
    for _ in range(TRIES):
        try:
            resumed: ModelResumed = answer.result()  # type: ignore[attr-defined]
            return resumed
        except MindstreamError as error:
            print(f"asked again: {error}")
            answer = bus.ask_later("sprout", resume, ttl_ms=TTL_MS)
    raise AssertionError("it was not resumed")


@pytest.mark.slow
def test_the_command_says_that_the_holder_is_gone_and_goes_on_when_it_is_back(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    models = make_small_models(tmp_path_factory)
    with EmbeddedBroker() as broker, pair(tmp_path, models, broker) as (tomato, sprout, watcher, bus):
        prompt = [(7 * at) % 250 for at in range(PROMPT_TOKENS)]
        asked = ModelGenerate("garden", prompt_tokens=prompt, max_new_tokens=2, ignore_eos=True)
        bus.ask("tomato", asked, ttl_ms=TTL_MS)
        first = _command(sprout)
        wait_for(lambda: landed(sprout) > 0 or first.poll() is not None, "no chunk came")
        killed = watcher.pid("tomato", "model_runner")
        tomato.kill()
        _, said = first.communicate(timeout=2 * DEADLINE_S)
        if first.returncode != 0:  # else all had crossed the link already
            assert first.returncode == 1
            assert "tomato" in said
            assert "what came is kept: try again" in said
        tomato.start()
        wait_for(lambda: watcher.pid("tomato", "model_runner") not in (0, killed), "tomato is not back")
        watcher.wait_ready("tomato", RUNNER)
        for _ in range(TRIES):
            again = _command(sprout)
            printed, said = again.communicate(timeout=2 * DEADLINE_S)
            if again.returncode == 0:
                break
            print(said)  # its runner may still be loading
        assert "sprout: exact; 2002 tokens" in printed
        assert "garden goes on at sprout" in printed


def _command(node: Node) -> subprocess.Popen[str]:
    given = ["--config", str(node.config), "handoff", "garden", "--from", "tomato", "--to", "sprout", "--way", "chunks"]
    return subprocess.Popen(
        [sys.executable, "-c", "from edge.cli import main; main()", *given, "--timeout-s", "90"],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
