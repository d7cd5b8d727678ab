"""The pool between processes: fetched from another, and read when the holder is killed in mid-fetch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from broker.embedded import EmbeddedBroker
from protocol.layout import BLOCK_TOKENS
from tests.services.model_runner.pool_nodes import BLOCKS, PoolNode, Talker, prompt, site
from tests.support.nodes import CHECKOUT
from tests.support.waiting import DEADLINE_S, wait_for

pytestmark = pytest.mark.slow

CHILD = "tests.services.model_runner.pool_child"


class Child:
    """A node's process. It reads its keys and its peers from the node's folder."""

    def __init__(self, folder: Path, node: PoolNode, url: str, model: Path, *ways: str) -> None:
        self.name = node.name
        command = [sys.executable, "-m", CHILD, str(folder), node.name, url, str(model), *ways]
        self.process = subprocess.Popen(
            command, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def hear(self, word: str) -> None:
        """Its next line."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"{word}\n"

    def tell(self, line: str) -> None:
        """Have it do something, and wait until it has."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.hear("yes")

    def end(self) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
            self.process.wait(DEADLINE_S)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Site:
    """Nodes that trust each other, and processes of them."""

    def __init__(self, folder: Path, url: str, model: Path, talker: Talker, nodes: list[PoolNode]) -> None:
        self._folder, self._url, self._model = folder, url, model
        self.talker = talker
        self.nodes = {node.name: node for node in nodes}
        self._stack = ExitStack()

    def start(self, name: str, *ways: str) -> Child:
        child = Child(self._folder, self.nodes[name], self._url, self._model, *ways)
        self._stack.callback(child.end)
        child.hear("ready")
        return child

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def processes(tmp_path: Path, small_models: dict[str, Path]) -> Iterator[Site]:
    model = small_models["llama"]
    with (
        EmbeddedBroker() as broker,
        site(tmp_path, broker.url, model, "tomato", "sprout", "liar") as (talker, nodes),
    ):
        found = Site(tmp_path, broker.url, model, talker, nodes)
        try:
            yield found
        finally:
            found.close()


def test_a_process_that_joins_later_is_given_the_key_and_fetches_what_another_has_read(processes: Site) -> None:
    talker, nodes = processes.talker, processes.nodes
    tomato = processes.start("tomato")
    read = talker.ask(nodes["tomato"], prompt())
    tomato.tell(f"entries {BLOCKS}")
    sprout = processes.start("sprout")
    assert not (nodes["liar"].root / "keys" / "group.keys").exists()
    sprout.tell("heard tomato")
    fetched = talker.ask(nodes["sprout"], prompt())
    assert fetched.tokens == read.tokens
    assert fetched.usage is not None
    assert (fetched.usage.pooled_tokens, fetched.usage.pooled_from) == (BLOCKS * BLOCK_TOKENS, ["tomato"])
    assert fetched.usage.pooled_how == "exact"


def test_when_the_holder_is_killed_in_mid_fetch_the_prompt_is_read(processes: Site) -> None:
    talker, nodes = processes.talker, processes.nodes
    tomato = processes.start("tomato", "stalls")
    read = talker.ask(nodes["tomato"], prompt())
    tomato.tell(f"entries {BLOCKS}")
    sprout = processes.start("sprout")
    sprout.tell("heard tomato")
    answer = talker.ask_later(nodes["sprout"], prompt())
    wait_for((nodes["tomato"].root / "stalled").exists, "nothing was fetched")
    tomato.process.kill()
    tomato.process.wait()
    done = answer.result(2 * DEADLINE_S)
    assert done.tokens == read.tokens
    assert done.usage is not None
    assert done.usage.pooled_tokens == 0
    sprout.tell(f"entries {BLOCKS}")  # it puts in what it has read
